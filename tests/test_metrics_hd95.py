"""HD95 against closed form, brute force and MONAI."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from monai.networks.utils import one_hot
from torch import Tensor

from medrobust.metrics.hd95 import hd95
from medrobust.metrics.hd95_as_published import hd95_as_published

# MONAI 1.6.1 passes its own deprecated argument.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*always_return_as_numpy:FutureWarning", "ignore:.*of class .* is all 0:UserWarning"
)


def blobs(seed: int, size: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros((2, 1, *size), dtype=torch.long)
    for case, k in itertools.product(range(2), (1, 2, 3)):
        low = [int(torch.randint(0, n - 3, (), generator=generator)) for n in size]
        side = [int(torch.randint(2, 6, (), generator=generator)) for _ in size]
        label[(case, 0, *(slice(start, start + width) for start, width in zip(low, side, strict=True)))] = k
    return label


def brute_force(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Every pair of surface voxels; a surface voxel has a face neighbour outside the mask or the image."""

    def surface(mask: np.ndarray) -> np.ndarray:
        inside = {tuple(point) for point in np.argwhere(mask).tolist()}
        steps = [tuple(sign * (axis == k) for k in range(mask.ndim)) for axis in range(mask.ndim) for sign in (-1, 1)]
        rim = [
            p for p in inside if any(tuple(x + s for x, s in zip(p, step, strict=True)) not in inside for step in steps)
        ]
        return np.array(sorted(rim)) * np.array(spacing)

    points_a, points_b = surface(a), surface(b)
    distance = np.linalg.norm(points_a[:, None] - points_b[None], axis=-1)
    return max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))


@pytest.mark.parametrize(("size", "spacing"), [((11, 9), (0.7, 2.0)), ((10, 9, 8), (0.8, 1.0, 3.0))])
def test_equals_brute_force_and_monai(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    prediction, reference = blobs(1, size), blobs(2, size)
    value = hd95(prediction, reference, 4, spacing)
    both = 0
    for case, k in itertools.product(range(2), range(4)):
        a, b = (prediction[case, 0] == k).numpy(), (reference[case, 0] == k).numpy()
        if a.any() and b.any():
            both += 1
            assert value[case, k].item() == pytest.approx(brute_force(a, b, spacing), rel=1e-6)
    assert both >= 6
    monai = compute_hausdorff_distance(
        one_hot(prediction, 4), one_hot(reference, 4), include_background=True, percentile=95, spacing=spacing
    )
    finite = monai.isfinite()
    torch.testing.assert_close(value[finite], monai[finite])


def test_two_voxels_and_the_rules_for_empty_classes() -> None:
    prediction, reference = torch.zeros(2, 1, 1, 10, 10, 10, dtype=torch.long)
    prediction[0, 0, 2, 2, 2], reference[0, 0, 5, 2, 6] = 1, 1
    prediction[0, 0, 0, 0, 0] = 2
    reference[0, 0, 9, 9, 9] = 3
    spacing = (2.0, 1.0, 0.5)
    diagonal = math.hypot(20, 10, 5)
    value = hd95(prediction, reference, 5, spacing)[0, 1:]
    torch.testing.assert_close(value, torch.tensor([math.hypot(6, 0, 2), diagonal, diagonal, 0.0]))


def test_as_published_is_in_voxels_and_drops_what_one_map_lacks() -> None:
    prediction, reference = blobs(1, (10, 9, 8)), blobs(2, (10, 9, 8))
    prediction[0][prediction[0] == 2] = 0
    reference[1][reference[1] == 3] = 0
    monai = compute_hausdorff_distance(
        one_hot(prediction, 5), one_hot(reference, 5), include_background=True, percentile=95
    )
    dropped = torch.where(monai.isfinite(), monai, torch.nan)
    assert dropped.isnan().sum() >= 3
    torch.testing.assert_close(hd95_as_published(prediction, reference, 5), dropped.nanmean(1, keepdim=True))


def test_as_published_gives_the_diagonal_where_no_class_is_shared() -> None:
    zeros = torch.zeros(1, 1, 3, 4, dtype=torch.long)
    assert hd95_as_published(zeros, zeros + 1, 2).item() == pytest.approx(5.0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 0.0), -1.0])
def test_spacing_that_fits_no_volume_is_refused(spacing: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected spacing in mm as one positive number or 3"):
        hd95(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4), 2, spacing)
