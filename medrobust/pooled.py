"""The worst case of ratios whose counts are pooled over all cases: Dice of summed counts, and dataset mIoU.

One member a case is played (``medrobust.worst_case``; the clean image is member 0), and the choice for one case changes
what is worst for the others. For one class the lowest ratio is found exactly, by Dinkelbach's method (Management
Science 13, 1967). For a mean over classes it is searched, and the truth lies in ``[lower_bound, value]``.

A class with an empty denominator under a selection is left out of that selection's mean. One that is in every selection
(any class of the reference) is always counted; one that members invent in cases which lack it counts under some
selections only, with ratio 0; one that no member ever predicts never counts. Where none is left, the value is 1.

``as_published_v1`` and ``as_published_v2`` are the aggregations of SEA (Croce et al., arXiv 2306.12941) in its two
versions, for comparison with published tables.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medrobust.worst_case import worst

Integers = NDArray[np.int64]

MOST_ROUNDS = 200
"""Of Dinkelbach's method. Score times denominator falls fourfold each round, so 64-bit counts need fewer than 130."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A value of the data set, and the selection ``(cases,)`` of one member a case that it stands for."""

    value: float
    selection: Integers


@dataclass(frozen=True, kw_only=True)
class Bounded(Pooled):
    """A value that is reached, and one that no selection can go below; the worst case lies between."""

    lower_bound: float


def pooled_dice(tp: ArrayLike, size: ArrayLike) -> Pooled:
    """Lowest pooled Dice of one class, exactly: ``sum 2 tp / sum size`` over cases; both ``(members, cases)`` integers.

    ``size`` is voxels of prediction plus voxels of reference. An empty sum of sizes counts 1, so it is never worse than
    what another selection gives, and the value is 1 only where no selection holds the class or all are perfect.
    """
    numerator, denominator = _checked(_doubled(tp), size, 2, "(members, cases)")
    top, bottom, selection = _lowest(numerator, denominator)
    return Pooled(value=top / bottom if bottom else 1.0, selection=selection)


def dataset_miou(
    intersection: ArrayLike,
    union: ArrayLike,
    *,
    starts: Sequence[ArrayLike] = (),
    random_starts: int = 0,
    rng: np.random.Generator | None = None,
) -> Bounded:
    """Lowest mean over classes of ``sum intersection / sum union`` found by descent; integers ``(members, cases, K)``.

    For a case at a time, all members are compared at once, by one formula, and the lowest is taken if it is below the
    current one, until a round over all cases changes nothing. Descents start from each single member, from ``starts``
    (selections ``(cases,)``, such as ``worst(accuracy).member``), and from ``random_starts`` drawn from ``rng``.

    No selection goes below ``lower_bound``: each class that is there under every selection enters it with its own
    lowest ratio. Classes that are there under some selections only have their lowest ratio where they are there; as
    many of them enter, lowest first, as make the mean smallest. Classes that are never there do not enter.
    """
    numerator, denominator = _checked(intersection, union, 3, "(members, cases, K)")
    selections = _selections(denominator.shape[:2], starts, random_starts, rng)
    selection = _descended(numerator, denominator, selections)
    value = _mean(*_sums(numerator, denominator, selection))
    return Bounded(value=value, lower_bound=_lower_bound(numerator, denominator), selection=selection)


def dataset_dice(
    tp: ArrayLike,
    size: ArrayLike,
    *,
    starts: Sequence[ArrayLike] = (),
    random_starts: int = 0,
    rng: np.random.Generator | None = None,
) -> Bounded:
    """Lowest mean over classes of pooled Dice, ``sum 2 tp / sum size``, searched and bounded as in ``dataset_miou``."""
    return dataset_miou(_doubled(tp), size, starts=starts, random_starts=random_starts, rng=rng)


def as_published_v1(accuracy: ArrayLike, intersection: ArrayLike, union: ArrayLike) -> Pooled:
    """mIoU of SEA's first version: each case plays its member of lowest pixel accuracy ``(members, cases)``.

    Classes with an empty union are left out; the released code gives NaN there.
    """
    numerator, denominator = _checked(intersection, union, 3, "(members, cases, K)")
    chosen = _selections(denominator.shape[:2], [worst(accuracy).member], 0, None)[-1]
    return Pooled(value=_mean(*_sums(numerator, denominator, chosen)), selection=chosen)


def as_published_v2(intersection: ArrayLike, union: ArrayLike) -> Pooled:
    """mIoU of SEA's second version as its code was released, faults included; ``(members, cases, K)`` integers.

    The value depends on the order of the members (released: balanced masked cross-entropy, masked cross-entropy,
    Jensen-Shannon; no clean image) and can lie well above the worst case. Use ``dataset_miou`` for your own numbers.

    - Candidates have 1e-8 in their denominators and the current value has not, so a member that changes nothing seems
      to help, and the last such member of a case wins rather than the best.
    - A class whose running union is 0 is struck from the running sums, and later classes then take their neighbours'
      counts. ``value`` is that of these sums and can even be negative; ``selection`` is then worth something else.
    - Running sums are float32, and lose voxels past 2^24.
    """
    numerator, denominator = _checked(intersection, union, 3, "(members, cases, K)")
    counts = np.stack([numerator, denominator]).astype(np.float32)
    shuffler = random.Random(225)
    running = np.cumsum(counts[:, 0], axis=1, dtype=np.float32)[:, -1]
    selection = np.zeros(counts.shape[2], dtype=np.int64)
    value, before = _published_mean(running), math.inf
    for _ in range(1000):
        order = list(range(len(selection)))
        shuffler.shuffle(order)
        for case in order:
            for member in range(counts.shape[1]):
                change = counts[:, member, case] - counts[:, selection[case], case]
                kept = running[1] != 0
                # Sums in double precision, as Python's numbers have; stored in single precision.
                trial = running[:, kept].astype(np.float64) + change[:, : running.shape[1]][:, kept]
                if statistics.mean((trial[0] / (trial[1] + 1e-8)).tolist()) < value:
                    selection[case] = member
                    running = trial.astype(np.float32)
            value = _published_mean(running)
        if before - value <= 1e-6:
            break
        before = value
    return Pooled(value=value, selection=selection)


def _published_mean(running: NDArray[np.float32]) -> float:
    top, bottom = running[:, running[1] != 0].astype(np.float64)
    if not len(top):
        raise ValueError("expected a class with voxels in the running sums, got none; use dataset_miou")
    return statistics.mean((top / bottom).tolist())


def _lowest(numerator: Integers, denominator: Integers) -> tuple[int, int, Integers]:
    """Numerator, denominator and selection of the lowest pooled ratio; ``(members, cases)``; 0, 0 if all are empty."""
    # Python's integers: a product of two sums of voxels can leave 64 bits, and no rounding decides a tie.
    above, below = numerator.astype(object), denominator.astype(object)
    cases = np.arange(denominator.shape[1])
    selection = denominator.argmax(0)
    for _ in range(MOST_ROUNDS):
        top, bottom = above[selection, cases].sum(), below[selection, cases].sum()
        scores = bottom * above - top * below
        lower = scores.argmin(0)
        # The selection itself scores 0, and so do empty ones: what is below 0 has voxels, and a lower ratio.
        if scores[lower, cases].sum() == 0:
            return top, bottom, selection
        selection = lower
    raise ArithmeticError(f"expected the lowest ratio within {MOST_ROUNDS} rounds; please report these counts")


def _lower_bound(numerator: Integers, denominator: Integers) -> float:
    always: list[float] = []
    sometimes: list[float] = []
    for kind in range(denominator.shape[2]):
        top, bottom, _ = _lowest(numerator[:, :, kind], denominator[:, :, kind])
        if bottom:
            (always if denominator[:, :, kind].min(0).any() else sometimes).append(top / bottom)
    sometimes.sort()
    counted = [always + sometimes[:number] for number in range(len(sometimes) + 1)]
    return min((math.fsum(ratios) / len(ratios) for ratios in counted if ratios), default=1.0)


def _descended(numerator: Integers, denominator: Integers, selections: Integers) -> Integers:
    """The best of the descents from ``selections`` ``(starts, cases)``, all run side by side."""
    starts = np.arange(len(selections))
    top, bottom = (np.stack(sums) for sums in zip(*(_sums(numerator, denominator, s) for s in selections), strict=True))
    moved = True
    while moved:  # every move lowers a value, so no state comes twice
        moved = False
        for case in range(selections.shape[1]):
            current = selections[:, case]
            tops = (top - numerator[current, case])[:, None] + numerator[:, case]
            bottoms = (bottom - denominator[current, case])[:, None] + denominator[:, case]
            values = _means(tops, bottoms)
            lowest = values.argmin(1)
            # The current member goes through the same formula, or rounding would pass for improvement.
            chosen = np.where(values[starts, lowest] < values[starts, current], lowest, current)
            moved |= bool((chosen != current).any())
            selections[:, case], top, bottom = chosen, tops[starts, chosen], bottoms[starts, chosen]
    return selections[_means(top, bottom).argmin()].copy()


def _selections(
    shape: tuple[int, ...], starts: Sequence[ArrayLike], random_starts: int, rng: np.random.Generator | None
) -> Integers:
    members, cases = shape
    rows = [np.full((members, cases), np.arange(members)[:, None])]
    for start in starts:
        row = np.asarray(start)
        if row.shape != (cases,) or row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= members:
            raise ValueError(f"expected {cases} member indices from 0 to {members - 1} in a selection, got {row}")
        rows.append(row[None])
    if random_starts:
        if rng is None:
            raise ValueError("expected rng for random starts, got None; pass np.random.default_rng(seed)")
        rows.append(rng.integers(members, size=(random_starts, cases)))
    return np.concatenate(rows).astype(np.int64)


def _sums(numerator: Integers, denominator: Integers, selection: Integers) -> tuple[Integers, Integers]:
    cases = np.arange(len(selection))
    return numerator[selection, cases].sum(0), denominator[selection, cases].sum(0)


def _means(top: Integers, bottom: Integers) -> NDArray[np.float64]:
    present = bottom > 0
    ratios = np.divide(top, bottom, out=np.zeros(bottom.shape), where=present)
    number = present.sum(-1)
    return np.where(number > 0, ratios.sum(-1) / number.clip(min=1), 1.0)


def _mean(top: Integers, bottom: Integers) -> float:
    # Summed without rounding, as the lower bound is, so that a bound that is reached is not passed in the last digit.
    ratios = [above / below for above, below in zip(top.tolist(), bottom.tolist(), strict=True) if below]
    return math.fsum(ratios) / len(ratios) if ratios else 1.0


def _doubled(tp: ArrayLike) -> Any:
    counts = np.asarray(tp)
    return 2 * counts.astype(np.int64) if counts.dtype.kind in "iu" else counts


def _checked(numerator: ArrayLike, denominator: ArrayLike, dimensions: int, shape: str) -> tuple[Integers, Integers]:
    top, bottom = np.asarray(numerator), np.asarray(denominator)
    if top.shape != bottom.shape or top.ndim != dimensions or not top.size:
        raise ValueError(f"expected two arrays {shape}, at least one each, got shapes {top.shape} and {bottom.shape}")
    if top.dtype.kind not in "iu" or bottom.dtype.kind not in "iu":
        raise ValueError(
            f"expected whole counts, got {top.dtype} and {bottom.dtype}; keep integers, float32 loses voxels past 2^24"
        )
    top, bottom = top.astype(np.int64), bottom.astype(np.int64)
    if (top < 0).any() or (top > bottom).any():
        raise ValueError("expected 0 <= numerator <= denominator everywhere, got counts outside; check their order")
    return top, bottom
