"""Means over cases, and intervals that cover what they should."""

import math

import numpy as np
import pytest
from scipy.stats import t

from medrobust.records import Record
from medrobust.statistics import Interval, mean_interval, paired_drop, per_case, worst_case


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def row(case: str, class_name: str, value: float, seed: int = 0) -> Record:
    return Record(case=case, condition="PGD", metric="dice", class_name=class_name, value=value, seed=seed)


def test_per_case_averages_seeds_then_foreground_classes() -> None:
    rows = [
        row("a", "background", 1.0),
        row("a", "liver", 0.2, seed=0),
        row("a", "liver", 0.4, seed=1),
        row("a", "spleen", 0.9),
        row("b", "liver", 0.5),
        row("b", "Background", 1.0),
    ]
    assert per_case(rows) == pytest.approx({"a": (0.3 + 0.9) / 2, "b": 0.5})


def test_per_case_takes_metrics_of_the_whole_image() -> None:
    assert per_case([row("a", "", 0.25), row("b", "", 0.75)]) == {"a": 0.25, "b": 0.75}


def test_interval_of_two_values_is_their_range() -> None:
    # The resampled mean is either value with chance 1/4, far above the 2.5 % left out on each side.
    assert mean_interval([0.2, 0.6], rng()) == Interval(mean=pytest.approx(0.4), low=0.2, high=0.6, cases=2)


def test_interval_of_many_values_is_near_the_t_interval() -> None:
    data = rng(1).normal(0.5, 0.1, 200)
    found = mean_interval(data, rng())
    low, high = t.interval(0.95, 199, data.mean(), data.std(ddof=1) / math.sqrt(200))
    assert found.low == pytest.approx(low, abs=1e-3)
    assert found.high == pytest.approx(high, abs=1e-3)
    assert mean_interval(data, rng()) == found


def test_where_there_is_no_interval_there_is_none() -> None:
    assert mean_interval([0.3], rng()) == Interval(mean=0.3, cases=1)
    assert mean_interval([0.3, math.inf], rng()) == Interval(mean=math.inf, cases=2)
    assert mean_interval([0.5] * 4, rng()) == Interval(mean=0.5, low=0.5, high=0.5, cases=4)
    with pytest.raises(ValueError, match="at least one case"):
        mean_interval([], rng())


def test_values_equal_up_to_rounding_still_give_a_finite_interval() -> None:
    found = mean_interval([0.1 + 0.2, 0.3, 0.3], rng())
    assert found.low == pytest.approx(0.3)
    assert found.high == pytest.approx(0.3)


def test_drop_is_paired() -> None:
    clean = {"a": 0.9, "b": 0.5, "c": 0.7}
    attacked = {"b": 0.3, "a": 0.7, "d": 0.0}
    drop = paired_drop(clean, attacked, rng())
    # Patients differ by 0.4, the drop not at all: pairing is what makes this interval narrow.
    assert (drop.mean, drop.low, drop.high) == pytest.approx((0.2, 0.2, 0.2))
    assert drop.cases == 2
    with pytest.raises(ValueError, match="at least one case"):
        paired_drop(clean, {"d": 0.0}, rng())


def test_worst_case_picks_per_case_among_cases_all_have() -> None:
    pgd, vafa = {"a": 0.1, "b": 0.6, "c": 0.0}, {"a": 0.4, "b": 0.2}
    assert worst_case([pgd, vafa]) == {"a": 0.1, "b": 0.2}
    assert worst_case([pgd, vafa], higher_is_better=False) == {"a": 0.4, "b": 0.6}
