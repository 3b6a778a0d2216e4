"""Which attack does most harm: over all cases together, for the verdict, and case by case. All on the same cases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medrobust.records import Record
from medrobust.statistics import has_reference, is_foreground, is_missed, worst_case


@dataclass(frozen=True, kw_only=True)
class Rival:
    """An attack, or an ensemble of attacks, which takes part as one: its members skip cases that one of them broke.

    Attributes:
        key: what it shares with the same rival against another model.
        name: what a reader calls it.
        dice: each case's mean Dice over the foreground classes.
        hd95: each case's mean HD95 in mm; may be empty.
        rows: Dice of each case and structure.
    """

    key: tuple[Any, ...]
    name: str
    dice: Mapping[str, float]
    hd95: Mapping[str, float]
    rows: Sequence[Record]


def worst_of_all(rivals: Sequence[Rival]) -> tuple[dict[str, float], dict[str, float]]:
    """Each case's lowest Dice and, by itself, largest HD95, for the cases that all rivals have."""
    return worst_case([rival.dice for rival in rivals]), worst_case(
        [rival.hd95 for rival in rivals], higher_is_better=False
    )


def verdict(clean: Mapping[str, float], rivals: Sequence[Rival]) -> dict[str, str] | None:
    """Mean Dice on clean images and under the rival that leaves least of it, as text; ``None`` if nothing was attacked.

    All numbers are over the same cases: the most that clean images and any one rival share. A rival that lacks one of
    them is not compared; it may have failed on the hardest.
    """
    cases = max(([case for case in clean if case in rival.dice] for rival in rivals), key=len, default=[])
    whole = [rival for rival in rivals if all(case in rival.dice for case in cases)]
    if not cases:
        return None
    worst = min(whole, key=lambda rival: _mean(rival.dice[case] for case in cases))
    missed, present = structures(row for row in worst.rows if row.case in set(cases))
    return {
        "clean": f"{_mean(clean[case] for case in cases):.3f}",
        "worst": f"{_mean(worst.dice[case] for case in cases):.3f}",
        "by": worst.name,
        "missed": str(missed),
        "present": str(present),
        "cases": str(len(cases)),
    }


def structures(dice: Iterable[Record]) -> tuple[int, int]:
    """How many structures, case by case, are missed, with no voxel right, of how many that the reference holds."""
    held = [row for row in dice if is_foreground(row) and has_reference(row)]
    missed, present = ({(row.case, row.class_name) for row in rows} for rows in (filter(is_missed, held), held))
    return len(missed), len(present)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
