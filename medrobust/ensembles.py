"""Ensembles of attacks, read from records: the worst member case by case, and the worst of the whole data set.

Members are the conditions whose name begins with the same word of :data:`medrobust.sea.PRESETS`, whose attacks have the
same eps and which run under the same protocol; what was made on another network, stored first, or made toward a goal is
something else. The clean image is a member, so no case is better under attack than without. A case that one member
broke (Dice 0) is not attacked by the others: its worst Dice is known, but one of them could have had a larger HD95. A
case that a member lacks for another reason is left out: what that member would have found is not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medrobust.budgets import PRESETS, parse
from medrobust.pooled import Bounded, dataset_dice, dataset_miou
from medrobust.records import CLEAN, Record
from medrobust.statistics import is_foreground, per_case
from medrobust.worst_case import worst

COUNTS = ("tp", "size")
"""Metrics that only ensembles read: voxels of a class that are found, and of prediction and label together."""

_NO_MEMBER = re.compile(r" (made on|stored as|toward) ")

Key = tuple[str, str, str]
"""Preset, budget and protocol."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The worst case of several attacks with one budget.

    Attributes:
        key: of :func:`ensemble_of`, which all members share.
        name: preset, budget and protocol, as in ``"SEA, L∞ 8/255, whole volume"``.
        members: names of the conditions, clean last.
        attacks: all that stands behind them, to the last setting.
        dice: each case's lowest mean Dice over the foreground classes.
        by: for how many cases each member was the worst.
        rows: Dice of each case under its worst member.
        hd95: each case's largest mean HD95 in mm over the members that attacked it, chosen by itself; empty where none
            was recorded.
        pooled_dice: lowest mean over classes of Dice over the pooled voxels of all cases; ``None`` for one case, or
            where a member's voxels were not counted, as in a run that evaluates saved volumes.
        miou: lowest mean over classes, background included, of IoU over the pooled voxels.
    """

    key: Key
    name: str
    members: tuple[str, ...]
    attacks: tuple[str, ...]
    dice: dict[str, float]
    by: dict[str, int]
    rows: tuple[Record, ...]
    hd95: dict[str, float]
    pooled_dice: Bounded | None
    miou: Bounded | None


def ensemble_of(condition: str, attack: str, protocol: str) -> Key | None:
    """What the members of one ensemble share, read from records; ``None`` for what is in none."""
    preset = condition.partition(" ")[0]
    if preset.lower() not in PRESETS or _NO_MEMBER.search(attack):
        return None
    kind, unit, size, _ = parse(attack)
    return preset, f"{kind} {size:.3g}{unit}", protocol


def ensembles(records: Iterable[Record]) -> list[Ensemble]:
    """All ensembles of at least two members in the records of one model, in the order they appear."""
    records = list(records)
    clean = [record for record in records if record.condition == CLEAN]
    whole = _of_members(filled(records))
    return [
        _ensemble(key, members, clean, whole[key]) for key, members in _of_members(records).items() if len(members) > 1
    ]


def filled(records: Iterable[Record]) -> list[Record]:
    """The records of one model; a case that a member of an ensemble skipped gets the rows of the member that broke it.

    So members can be compared with other attacks on the same cases: a mean over what they saw leaves out the cases that
    break most easily.
    """
    records = list(records)
    found = list(records)
    teams: dict[Key, dict[tuple[str, str], dict[str, list[Record]]]] = {}
    for record in records:
        if key := ensemble_of(record.condition, record.attack, record.protocol):
            member = teams.setdefault(key, {}).setdefault((record.condition, record.attack), {})
            member.setdefault(record.case, []).append(record)
    for team in teams.values():
        broken: dict[str, list[Record]] = {}
        for cases in team.values():
            for case, rows in cases.items():
                if per_case(row for row in rows if row.metric == "dice").get(case) == 0:
                    broken.setdefault(case, rows)
        found += [
            replace(row, condition=condition, attack=attack)
            for (condition, attack), cases in team.items()
            for case, rows in broken.items()
            if case not in cases
            for row in rows
        ]
    return found


def _of_members(records: Iterable[Record]) -> dict[Key, dict[str, list[Record]]]:
    found: dict[Key, dict[str, list[Record]]] = {}
    for record in records:
        if key := ensemble_of(record.condition, record.attack, record.protocol):
            found.setdefault(key, {}).setdefault(record.condition, []).append(record)
    return found


def _ensemble(
    key: Key, attacks: dict[str, list[Record]], clean: list[Record], whole: dict[str, list[Record]]
) -> Ensemble:
    known = [{row.case for row in rows if row.metric == "dice"} for rows in whole.values()]
    cases = set.intersection(*known)
    members = {**attacks, CLEAN: clean}
    dice, by = _worst(members, "dice", cases)
    hd95, _ = _worst(members, "hd95", cases)
    return Ensemble(
        key=key,
        name=", ".join(filter(None, key)),
        members=tuple(members),
        attacks=tuple(dict.fromkeys(row.attack for rows in attacks.values() for row in rows)),
        dice=dice,
        by={member: list(by.values()).count(member) for member in members},
        rows=tuple(
            row for name, rows in members.items() for row in rows if row.metric == "dice" and by.get(row.case) == name
        ),
        hd95=hd95,
        pooled_dice=_pooled(members, list(dice), lambda tp, size: dataset_dice(tp, size), foreground=True),
        miou=_pooled(members, list(dice), lambda tp, size: dataset_miou(tp, size - tp), foreground=False),
    )


def _worst(
    members: dict[str, list[Record]], metric: str, of: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Each case's worst value over the members that have it, and which member that was."""
    larger = metric == "hd95"
    filler = -np.inf if larger else np.inf
    of_member = [per_case(row for row in rows if row.metric == metric) for rows in members.values()]
    cases = [case for case in dict.fromkeys(case for values in of_member for case in values) if case in of]
    if not cases:
        return {}, {}
    table = np.array([[values.get(case, filler) for case in cases] for values in of_member])
    chosen = worst(table, larger_is_worse=larger)
    by = {case: list(members)[index] for case, index in zip(cases, chosen.member, strict=True)}
    return dict(zip(cases, chosen.value.tolist(), strict=True)), by


def _pooled(
    members: dict[str, list[Record]],
    cases: Sequence[str],
    search: Callable[[np.ndarray, np.ndarray], Bounded],
    *,
    foreground: bool,
) -> Bounded | None:
    """The search over counts; a case that a member lacks has there what the first member that has it found."""
    rows = [row for found in members.values() for row in found if row.metric in COUNTS]
    classes = list(dict.fromkeys(row.class_name for row in rows if not foreground or is_foreground(row)))
    if len(cases) < 2 or not classes:
        return None
    judged = [{row.case for row in found if row.metric == "dice"} for found in members.values()]
    tables = []
    for metric in COUNTS:
        known = [
            {(row.case, row.class_name): int(row.value) for row in found if row.metric == metric}
            for found in members.values()
        ]
        for case in cases:
            have = next((one for one in known if (case, classes[0]) in one), None)
            # Who attacked the case and was not counted must not pass for clean.
            if have is None or any(
                (case, classes[0]) not in one and case in seen for one, seen in zip(known, judged, strict=True)
            ):
                return None
            for one in known:
                for name in classes:
                    one.setdefault((case, name), have[case, name])
        tables.append(np.array([[[one[case, name] for name in classes] for case in cases] for one in known]))
    return search(tables[0], tables[1])
