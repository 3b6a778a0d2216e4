"""Means over cases, their intervals, and paired differences. Cases are what varies, so cases are what is resampled."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from medrobust.records import BACKGROUND, Record


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over cases with its bootstrap interval; ``low`` and ``high`` are None where there can be none."""

    mean: float
    low: float | None = None
    high: float | None = None
    cases: int


def is_foreground(record: Record) -> bool:
    """Whether the row enters means over organs: it names a class, and not the background."""
    return bool(record.class_name) and record.class_name.lower() != BACKGROUND


def has_reference(record: Record) -> bool:
    """Whether the reference holds the structure of the row."""
    return record.status in ("ok", "missed")


def is_missed(record: Record) -> bool:
    """Whether no voxel of a structure of the reference is right; for rows of Dice.

    The prediction may have its class elsewhere: then the row's status is "ok", for the distance is measured, and its
    Dice is 0 all the same.
    """
    return record.status == "missed" or (record.status == "ok" and record.value == 0)


def per_case(records: Iterable[Record]) -> dict[str, float]:
    """One number a case from the rows of one metric under one condition, in the order of first appearance.

    Rows that differ only by seed are averaged first, then the classes of a case, the background left out. Averaging
    within the case first gives a case with few labelled organs the same weight as any other.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if is_foreground(record) or not record.class_name:
            values[record.case][record.class_name].append(record.value)
    return {case: _mean(map(_mean, classes.values())) for case, classes in values.items()}


def mean_interval(
    values: Iterable[float], rng: np.random.Generator, *, confidence: float = 0.95, resamples: int = 9999
) -> Interval:
    """The mean over cases and its BCa bootstrap interval (Efron 1987, JASA 82).

    Fewer than two cases, or an infinite value, give no interval. Equal values give an interval of no width.
    Raises ValueError for no values at all.
    """
    data = np.array(list(values), dtype=np.float64)
    if not data.size:
        raise ValueError("expected at least one case, got none; check that the records hold this metric and condition")
    mean, cases = float(data.mean()), len(data)
    if cases < 2 or not np.isfinite(data).all():
        return Interval(mean=mean, cases=cases)
    if np.ptp(data) == 0:
        return Interval(mean=mean, low=mean, high=mean, cases=cases)
    low, high = _bootstrap(data, rng, confidence, resamples)
    return Interval(mean=mean, low=low, high=high, cases=cases)


def paired_drop(clean: Mapping[str, float], condition: Mapping[str, float], rng: np.random.Generator) -> Interval:
    """Mean of ``clean - condition`` over the cases that have both; positive where a score such as Dice was lost.

    Pairing takes the differences between patients out of the interval. Raises ValueError where no case has both.
    """
    return mean_interval((clean[case] - condition[case] for case in clean if case in condition), rng)


def worst_case(conditions: Sequence[Mapping[str, float]], *, higher_is_better: bool = True) -> dict[str, float]:
    """Each case's worst value over several attacks, for the cases that all of them have.

    The mean of this is the strict reading of "robust": the attacker picks the best attack for every case.
    """
    worst = min if higher_is_better else max
    first, *others = conditions
    return {
        case: worst(values[case] for values in conditions) for case in first if all(case in other for other in others)
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _bootstrap(data: np.ndarray, rng: np.random.Generator, confidence: float, resamples: int) -> tuple[float, float]:
    def interval(method: str) -> tuple[float, float]:
        result = bootstrap(
            (data,),
            np.mean,
            confidence_level=confidence,
            n_resamples=resamples,
            batch=1000,  # keeps the resampled indices small for thousands of cases
            method=method,
            random_state=rng,
        )
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    with warnings.catch_warnings():
        # Values equal up to rounding have no acceleration; SciPy warns and returns NaN, and percentiles still stand.
        warnings.simplefilter("ignore")
        low, high = interval("BCa")
    return (low, high) if math.isfinite(low) and math.isfinite(high) else interval("percentile")
