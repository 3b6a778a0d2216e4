"""NSD against closed forms, every pair of surface points, and MONAI."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from monai.networks.utils import one_hot
from torch import Tensor

from medrobust.metrics.nsd import nsd


def patch_area(block: np.ndarray, spacing: Sequence[float]) -> float:
    """Surface within the cell between neighbouring voxel centres, through the middles of the cell's cut edges.

    In 2-D all cases; in 3-D those that boxes apart from each other have: a corner, an edge or a face of the cell.
    """
    half = np.array(spacing) / 2
    inside = int(block.sum())
    if block.ndim == 2:
        if inside in (1, 3):
            return float(np.hypot(*half))
        split = [axis for axis in range(2) if block.all(1 - axis).any()]
        return spacing[1 - split[0]] if split else 2 * float(np.hypot(*half))
    if inside == 1:
        sides = [half[1] * half[2], half[0] * half[2], half[0] * half[1]]
        return float(np.linalg.norm(sides)) / 2
    corners = np.argwhere(block)
    along = [axis for axis in range(3) if len(set(corners[:, axis])) == 2]
    assert inside == 2 ** len(along), "no corner, edge or face"
    across = [axis for axis in range(3) if axis not in along]
    if len(across) == 2:
        return spacing[along[0]] * float(np.hypot(*half[across]))
    return spacing[along[0]] * spacing[along[1]]


def surface(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, dims) in mm where voxels meet and the surface passes, and its area (N,) there."""
    padded = np.pad(mask, 1)
    points, areas = [], []
    for corner in np.ndindex(*(n - 1 for n in padded.shape)):
        block = padded[tuple(slice(x, x + 2) for x in corner)]
        if block.any() and not block.all():
            points.append(np.array(corner) * spacing)
            areas.append(patch_area(block, spacing))
    return np.array(points), np.array(areas)


def brute_force(a: np.ndarray, b: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    (points_a, area_a), (points_b, area_b) = surface(a, spacing), surface(b, spacing)
    distance = np.linalg.norm(points_a[:, None] - points_b[None], axis=-1)
    near_a, near_b = (distance.min(axis) <= tolerance + 1e-9 for axis in (1, 0))
    return float((area_a[near_a].sum() + area_b[near_b].sum()) / (area_a.sum() + area_b.sum()))


def two_boxes(seed: int) -> Tensor:
    """(1, 1, 12, 9, 8) with a box of class 1 in each half of the first axis, apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(1, 1, 12, 9, 8, dtype=torch.long)
    for start in (0, 7):
        low = [int(torch.randint(0, 3, (), generator=generator)) for _ in range(3)]
        side = [int(torch.randint(2, limit, (), generator=generator)) for limit in (4, 6, 6)]
        box = tuple(slice(x, x + n) for x, n in zip((start + low[0], *low[1:]), side, strict=True))
        label[(0, 0, *box)] = 1
    return label


@pytest.mark.parametrize("tolerance", [0.0, 0.8, 2.0, 3.1])
def test_equals_brute_force_on_boxes(tolerance: float) -> None:
    spacing, values = (0.8, 1.0, 2.0), []
    for seed in range(6):
        a, b = two_boxes(seed), two_boxes(seed + 100)
        values.append(nsd(a, b, 2, spacing, tolerance_mm=tolerance)[0, 1].item())
        wanted = brute_force(a[0, 0].bool().numpy(), b[0, 0].bool().numpy(), spacing, tolerance)
        assert values[-1] == pytest.approx(wanted, rel=1e-5)
    assert len(set(values)) >= 5 or tolerance == 3.1


@pytest.mark.parametrize("tolerance", [0.0, 0.7, 1.6, 2.0])
def test_equals_brute_force_on_any_picture(tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    spacing = (0.7, 1.6)
    for size in ((9, 8), (20, 13)):
        a, b = torch.randint(0, 3, (2, 2, 1, *size), generator=generator)
        value = nsd(a, b, 3, spacing, tolerance_mm=tolerance)
        for case, k in itertools.product(range(2), range(3)):
            wanted = brute_force((a[case, 0] == k).numpy(), (b[case, 0] == k).numpy(), spacing, tolerance)
            assert value[case, k].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_equals_monai_with_its_areas_on_any_volume() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.rand(2, 2, 1, 11, 10, 9, generator=generator) < 0.05).long()
    spacing, tolerance = (0.8, 1.1, 2.5), 0.9
    monai = compute_surface_dice(
        one_hot(a, 2), one_hot(b, 2), [tolerance] * 2, include_background=True, spacing=spacing, use_subvoxels=True
    )
    value = nsd(a, b, 2, spacing, tolerance_mm=tolerance)
    torch.testing.assert_close(value, monai, rtol=1e-5, atol=0)
    assert ((value > 0.1) & (value < 0.9)).any()


def test_a_slab_that_moved_counts_by_area_and_distance() -> None:
    """Faces across thick slices count by their area; a face is found or not by the shift in mm."""
    spacing = (1.0, 1.0, 5.0)
    a, b = torch.zeros(2, 1, 1, 30, 30, 12, dtype=torch.long)
    a[0, 0, 5:25, 5:25, 3:8] = b[0, 0, 5:25, 5:25, 3:9] = 1
    value = [nsd(a, b, 2, spacing, tolerance_mm=tolerance)[0, 1].item() for tolerance in (0.9, 4.9, 5.0)]
    assert value[0] < value[1] < value[2] == 1.0
    # Off are the top face of a, but not its rim, which lies on the wall of b; and the top face and the rim of b.
    face = 19 * 19
    rim = 4 * 19 * math.hypot(0.5, 2.5) + 4 * math.sqrt(0.25**2 + 2 * 1.25**2) / 2
    wall = (4 * 19 + 4 * math.hypot(0.5, 0.5)) * 5.0
    assert value[0] == pytest.approx(1 - (2 * face + rim) / (4 * (face + rim) + (4 + 5) * wall), rel=1e-5)


def test_two_balls_within_and_beyond_their_difference() -> None:
    axis = torch.arange(40) - 19.5
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    a, b = (square <= 12**2).long()[None, None], (square <= 15**2).long()[None, None]
    # Either surface runs within half a voxel's diagonal of its sphere.
    diagonal = 0.5 * math.sqrt(3)
    assert nsd(a, b, 2, 0.5, tolerance_mm=1.5 + diagonal)[0, 1] == 1
    assert nsd(a, b, 2, 0.5, tolerance_mm=1.5 - diagonal)[0, 1] == 0


def test_each_class_has_its_tolerance_and_rounding_does_not_decide() -> None:
    a, b = torch.zeros(2, 1, 1, 20, 20, dtype=torch.long)
    a[0, 0, 2:6, 2:6] = b[0, 0, 5:9, 2:6] = 1
    a[0, 0, 2:6, 12:16] = b[0, 0, 5:9, 12:16] = 2
    assert 3 * 0.1 > 0.3
    value = nsd(a, b, 3, 0.1, tolerance_mm=[1, 0.3, 0.2])
    assert value[0, 1] == 1
    assert 0 < value[0, 2] < 1


def test_rules_for_empty_classes_and_classes_at_the_border() -> None:
    a, b = torch.zeros(2, 1, 1, 6, 6, 6, dtype=torch.long)
    a[0, 0, 0, 0, 0], b[0, 0, 5, 5, 5] = 1, 2
    value = nsd(a, b, 4)
    assert value[0, 1:].tolist() == [0.0, 0.0, 1.0]
    full = torch.ones(1, 1, 4, 4, 4)
    assert nsd(full, full, 2).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 0.0), -1.0])
def test_spacing_that_fits_no_volume_is_refused(spacing: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected spacing in mm as one positive number or 3"):
        nsd(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4), 2, spacing)


@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan, (1.0, 1.0, 1.0)])
def test_a_tolerance_that_is_none_is_refused(tolerance: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="tolerance_mm as one number of at least 0 or one for each of 2"):
        nsd(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), 2, tolerance_mm=tolerance)


def test_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected class maps \(B, 1, H, W\)"):
        nsd(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), 2)
