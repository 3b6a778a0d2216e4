"""Worst cases against all selections, one by one, and counts against scikit-learn."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from medrobust.metrics.dice import dice
from medrobust.metrics.iou import iou
from medrobust.pooled import as_published_v1, as_published_v2, dataset_dice, dataset_miou, pooled_dice
from medrobust.worst_case import Counts, confusion, envelope, joint, worst

Integers = NDArray[np.int64]

KINDS = ("even", "imbalanced", "absent")


def instance(seed: int, members: int, cases: int, classes: int, kind: str = "even", scale: int = 1000) -> Counts:
    """Counts such as a segmentation gives: all members share a case's reference.

    "absent": no member ever predicts the last class; some members invent the first, which no reference holds.
    """
    random = np.random.RandomState(seed)  # its stream is frozen, so the numbers of other programs stay comparable
    reference = random.randint(0, scale, (cases, classes)) * (random.rand(cases, classes) < 0.6)
    if kind == "imbalanced":
        reference = reference // 4 ** np.arange(classes)
    invented = random.randint(0, scale // 2, (members, cases, classes)) * (random.rand(members, cases, classes) < 0.5)
    if kind == "absent":
        reference[:, [0, -1]] = 0
        invented[..., -1] = 0
        invented[..., 0] *= random.rand(members, cases) < 0.2
        invented[0, :, 0] = 0
    tp = (reference * random.rand(members, cases, classes)).astype(np.int64)
    return Counts(tp=tp, fp=invented.astype(np.int64), fn=reference - tp)


def every_selection(members: int, cases: int) -> Integers:
    return np.array(list(product(range(members), repeat=cases)))


def sums(counts: Integers, selections: Integers) -> Integers:
    return np.asarray(counts[selections, np.arange(selections.shape[1])].sum(1))


def mean_of_ratios(numerators: list[int], denominators: list[int]) -> float:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True) if b]
    return math.fsum(ratios) / len(ratios) if ratios else 1.0


def brute(numerator: Integers, denominator: Integers) -> float:
    """The lowest mean of pooled ratios among all selections."""
    selections = every_selection(*numerator.shape[:2])
    pairs = zip(sums(numerator, selections).tolist(), sums(denominator, selections).tolist(), strict=True)
    return min(mean_of_ratios(*pair) for pair in pairs)


def value_of(numerator: Integers, denominator: Integers, selection: Integers) -> float:
    top, bottom = sums(numerator, selection[None])[0], sums(denominator, selection[None])[0]
    return mean_of_ratios(top.tolist(), bottom.tolist())


def maps(seed: int, *shape: int, classes: int) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


# Counts


@pytest.mark.parametrize("size", [(7, 6), (4, 5, 3)])
def test_counts_equal_scikit_learn(size: tuple[int, ...]) -> None:
    members = [maps(seed, 2, 1, *size, classes=4) for seed in range(3)]
    reference = maps(9, 2, 1, *size, classes=4)
    reference[1][reference[1] == 2] = -1
    members[0][1][reference[1] == -1] = 77  # no class at all, where nothing is compared
    ignore = maps(5, 2, 1, *size, classes=5) == 0
    matrices = np.stack([confusion(member, reference, 4, ignore=ignore) for member in members])
    counts = Counts.of(matrices)
    assert matrices.dtype == counts.tp.dtype == counts.union.dtype == np.int64
    for member, case in product(range(3), range(2)):
        kept = (reference[case] >= 0) & ~ignore[case]
        pair = reference[case][kept].numpy(), members[member][case][kept].numpy()
        labels: dict[str, Any] = {"labels": range(4), "average": None, "zero_division": 1.0}
        assert (matrices[member, case] == confusion_matrix(*pair, labels=range(4))).all()
        np.testing.assert_allclose(counts.iou()[member, case], jaccard_score(*pair, **labels), rtol=1e-15)
        np.testing.assert_allclose(counts.dice()[member, case], f1_score(*pair, **labels), rtol=1e-15)
        np.testing.assert_allclose(counts.accuracy()[member, case], accuracy_score(*pair), rtol=1e-15)


def test_overlaps_equal_the_metrics_of_single_cases() -> None:
    """Class 4 is in neither map and counts 1, as it does there."""
    prediction, reference = maps(0, 3, 1, 6, 5, classes=4), maps(1, 3, 1, 6, 5, classes=4)
    counts = Counts.of(confusion(prediction, reference, 5)[None])
    np.testing.assert_allclose(counts.dice()[0], dice(prediction, reference, 5), rtol=1e-6)
    np.testing.assert_allclose(counts.iou()[0], iou(prediction, reference, 5), rtol=1e-6)


def test_a_case_without_voxels_to_compare_counts_as_right() -> None:
    reference = torch.full((1, 1, 2, 2), -1)
    counts = Counts.of(confusion(torch.ones(1, 1, 2, 2), reference, 2)[None])
    assert counts.union.sum() == 0
    assert counts.accuracy().tolist() == [[1.0]]
    assert counts.dice().tolist() == [[[1.0, 1.0]]]


def test_unsigned_maps_and_a_value_to_ignore() -> None:
    reference = torch.tensor([0, 1, 255, 1], dtype=torch.uint8).view(1, 1, 2, 2)
    prediction = torch.tensor([1, 1, 1, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    assert confusion(prediction, reference, 2, ignore=reference == 255).tolist() == [[[0, 1], [1, 1]]]


@pytest.mark.parametrize(
    ("prediction", "reference", "ignore", "message"),
    [
        (torch.full((1, 1, 2, 2), 3), torch.zeros(1, 1, 2, 2), None, "0 to 2 in prediction"),
        (torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3), None, "0 to 2, and -1 for voxels"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2), None, "one shape"),
        (torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), None, "fractions"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 1, dtype=torch.bool), "ignore"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), "label == 255"),
    ],
)
def test_maps_that_are_none(
    prediction: torch.Tensor, reference: torch.Tensor, ignore: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        confusion(prediction, reference, 3, ignore=ignore)


@pytest.mark.parametrize("matrices", [np.zeros((2, 3, 4)), np.zeros((1, 2, 3, 4), int), np.zeros((1, 2, 3, 3))])
def test_matrices_that_are_none(matrices: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="integer confusion matrices"):
        Counts.of(matrices)


# One case at a time


def test_worst_is_the_lowest_of_all_selections() -> None:
    values = instance(3, 3, 6, 4).dice()[..., 1:].mean(-1)
    found = worst(values)
    selections = every_selection(3, 6)
    assert found.value.mean() == pytest.approx(values[selections, np.arange(6)].mean(1).min(), abs=1e-15)
    assert (values[found.member, np.arange(6)] == found.value).all()


def test_larger_is_worse_and_ties_go_to_the_first() -> None:
    values = [[1.0, 5.0, 2.0], [3.0, 5.0, math.inf], [3.0, 4.0, math.inf]]
    found = worst(values, larger_is_worse=True)
    assert found.member.tolist() == [1, 0, 1]
    assert found.value.tolist() == [3.0, 5.0, math.inf]
    assert worst(values).member.tolist() == [0, 2, 0]
    assert worst([[0.5], [0.5]]).member.tolist() == [0]


def test_joint_and_envelope_by_hand() -> None:
    values = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.6], [0.5, 0.4]]])
    member = worst(values.mean(-1)).member
    assert member.tolist() == [1, 1]
    assert joint(values, member).tolist() == [[0.2, 0.6], [0.5, 0.4]]
    assert envelope(values).tolist() == [[0.2, 0.1], [0.5, 0.4]]
    assert envelope(values, larger_is_worse=True).tolist() == [[0.9, 0.6], [0.5, 0.5]]


def test_values_that_are_none() -> None:
    with pytest.raises(ValueError, match="got nan"):
        worst([[0.1], [math.nan]])
    with pytest.raises(ValueError, match=r"\(members, cases\)"):
        worst([0.1, 0.2])
    with pytest.raises(ValueError, match="at least one"):
        envelope(np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match="one member index a case"):
        joint(np.zeros((2, 3, 2)), [0, 1])


# Pooled over cases


@pytest.mark.parametrize("seed", range(36))
def test_pooled_dice_is_the_lowest_of_all_selections(seed: int) -> None:
    counts = instance(seed, 3, 6, 4, KINDS[seed % 3])
    for kind in range(4):
        tp, size = counts.tp[..., kind], counts.size[..., kind]
        selections = every_selection(3, 6)
        pairs = zip(sums(tp, selections).tolist(), sums(size, selections).tolist(), strict=True)
        lowest = min(Fraction(2 * a, b) if b else Fraction(1) for a, b in pairs)
        found = pooled_dice(tp, size)
        assert found.value == float(lowest)
        assert value_of(2 * tp[..., None], size[..., None], found.selection) == found.value


def test_empty_sums_count_one() -> None:
    nothing = np.zeros((2, 3), int)
    assert pooled_dice(nothing, nothing).value == 1.0
    # Member 1 invents the class in one case: no overlap at all, and worse than none anywhere.
    found = pooled_dice(nothing, [[0, 0, 0], [0, 7, 0]])
    assert (found.value, found.selection[1]) == (0.0, 1)


def test_the_worst_dice_of_each_case_is_not_the_worst_pooled_dice() -> None:
    """By hand: in the second case member 0 has the lower Dice, and member 1 far more wrong voxels."""
    tp, size = np.array([[50, 1], [50, 20]]), np.array([[100, 10], [100, 180]])
    by_case = worst(2 * tp / size).member
    assert by_case.tolist() == [0, 0]
    assert value_of(2 * tp[..., None], size[..., None], by_case) == 102 / 110
    found = pooled_dice(tp, size)
    assert found.selection.tolist() == [0, 1]
    assert found.value == 140 / 280


# In the last two, descents from the three members end at different values.
@pytest.mark.parametrize("seed", [*range(36), 47, 127])
def test_the_worst_mean_is_found_and_bounded(seed: int) -> None:
    counts = instance(seed, 3, 6, 4, KINDS[seed % 3])
    for found, top, bottom in [
        (dataset_miou(counts.tp, counts.union), counts.tp, counts.union),
        (dataset_dice(counts.tp, counts.size), 2 * counts.tp, counts.size),
    ]:
        lowest = brute(top, bottom)
        assert found.lower_bound <= lowest <= found.value
        assert found.value == pytest.approx(lowest, abs=1e-14)
        assert found.value == value_of(top, bottom, found.selection)


def test_random_starts_leave_a_local_minimum() -> None:
    counts = instance(216, 3, 6, 4, "absent")
    lowest = brute(counts.tp, counts.union)
    alone = dataset_miou(counts.tp, counts.union)
    assert alone.lower_bound <= lowest < alone.value - 0.01
    found = dataset_miou(counts.tp, counts.union, random_starts=20, rng=np.random.default_rng(0))
    assert found.value == pytest.approx(lowest, abs=1e-14)


@pytest.mark.parametrize("seed", [*range(7), 450])
def test_ties_lead_nowhere_wrong(seed: int) -> None:
    """Counts of a few voxels, where many members are worth the same although their counts differ."""
    counts = instance(seed, 3, 6, 2, scale=4)
    found = dataset_miou(counts.tp, counts.union)
    assert found.value == pytest.approx(brute(counts.tp, counts.union), abs=1e-14)


def test_a_start_that_is_given_is_never_left_for_worse() -> None:
    """Started at the best of all selections, descent stays there, where its own starts end higher."""
    counts = instance(216, 3, 6, 4, "absent")
    selections = every_selection(3, 6)
    best = min(selections, key=lambda selection: value_of(counts.tp, counts.union, selection))
    found = dataset_miou(counts.tp, counts.union, starts=[best])
    assert found.selection.tolist() == best.tolist()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_order_of_members_does_not_matter(order: tuple[int, ...]) -> None:
    counts = instance(100, 3, 60, 5)
    found = dataset_miou(counts.tp[list(order)], counts.union[list(order)])
    assert found.value == pytest.approx(dataset_miou(counts.tp, counts.union).value, abs=1e-14)


def test_one_class_has_a_bound_that_is_reached() -> None:
    counts = instance(7, 4, 40, 1)
    found = dataset_dice(counts.tp, counts.size)
    assert found.lower_bound == pooled_dice(counts.tp[..., 0], counts.size[..., 0]).value
    assert found.lower_bound <= found.value < found.lower_bound + 1e-14


def test_classes_there_under_some_selections_only() -> None:
    """One case, by hand. Class 0 has IoU 4/8 under both members, member 1 invents class 1, class 2 is never there."""
    union = np.array([[[8, 0, 0]], [[8, 3, 0]]])
    intersection = np.array([[[4, 0, 0]], [[4, 0, 0]]])
    found = dataset_miou(intersection, union)
    assert (found.value, found.lower_bound, found.selection.tolist()) == (0.25, 0.25, [1])
    # Where class 1 has IoU 1 when it is there, it would raise the mean, and the bound must not count it.
    found = dataset_miou([[[4, 0, 0]], [[4, 3, 0]]], union)
    assert (found.value, found.lower_bound, found.selection.tolist()) == (0.5, 0.5, [0])
    # Member 1 brings two classes, with IoU 1 and 0: the mean stays, yet with the second alone it would be 1/4.
    found = dataset_miou([[[4, 0, 0]], [[4, 3, 0]]], [[[8, 0, 0]], [[8, 3, 3]]])
    assert (found.value, found.lower_bound) == (0.5, 0.25)
    # No class under member 0, which counts 1; under member 1 the invented one counts 0.
    found = dataset_miou(np.zeros((2, 1, 1), int), [[[0]], [[3]]])
    assert (found.value, found.lower_bound, found.selection.tolist()) == (0.0, 0.0, [1])
    nothing = dataset_miou(np.zeros((2, 1, 1), int), np.zeros((2, 1, 1), int))
    assert (nothing.value, nothing.lower_bound) == (1.0, 1.0)


def test_no_voxel_is_lost_past_what_float32_holds() -> None:
    large = 2**24
    assert np.float32(large) + np.float32(1) == large
    matrices = np.array([[[[large + 1, 0], [large - 1, 3]]], [[[large, 0], [large, 3]]]])
    counts = Counts.of(matrices)
    assert counts.tp[0, 0, 0] == large + 1
    found = dataset_miou(counts.tp[..., :1], counts.union[..., :1])
    assert (found.value, found.selection.tolist()) == (0.5, [1])
    # Single voxels in other cases add up.
    tp, size = np.array([[large, *[1] * 9]]), np.array([[4 * large, *[2] * 9]])
    assert pooled_dice(tp, size).value == (2 * large + 18) / (4 * large + 18)


def test_products_of_sums_may_leave_64_bits() -> None:
    counts = instance(1, 3, 6, 1, scale=10**14)
    tp, size = counts.tp[..., 0], counts.size[..., 0]
    selections = every_selection(3, 6)
    pairs = zip(sums(tp, selections).tolist(), sums(size, selections).tolist(), strict=True)
    assert pooled_dice(tp, size).value == float(min(Fraction(2 * a, b) for a, b in pairs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": [[0, 0, 3]]}, "member indices from 0 to 1"),
        ({"starts": [[0, 0]]}, "3 member indices"),
        ({"starts": [[0.0, 0.0, 0.0]]}, "member indices"),
        ({"random_starts": 2}, "rng"),
        ({"union": np.full((2, 3, 2), 5.0)}, "whole counts"),
        ({"union": np.full((2, 3, 3), 5)}, "shapes"),
        ({"union": np.full((2, 3, 2), 0)}, "numerator <= denominator"),
    ],
)
def test_counts_and_starts_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset_miou(**{"intersection": np.full((2, 3, 2), 1), "union": np.full((2, 3, 2), 5), **arguments})


# As published

# Printed by the released code (nmndeep/Robust-Segmentation at f8ff8e6, tools/worse_only.py) for the counts of
# ``instance(seed, 3, cases, 5, kind, scale)``, its members in the order of ``permutations``.
RELEASED = {
    (100, 60, "even", 1000): [
        0.25681091031527414,
        0.25603678634517935,
        0.2603909365518945,
        0.2518265726814326,
        0.2527917594354252,
        0.2772378859341647,
    ],
    (101, 60, "imbalanced", 1000): [
        0.09220271106511004,
        0.07425950568156837,
        0.07073017049301075,
        0.07297635735503628,
        0.07270961716630393,
        0.07820177271650289,
    ],
    # Classes without voxels, and counts past 2^24.
    (105, 30, "absent", 1000): [
        0.23771819718787604,
        0.22389061337192612,
        0.17115380795862578,
        0.16994566659031535,
        0.16999576311979597,
        0.1849706460027947,
    ],
    (104, 20, "even", 3 * 10**8): [
        0.22616331231982142,
        0.21178996015280507,
        0.22526654369288435,
        0.2129987888484092,
        0.24580361038967782,
        0.2171042203455552,
    ],
}


@pytest.mark.parametrize("given", RELEASED)
def test_version_2_equals_the_released_code(given: tuple[int, int, str, int]) -> None:
    seed, cases, kind, scale = given
    counts = instance(seed, 3, cases, 5, kind, scale)
    orders = [list(order) for order in permutations(range(3))]
    found = [as_published_v2(counts.tp[order], counts.union[order]).value for order in orders]
    assert found == RELEASED[given]
    # None of its six orders finds what descent finds in any.
    assert dataset_miou(counts.tp, counts.union).value < min(found)


def test_version_2_is_worth_its_selection_where_every_class_is_there() -> None:
    counts = instance(100, 3, 60, 5)
    found = as_published_v2(counts.tp, counts.union)
    assert found.value == pytest.approx(value_of(counts.tp, counts.union, found.selection), abs=1e-14)


def test_version_2_takes_the_last_member_that_changes_nothing() -> None:
    """By hand: equal members; only the 1e-8 in the candidates' denominators can make the last one win."""
    assert as_published_v2([[[1]], [[1]], [[1]]], [[[2]], [[2]], [[2]]]).selection.tolist() == [2]


def test_version_2_loses_voxels_past_what_float32_holds() -> None:
    intersection, union = [[[2**24 + 1]]], [[[2**25]]]
    assert as_published_v2(intersection, union).value == 0.5
    assert dataset_miou(intersection, union).value == (2**24 + 1) / 2**25


def test_version_2_needs_a_class() -> None:
    with pytest.raises(ValueError, match="use dataset_miou"):
        as_published_v2(np.zeros((2, 3, 2), int), np.zeros((2, 3, 2), int))


def test_version_1_plays_the_lowest_accuracy_of_each_case() -> None:
    """By hand: accuracy picks members 1 and 0, though member 0 has the lower IoU in the first case."""
    accuracy = [[0.9, 0.4], [0.8, 0.4]]
    intersection = [[[9, 1, 0], [4, 2, 0]], [[7, 6, 0], [4, 1, 0]]]
    union = [[[10, 10, 0], [8, 4, 0]], [[12, 8, 0], [8, 4, 0]]]
    found = as_published_v1(accuracy, intersection, union)
    assert found.selection.tolist() == [1, 0]
    assert found.value == (11 / 20 + 8 / 12) / 2  # the third class is nowhere
    assert dataset_miou(intersection, union).value < found.value
