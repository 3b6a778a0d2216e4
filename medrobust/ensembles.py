"""Ensembles of attacks, read from records: the worst member case by case, and the worst of the whole data set.

Members are the conditions whose name begins with the same word of :data:`medrobust.sea.PRESETS`, whose attacks have the
same eps and which run under the same protocol; what was made on another network, stored first, or made toward a goal is
something else. The clean image is a member, so no case is better under attack than without. A case that one member
broke (Dice 0) is not attacked by the others: its worst Dice is known, but one of them could have had a larger HD95. A
case that a member lacks for another reason is left out: what that member would have found is not known.

Where the first members broke every case of a model, the others have no records of it. Then other models of the same
report tell who they are, and where none does, the members that ran are an ensemble all the same, be it one alone.
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
_LOSS = re.compile(r"\b(objective|track)=\w+\(([^()]|\([^()]*\))*\)")
"""What tells the members of a preset apart."""

Key = tuple[str, str, str]
"""Preset, budget and protocol."""

Texts = dict[str, tuple[str, ...]]
"""The attacks behind each member, by its name."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The worst case of several attacks with one budget.

    Attributes:
        key: of :func:`ensemble_of`, which all members share.
        name: preset, budget and protocol, as in ``"SEA, L∞ 8/255, whole volume"``.
        members: names of the conditions, clean last; those that were left no case of this model are among them, as far
            as other models tell.
        attacks: all that stands behind them, to the last setting.
        broken: whether the members that ran broke every case, so that any others would have been left none.
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
    broken: bool
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
    """All ensembles in the records of one model, in the order they appear: see :func:`ensembles_of_models`."""
    (found,) = ensembles_of_models([records])
    return found


def ensembles_of_models(models: Sequence[Iterable[Record]]) -> list[list[Ensemble]]:
    """All ensembles of each model, in the order they appear; the same ensemble has the same members in each.

    An ensemble has two members at least, or one that broke every case, unless that one ran alone on a model of which it
    did not break every case: then it is a single attack. Where the members that ran broke every case, those that other
    models have are members as well; they would have been left none. This needs the same attacks, to the last setting,
    behind every member that models share, and where they share none, attacks that differ in nothing but their loss.
    """
    parts = [_parts(list(records)) for records in models]
    found: list[list[Ensemble]] = []
    for of_model in parts:
        found.append([])
        for key, part in of_model.items():
            same = [other[key] for other in parts if key in other]
            texts = part.texts | (_united([other.texts for other in same]) if part.broken else {})
            if len(texts) > 1 or (part.broken and all(other.broken or len(other.texts) > 1 for other in same)):
                found[-1].append(_ensemble(key, part, texts))
    return found


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


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What the records of one model hold of one ensemble.

    Attributes:
        rows: of each member, by its name.
        clean: of the clean images.
        texts: the attacks behind each member.
        cases: that all these members were shown, or were spared since another had broken them.
        broken: whether one of them broke each of these cases.
    """

    rows: dict[str, list[Record]]
    clean: list[Record]
    texts: Texts
    cases: set[str]
    broken: bool


def _parts(records: list[Record]) -> dict[Key, _Part]:
    clean = [record for record in records if record.condition == CLEAN]
    whole = _of_members(filled(records))
    found = {}
    for key, members in _of_members(records).items():
        cases = set.intersection(*({row.case for row in rows if row.metric == "dice"} for rows in whole[key].values()))
        dice = [per_case(row for row in rows if row.metric == "dice") for rows in members.values()]
        found[key] = _Part(
            rows=members,
            clean=clean,
            texts={name: tuple(sorted({row.attack for row in rows})) for name, rows in members.items()},
            cases=cases,
            broken=bool(cases) and all(any(values.get(case) == 0 for values in dice) for case in cases),
        )
    return found


def _united(models: Sequence[Texts]) -> Texts:
    """The members of one ensemble on several models; none unless the records show it to be one."""
    united, *others = models
    while others:
        near = next((texts for texts in others if _settings(texts) & _settings(united)), None)
        if near is None or any(united.get(name, attacks) != attacks for name, attacks in near.items()):
            return {}
        others.remove(near)
        united = united | near
    return united


def _settings(texts: Texts) -> set[str]:
    """The attacks without their losses."""
    return {_LOSS.sub("", attack) for attacks in texts.values() for attack in attacks}


def _of_members(records: Iterable[Record]) -> dict[Key, dict[str, list[Record]]]:
    found: dict[Key, dict[str, list[Record]]] = {}
    for record in records:
        if key := ensemble_of(record.condition, record.attack, record.protocol):
            found.setdefault(key, {}).setdefault(record.condition, []).append(record)
    return found


def _ensemble(key: Key, part: _Part, texts: Texts) -> Ensemble:
    members = {**part.rows, CLEAN: part.clean}
    dice, by = _worst(members, "dice", part.cases)
    hd95, _ = _worst(members, "hd95", part.cases)
    return Ensemble(
        key=key,
        name=", ".join(filter(None, key)),
        members=(*texts, CLEAN),
        attacks=tuple(dict.fromkeys(attack for attacks in texts.values() for attack in attacks)),
        broken=part.broken,
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
