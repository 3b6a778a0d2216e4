"""Ensembles of attacks, read from records: the worst member case by case, and the worst of the whole data set.

Members are the conditions whose name begins with the same word of :data:`medrobust.sea.PRESETS` and whose attacks have
the same eps. The clean image is a member, so no case is better under attack than without. A case that one member broke
(Dice 0) is not attacked by the others; its worst is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medrobust.budgets import PRESETS, parse
from medrobust.pooled import Bounded, dataset_dice, dataset_miou
from medrobust.records import CLEAN, Record
from medrobust.statistics import is_foreground, per_case
from medrobust.worst_case import worst

COUNTS = ("tp", "size")
"""Metrics that only ensembles read: voxels of a class that are found, and of prediction and label together."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The worst case of several attacks with one budget.

    Attributes:
        name: preset and budget, as in ``"SEA, L∞ 8/255"``.
        members: names of the conditions, clean last.
        dice: each case's lowest mean Dice over the foreground classes.
        by: for how many cases each member was the worst.
        hd95: each case's largest mean HD95 in mm, chosen by itself; empty where none was recorded.
        pooled_dice: lowest mean over classes of Dice over the pooled voxels of all cases; ``None`` for one case.
        miou: lowest mean over classes, background included, of IoU over the pooled voxels.
    """

    name: str
    members: tuple[str, ...]
    dice: dict[str, float]
    by: dict[str, int]
    hd95: dict[str, float]
    pooled_dice: Bounded | None
    miou: Bounded | None


def ensembles(records: Iterable[Record]) -> list[Ensemble]:
    """All ensembles of at least two members in the records of one model, in the order they appear."""
    clean: list[Record] = []
    found: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        if record.condition == CLEAN:
            clean.append(record)
        elif (preset := record.condition.partition(" ")[0]).lower() in PRESETS:
            kind, unit, size, _ = parse(record.attack)
            key = (preset, f"{kind} {size:.3g}{unit}", record.protocol)
            found.setdefault(key, {}).setdefault(record.condition, []).append(record)
    return [
        _ensemble(", ".join(filter(None, (preset, budget))), {**members, CLEAN: clean})
        for (preset, budget, _), members in found.items()
        if len(members) > 1
    ]


def _ensemble(name: str, members: dict[str, list[Record]]) -> Ensemble:
    dice, by = _worst(members, "dice")
    hd95, _ = _worst(members, "hd95")
    return Ensemble(
        name=name,
        members=tuple(members),
        dice=dice,
        by=by,
        hd95=hd95,
        pooled_dice=_pooled(members, list(dice), lambda tp, size: dataset_dice(tp, size), foreground=True),
        miou=_pooled(members, list(dice), lambda tp, size: dataset_miou(tp, size - tp), foreground=False),
    )


def _worst(members: dict[str, list[Record]], metric: str) -> tuple[dict[str, float], dict[str, int]]:
    """Each case's worst value over the members that have it, and how often each member was it."""
    larger = metric == "hd95"
    filler = -np.inf if larger else np.inf
    of_member = [per_case(row for row in rows if row.metric == metric) for rows in members.values()]
    cases = list(dict.fromkeys(case for values in of_member for case in values))
    if not cases:
        return {}, {}
    table = np.array([[values.get(case, filler) for case in cases] for values in of_member])
    chosen = worst(table, larger_is_worse=larger)
    by = {member: int((chosen.member == index).sum()) for index, member in enumerate(members)}
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
    tables = []
    for metric in COUNTS:
        known = [
            {(row.case, row.class_name): int(row.value) for row in found if row.metric == metric}
            for found in members.values()
        ]
        for case in cases:
            have = next((one for one in known if (case, classes[0]) in one), None)
            if have is None:
                return None
            for one in known:
                for name in classes:
                    one.setdefault((case, name), have[case, name])
        tables.append(np.array([[[one[case, name] for name in classes] for case in cases] for one in known]))
    return search(tables[0], tables[1])
