"""Goals against closed forms (boxes, balls) and against every pair of voxels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from oracles import VoxelLinear
from torch import Tensor

from medrobust.attacks.fgsm import FGSM
from medrobust.goals import ChangeVolume, Erase, Fill, Goal, Inside, Invent, MoveBoundary, Over, Swap

SPACING = (0.7, 1.0, 2.5)
NAMES = ["background", "liver", "tumour"]


def boxes(size: tuple[int, ...], *filled: tuple[int, tuple[slice, ...]]) -> Tensor:
    """(1, 1, *size) of background with boxes of classes, later ones on top."""
    label = torch.zeros(1, 1, *size, dtype=torch.long)
    for k, box in filled:
        label[(0, 0, *box)] = k
    return label


def distances(size: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """In mm, between all pairs of voxels in the order of the array."""
    points = np.array(list(np.ndindex(*size))) * np.array(spacing)
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def distance_to(mask: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """In mm, from each voxel to the nearest of ``mask``, by trying all."""
    nearest = distances(tuple(mask.shape), spacing)[:, mask.flatten().numpy()].min(1)
    return torch.from_numpy(nearest).reshape(mask.shape)


def radius(size: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """In mm, from the middle of the grid."""
    axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * mm for n, mm in zip(size, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()


labels = st.integers(0, 10_000).map(
    lambda seed: torch.randint(0, 3, (1, 1, 5, 4, 4), generator=torch.Generator().manual_seed(seed))
)

EVERY: list[Goal] = [
    Erase(class_index=2),
    Erase(class_index=2, component="largest", fill="nearest"),
    Invent(class_index=2, radius_mm=2.0, where="random", seed=5),
    Invent(class_index=2, radius_mm=2.0, where=Inside(class_index=1)),
    Invent(class_index=2, radius_mm=2.0, where=(0.9, 0.9, 0.9)),
    MoveBoundary(class_index=2, mm=1.0),
    MoveBoundary(class_index=2, mm=-1.0, fill="nearest"),
    ChangeVolume(class_index=2, percent=30.0, over="background"),
    ChangeVolume(class_index=2, percent=-30.0),
    Swap(first=1, second=2),
]


def organ() -> Tensor:
    """A batch of two cases: a tumour (2) within a liver (1), in different places."""
    one = boxes((12, 11, 9), (1, (slice(2, 9), slice(1, 9), slice(1, 8))), (2, (slice(4, 7), slice(3, 6), slice(3, 6))))
    return torch.cat([one, one.flip(2, 3)])


@pytest.mark.parametrize("goal", EVERY, ids=repr)
class TestEveryGoal:
    def test_a_case_alone_is_the_case_in_a_batch_and_calls_repeat(self, goal: Goal) -> None:
        label = organ()
        target = goal(label, SPACING)
        assert target.shape == label.shape
        assert target.dtype == torch.int64
        assert torch.equal(target, torch.cat([goal(label[:1], SPACING), goal(label[1:], SPACING)]))
        assert torch.equal(target, goal(label, SPACING))

    def test_the_label_is_left_alone_whatever_its_type_and_its_metadata_dropped(self, goal: Goal) -> None:
        label = organ()
        before, wanted = label.clone(), goal(label, SPACING)
        assert torch.equal(label, before)
        for given_label in (label.to(torch.uint8), label.float(), MetaTensor(label)):
            target = goal(given_label, SPACING)
            assert type(target) is Tensor
            assert torch.equal(target, wanted)

    def test_a_picture_is_a_slice_of_its_own(self, goal: Goal) -> None:
        if isinstance(goal, Invent) and isinstance(goal.where, tuple):
            goal = Invent(class_index=2, radius_mm=2.0, where=goal.where[:2])
        target = goal(organ()[..., 4], SPACING[:2])
        assert target.shape == (2, 1, 12, 11)


def test_erase_leaves_the_rest() -> None:
    label = organ()
    assert torch.equal(Erase(class_index=2)(label, SPACING), label.where(label != 2, 0))
    assert torch.equal(Erase(class_index=2, fill="nearest")(label, SPACING), label.where(label != 2, 1))


@pytest.mark.parametrize(
    ("component", "erased"), [("largest", 2), (1, 2), (2, 0), (3, 3), (4, 1), ("smallest", 1), (None, None)]
)
def test_erase_finds_the_lesion(component: Any, erased: int | None) -> None:
    """Four lesions of 4, 1, 6 and 4 voxels; the second 4 is two pairs that touch by a corner."""
    lesions = [
        (slice(0, 2), slice(0, 2)),
        (slice(0, 1), slice(5, 6)),
        (slice(4, 6), slice(0, 3)),
        (slice(4, 6), slice(5, 9)),
    ]
    label = boxes((7, 10), *((1, box) for box in lesions))
    label[0, 0, 4, 7:9], label[0, 0, 5, 5:7] = 0, 0
    wanted = label.clone()
    for box in lesions if erased is None else lesions[erased : erased + 1]:
        wanted[(0, 0, *box)] = 0
    assert torch.equal(Erase(class_index=1, component=component)(label, 1.0), wanted)


@settings(max_examples=25, deadline=None)
@given(labels)
def test_the_nearest_class_fills(label: Tensor) -> None:
    if not (label == 1).any() or (label == 1).all():
        return
    target = Erase(class_index=1, fill="nearest")(label, SPACING)[0, 0]
    before = label[0, 0]
    nearest = distance_to(before != 1, SPACING)
    for k in (0, 2):
        filled = (before == 1) & (target == k)
        if filled.any():
            torch.testing.assert_close(distance_to(before == k, SPACING)[filled], nearest[filled])
    assert not (target == 1).any()
    assert torch.equal(target[before != 1], before[before != 1])


def test_a_ball_holds_the_voxels_within_its_radius_and_covers_what_is_there() -> None:
    label = organ()[:1]
    target = Invent(class_index=3, radius_mm=3.0, where=(0.5, 0.2, 0.999))(label, SPACING)
    ball = torch.zeros(12, 11, 9, dtype=torch.bool)
    for i, j, k in np.ndindex(12, 11, 9):
        ball[i, j, k] = (0.7 * (i - 6)) ** 2 + (j - 2) ** 2 + (2.5 * (k - 8)) ** 2 <= 3.0**2
    assert torch.equal(target[0, 0], label[0, 0].where(~ball, 3))


def test_a_ball_has_the_volume_of_a_ball() -> None:
    target = Invent(class_index=1, radius_mm=6.0, where=(0.5, 0.5, 0.5))(boxes((41, 31, 21)), (0.4, 0.5, 0.8))
    assert target.sum().item() * 0.4 * 0.5 * 0.8 == pytest.approx(4 / 3 * math.pi * 6**3, rel=0.01)


@pytest.mark.parametrize(
    ("box", "spacing", "deepest"),
    [
        ((slice(2, 7), slice(1, 10), slice(3, 6)), (1, 1, 1), (3, 2, 4)),  # equal ones: the first of the array
        ((slice(2, 7), slice(1, 10), slice(3, 6)), (1, 1, 9), (4, 3, 3)),  # thick slices: depth is in the plane
        ((slice(0, 5), slice(0, 5), slice(0, 5)), (1, 1, 1), (2, 2, 2)),  # the image's border bounds it
    ],
)
def test_the_deepest_point_of_a_box(box: tuple[slice, ...], spacing: Any, deepest: tuple[int, ...]) -> None:
    label = boxes((9, 11, 7), (1, box))
    target = Invent(class_index=2, radius_mm=0.1, where=Inside(class_index=1))(label, spacing)
    assert (target[0, 0] == 2).nonzero().tolist() == [list(deepest)]


def test_a_random_ball_is_whole_and_the_seed_decides_where() -> None:
    label = boxes((9, 7, 4))
    whole = Invent(class_index=1, radius_mm=2.5, where=(0.5, 0.5, 0.5))(label, SPACING).sum()
    places = []
    for seed in range(60):
        ball = Invent(class_index=1, radius_mm=2.5, where="random", seed=seed)(label, SPACING)[0, 0]
        assert ball.sum() == whole
        places.append(ball.nonzero().double().mean(0).round().int().tolist())
    # 2.5 mm reach 3, 2 and 1 voxels, which leaves 3, 3 and 2 places on the axes.
    assert [set(axis) for axis in zip(*places, strict=True)] == [{3, 4, 5}, {2, 3, 4}, {1, 2}]
    assert len({tuple(place) for place in places}) > 12


@settings(max_examples=25, deadline=None)
@given(labels, st.sampled_from([0.7, 1.0, 1.4, 2.5, -0.7, -1.0, -2.4]), st.sampled_from(["all", "background"]))
def test_the_boundary_moves_by_a_distance(label: Tensor, mm: float, over: Over) -> None:
    before = label[0, 0]
    mask = before == 1
    if mm > 0:
        taken = (distance_to(mask, SPACING) <= mm + 1e-9) & ((before == 0) if over == "background" else ~mask)
        wanted = before.where(~taken, 1)
    else:
        wanted = before.where(~(mask & (distance_to(~mask, SPACING) <= -mm + 1e-9)), 0)
    goal = MoveBoundary(class_index=1, mm=mm, over=over)
    if torch.equal(wanted, before) or not (wanted == 1).any():
        with pytest.raises(ValueError, match="ask for more" if mm > 0 else "Erase makes it disappear|ask for more"):
            goal(label, SPACING)
    else:
        assert torch.equal(goal(label, SPACING)[0, 0], wanted)


def test_a_box_shrinks_by_the_layers_that_fit_and_not_from_the_border() -> None:
    label = boxes((14, 12, 8), (1, (slice(2, 12), slice(0, 10), slice(1, 7))))
    # 2.5 mm are 3, 2 and 1 voxels; the second axis starts at the border.
    wanted = boxes((14, 12, 8), (1, (slice(5, 9), slice(0, 8), slice(2, 6))))
    assert torch.equal(MoveBoundary(class_index=1, mm=-2.5)(label, SPACING), wanted)


def test_rounding_does_not_keep_a_layer_out() -> None:
    label = boxes((9, 3), (1, (slice(0, 3), slice(0, 3))))
    assert 3 * 0.1 > 0.3
    assert MoveBoundary(class_index=1, mm=0.3)(label, 0.1).sum() == 6 * 3
    assert MoveBoundary(class_index=1, mm=2.1)(label, np.float32(0.7).item()).sum() == 6 * 3


@pytest.mark.parametrize("mm", [3.0, -3.0])
def test_a_ball_grows_and_shrinks_into_a_ball(mm: float) -> None:
    size, spacing = (60, 48, 40), (0.5, 0.6, 0.8)
    label = (radius(size, spacing) <= 8).long()[None, None]
    volume = MoveBoundary(class_index=1, mm=mm)(label, spacing).sum().item() * 0.5 * 0.6 * 0.8
    assert volume == pytest.approx(4 / 3 * math.pi * (8 + mm) ** 3, rel=0.08)


@pytest.mark.parametrize(("fill", "ring"), [("background", 0), ("nearest", 1)])
def test_what_shrinking_frees_is_filled(fill: Fill, ring: int) -> None:
    label = organ()
    target = MoveBoundary(class_index=2, mm=-1.0, fill=fill)(label, 1.0)
    assert (target == 2).flatten(1).sum(1).tolist() == [1, 1]
    assert (target[(label == 2) & (target != 2)] == ring).all()
    assert torch.equal(target[label != 2], label[label != 2])


@settings(max_examples=40, deadline=None)
@given(labels, st.floats(-95, 150).filter(bool), st.sampled_from(["all", "background"]))
def test_the_volume_changes_to_the_nearest_voxel_at_the_boundary(label: Tensor, percent: float, over: Over) -> None:
    before = label[0, 0]
    mask = before == 1
    wanted = mask.sum().item() * (1 + percent / 100)
    assume(abs(wanted % 1 - 0.5) > 1e-6)  # where the last bits decide which voxel count is the nearest
    allowed = mask if percent < 0 else (before == 0) if over == "background" else ~mask
    goal = ChangeVolume(class_index=1, percent=percent, over=over)
    if abs(wanted - mask.sum()) < 0.5 or wanted < 0.5 or wanted - mask.sum() >= allowed.sum() + 0.5:
        with pytest.raises(ValueError, match=r"ask for more|Erase makes|ask for a smaller change"):
            goal(label, SPACING)
        return
    target = goal(label, SPACING)[0, 0]
    assert abs((target == 1).sum().item() - wanted) <= 0.5
    moved = target != before
    assert not (moved & ~allowed).any()
    distance = distance_to(mask if percent > 0 else ~mask, SPACING)
    if not torch.equal(moved, allowed):
        assert distance[moved].max() <= distance[allowed & ~moved].min() + 1e-6


def test_equal_distances_go_in_the_order_of_the_array() -> None:
    label = boxes((5, 5), (1, (slice(1, 4), slice(1, 4))))
    # A ninth of nine voxels is one, and all twelve neighbours by a face are equally near.
    assert (ChangeVolume(class_index=1, percent=100 / 9)(label, 1.0) - label).nonzero().tolist() == [[0, 0, 0, 1]]
    assert (label - ChangeVolume(class_index=1, percent=-100 / 9)(label, 1.0)).nonzero().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("percent", [72.8, -48.8])
def test_a_ball_keeps_its_shape_when_its_volume_changes(percent: float) -> None:
    size, spacing = (60, 48, 40), (0.5, 0.6, 0.8)
    distance = radius(size, spacing)
    target = ChangeVolume(class_index=1, percent=percent)((distance <= 8).long()[None, None], spacing)[0, 0] == 1
    scale = (1 + percent / 100) ** (1 / 3)
    assert scale == pytest.approx(1.2 if percent > 0 else 0.8)
    ball = distance <= 8 * scale
    assert 2 * (target & ball).sum() / (target.sum() + ball.sum()) > 0.97


def test_swap_is_its_own_inverse() -> None:
    label, goal = organ(), Swap(first=1, second=2)
    target = goal(label, 1.0)
    for a, b in itertools.product(range(3), repeat=2):
        assert ((label == a) & (target == b)).any() == ((a, b) in {(0, 0), (1, 2), (2, 1)})
    assert torch.equal(goal(target, 1.0), label)


def test_a_targeted_attack_makes_the_model_see_the_target() -> None:
    label = organ().clamp(max=1)
    image = 0.5 + 0.01 * (2 * label - 1).float()
    target = MoveBoundary(class_index=1, mm=-1.0)(label, SPACING)
    model = VoxelLinear()
    image_adv = FGSM(eps=0.02, targeted=True)(model, image, target)
    assert torch.equal(model(image).argmax(1, keepdim=True), label)
    assert torch.equal(model(image_adv).argmax(1, keepdim=True), target)


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Erase(class_index=1), "erase liver, background in its place"),
        (
            Erase(class_index=2, component="largest", fill="nearest"),
            "erase the largest component of tumour, the nearest other class in its place",
        ),
        (
            Erase(class_index=2, component=3),
            "erase the component of tumour of rank 3 by size, background in its place",
        ),
        (
            Invent(class_index=2, radius_mm=5, where=Inside(class_index=1)),
            "invent a ball of tumour of radius 5 mm at the deepest point of liver",
        ),
        (
            Invent(class_index=2, radius_mm=5, where="random", seed=7),
            "invent a ball of tumour of radius 5 mm at a random place (seed 7)",
        ),
        (
            Invent(class_index=2, radius_mm=2.5, where=(0.5, 0.25)),
            "invent a ball of tumour of radius 2.5 mm at (0.5, 0.25) of the image's extent",
        ),
        (MoveBoundary(class_index=1, mm=3), "grow liver by 3 mm, over every other class"),
        (MoveBoundary(class_index=1, mm=-3), "shrink liver by 3 mm, background in its place"),
        (
            ChangeVolume(class_index=1, percent=20, over="background"),
            "make liver 20 % larger, over background only",
        ),
        (
            ChangeVolume(class_index=1, percent=-20, fill="nearest"),
            "make liver 20 % smaller, the nearest other class in its place",
        ),
        (Swap(first=1, second=2), "swap liver and tumour"),
    ],
    ids=str,
)
def test_a_goal_says_in_words_what_it_does(goal: Goal, words: str) -> None:
    assert goal.describe(NAMES) == words
    with pytest.raises(ValueError, match=r"expected a name for class \d, got 1"):
        goal.describe(["background"])


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Erase, {"class_index": 0}, "class_index as a whole number from 1, got 0: class 0 is the background"),
        (Erase, {"class_index": True}, "whole number from 1, got True"),
        (Erase, {"class_index": 1, "component": 0}, "or a rank from 1, got 0"),
        (Erase, {"class_index": 1, "component": "middle"}, "'largest', 'smallest' or a rank"),
        (Erase, {"class_index": 1, "fill": "water"}, "fill among background, nearest, got 'water'"),
        (Inside, {"class_index": 0}, "whole number from 1"),
        (Invent, {"class_index": 0, "radius_mm": 1, "where": (0.5, 0.5)}, "whole number from 1"),
        (Invent, {"class_index": 1, "radius_mm": 0, "where": (0.5, 0.5)}, "radius_mm above 0, got 0"),
        (Invent, {"class_index": 1, "radius_mm": math.nan, "where": (0.5, 0.5)}, "radius_mm above 0, got nan"),
        (Invent, {"class_index": 1, "radius_mm": 1, "where": "random"}, "a seed with where='random'"),
        (Invent, {"class_index": 1, "radius_mm": 1, "where": (0.5, 0.5), "seed": 1}, "and only then, got 1"),
        (Invent, {"class_index": 1, "radius_mm": 1, "where": (0.5, 1.5)}, r"fractions in \[0, 1\]"),
        (Invent, {"class_index": 1, "radius_mm": 1, "where": "middle"}, "where as 'random'"),
        (MoveBoundary, {"class_index": 0, "mm": 1}, "whole number from 1"),
        (MoveBoundary, {"class_index": 1, "mm": 0}, "mm above 0 to grow or below 0"),
        (MoveBoundary, {"class_index": 1, "mm": math.inf}, "mm above 0 to grow or below 0"),
        (MoveBoundary, {"class_index": 1, "mm": 1, "over": "liver"}, "over among all, background, got 'liver'"),
        (ChangeVolume, {"class_index": 1, "percent": -100}, "percent above -100 and not 0, got -100: Erase"),
        (ChangeVolume, {"class_index": 1, "percent": 0}, "percent above -100 and not 0"),
        (ChangeVolume, {"class_index": 1, "percent": math.nan}, "percent above -100 and not 0"),
        (Swap, {"first": 1, "second": 1}, "two classes to swap, got 1 twice"),
        (Swap, {"first": 1, "second": 0}, "second as a whole number from 1"),
    ],
)
def test_nonsense_settings_are_refused(kind: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Erase(class_index=3), r"expected class 3 in the label, got 0, 1, 2: leave this case out \(case 0"),
        (Erase(class_index=2, component=2), "rank 1 to 1 of class 2, got 2"),
        (Invent(class_index=3, radius_mm=1, where=Inside(class_index=4)), "class 4 in the label"),
        (Invent(class_index=3, radius_mm=9, where="random", seed=0), "room for a ball of 9 mm"),
        (Invent(class_index=3, radius_mm=9, where=(0.5, 0.5)), "where with 3 fractions"),
        (Invent(class_index=2, radius_mm=0.1, where=Inside(class_index=2)), "ask for more"),
        (MoveBoundary(class_index=2, mm=0.5), "ask for more"),
        (MoveBoundary(class_index=2, mm=1.0, over="background"), "ask for more"),
        (MoveBoundary(class_index=2, mm=-9), "Erase makes it disappear"),
        (ChangeVolume(class_index=1, percent=900), "expected room for 3285 voxels more, got 823"),
        (ChangeVolume(class_index=2, percent=-99), "Erase makes it disappear"),
        (Swap(first=1, second=3), "class 3 in the label"),
    ],
    ids=repr,
)
def test_a_label_that_does_not_allow_the_goal_is_refused(goal: Goal, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        goal(organ(), 1.0)


def test_the_case_at_fault_is_named() -> None:
    label = organ()
    label[1][label[1] == 2] = 1
    with pytest.raises(ValueError, match=r"class 2 in the label, got 0, 1: .* \(case 1 of the batch"):
        Erase(class_index=2)(label, 1.0)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Erase(class_index=1, fill="nearest"), "another class to fill with"),
        (MoveBoundary(class_index=1, mm=1), "to have a boundary"),
        (ChangeVolume(class_index=1, percent=-10), "to have a boundary"),
    ],
    ids=repr,
)
def test_a_class_that_fills_the_image_has_no_neighbour(goal: Goal, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        goal(torch.ones(1, 1, 4, 4), 1.0)
    label = torch.ones(1, 1, 4, 4)
    label[..., 2:] = -1
    with pytest.raises(ValueError, match=message):
        goal(label, 1.0)


STRIPES = [1, 1, 1, -1, -1, 0, 0, 2]


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Erase(class_index=1), [0, 0, 0, -1, -1, 0, 0, 2]),
        (Erase(class_index=1, fill="nearest"), [0, 0, 0, -1, -1, 0, 0, 2]),
        (Invent(class_index=2, radius_mm=2.3, where=(0.5, 0.625)), [1, 1, 1, -1, -1, 2, 2, 2]),
        # Column 5 is the first that has a say beside class 1, 3 mm from its last one.
        (MoveBoundary(class_index=1, mm=3), [1, 1, 1, -1, -1, 1, 0, 2]),
        (MoveBoundary(class_index=1, mm=3, over="background"), [1, 1, 1, -1, -1, 1, 0, 2]),
        (MoveBoundary(class_index=1, mm=-3), [1, 1, 0, -1, -1, 0, 0, 2]),
        (MoveBoundary(class_index=1, mm=-3, fill="nearest"), [1, 1, 0, -1, -1, 0, 0, 2]),
        (ChangeVolume(class_index=1, percent=100 / 3), [1, 1, 1, -1, -1, 1, 0, 2]),
        (ChangeVolume(class_index=1, percent=100), [1, 1, 1, -1, -1, 1, 1, 1]),
        (ChangeVolume(class_index=1, percent=-100 / 3), [1, 1, 0, -1, -1, 0, 0, 2]),
        (Swap(first=1, second=2), [2, 2, 2, -1, -1, 0, 0, 1]),
    ],
    ids=repr,
)
def test_voxels_of_minus_one_have_no_say_and_keep_it(goal: Goal, expected: list[int]) -> None:
    label = torch.tensor(STRIPES).expand(1, 1, 3, 8)
    target = goal(label, 1.0)
    assert torch.equal(target, torch.tensor(expected).expand(1, 1, 3, 8))


@pytest.mark.parametrize("goal", [MoveBoundary(class_index=1, mm=2), MoveBoundary(class_index=1, mm=-2)], ids=repr)
def test_what_has_no_say_is_nobodys_boundary(goal: Goal) -> None:
    with pytest.raises(ValueError, match="ask for more"):
        goal(torch.tensor(STRIPES).expand(1, 1, 3, 8), 1.0)


@pytest.mark.parametrize(
    ("label", "spacing", "message"),
    [
        (torch.ones(1, 2, 4, 4), 1.0, r"expected a label \(B, 1, H, W\)"),
        (torch.ones(1, 4, 4), 1.0, r"expected a label \(B, 1, H, W\)"),
        (torch.full((1, 1, 4, 4), 0.5), 1.0, "whole classes from 0"),
        (torch.full((1, 1, 4, 4), math.nan), 1.0, "whole classes from 0"),
        (torch.full((1, 1, 4, 4), -2), 1.0, "whole classes from 0"),
        (torch.full((1, 1, 4, 4), -1), 1.0, "class 1 in the label, got none"),
        (torch.ones(1, 1, 4, 4), (1.0, 1.0, 1.0), "one positive number or 2 of them"),
        (torch.ones(1, 1, 4, 4), (1.0, 0.0), "one positive number or 2 of them"),
        (torch.ones(1, 1, 4, 4), -1.0, "one positive number or 2 of them"),
    ],
)
def test_what_is_no_label_or_no_spacing_is_refused(label: Tensor, spacing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Erase(class_index=1)(label, spacing)
