"""How a metric declines as an attack may do more: one curve an attack, from records of several budgets."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medrobust.budgets import parse
from medrobust.ensembles import filled
from medrobust.labels import told_apart
from medrobust.records import CLEAN, Record
from medrobust.statistics import per_case, worst_case

FEWEST = 3
"""Budgets that make a curve."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget of a curve.

    Attributes:
        size: of the budget, in ``Curve.unit``.
        dice, iou, hd95: mean over cases; ``None`` where it was not recorded.
        within: mean Dice if each case takes the worst of this and all smaller budgets, the clean image among them.
            Those are allowed as well, so this is the truer bound, and it never rises; where it lies below ``dice``, the
            attack was better with less room, which is a fault of the attack.
    """

    size: float
    dice: float
    iou: float | None
    hd95: float | None
    within: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An attack or a noise under growing budgets, smallest first; no two curves have one name."""

    name: str
    unit: str
    control: bool
    points: Sequence[Point]


def decline(records: Iterable[Record]) -> list[Curve]:
    """The curves in records of one model: attacks with at least three budgets on the same cases, in order.

    Two attacks belong to one curve if they differ in nothing but their budget, and step sizes that follow from it. A
    case that a member of an ensemble skipped, since another had broken it, is broken in the curves of both.
    """
    records = filled(records)
    clean = per_case(_of(records, CLEAN, "dice"))
    series: dict[tuple[str, str, str], dict[float, list[Record]]] = {}
    for record in records:
        kind, unit, size, _ = parse(record.attack)
        if math.isfinite(size):
            key = (_without_budget(record.attack), record.protocol, f"{kind}{unit and ', ' + unit}")
            series.setdefault(key, {}).setdefault(size, []).append(record)
    curves, kinds, steps = [], [], []
    for (attack, protocol, unit), budgets in series.items():
        points = _points(budgets, clean)
        if len(points) >= FEWEST:
            kind = attack.partition("(")[0] + attack.rpartition(")")[2]
            name = _shared_words(row.condition for rows in budgets.values() for row in rows) or kind
            control = "Noise" in kind
            name = name if control else f"{name}, {protocol}"
            curves.append(Curve(name=name, unit=unit, control=control, points=points))
            kinds.append(kind)
            steps.append(parse(attack)[3])
    names = told_apart([curve.name for curve in curves], kinds, steps, [curve.unit for curve in curves])
    return [replace(curve, name=name) for curve, name in zip(curves, names, strict=True)]


def _points(budgets: Mapping[float, list[Record]], clean: Mapping[str, float]) -> list[Point]:
    points, so_far = [], dict(clean)
    for size in sorted(budgets):
        rows = budgets[size]
        dice = per_case(row for row in rows if row.metric == "dice")
        # A curve over different cases would rise and fall with them.
        if not dice or set(dice) != set(clean):
            return []
        so_far = worst_case([so_far, dice])
        means = {metric: _mean(per_case(row for row in rows if row.metric == metric)) for metric in ("iou", "hd95")}
        points.append(Point(size=size, dice=float(np.mean(list(dice.values()))), within=_mean(so_far) or 0.0, **means))
    return points


def _mean(values: Mapping[str, float]) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def _of(records: Iterable[Record], condition: str, metric: str) -> list[Record]:
    return [record for record in records if (record.condition, record.metric) == (condition, metric)]


def _shared_words(conditions: Iterable[str]) -> str:
    """What the conditions of a curve have in common: their names without the size, ``"PGD"`` of ``"PGD 4/255"``."""
    first, *others = [condition.split() for condition in dict.fromkeys(conditions)]
    return " ".join(word for word in first if all(word in other for other in others))


def _without_budget(attack: str) -> str:
    return re.sub(r"\b(eps|step_size|std|q_max|q_init)=[^,()]+(, )?", "", attack)
