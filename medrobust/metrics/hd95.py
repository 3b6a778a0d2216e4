"""The 95th percentile of the Hausdorff distance of each class, in mm."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from torch import Tensor

from medrobust.metrics._class_maps import class_maps

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "mm"
INPUTS = "classes"


def hd95(prediction: Tensor, reference: Tensor, num_classes: int, spacing: float | Sequence[float] = 1.0) -> Tensor:
    """HD95 of each class; class maps ``(B, 1, *S)`` -> ``(B, K)`` in mm, background in column 0.

    ``spacing`` is the voxel size in mm: one number, or one for each spatial axis. The larger of the two directed 95th
    percentiles between surfaces, equal to MONAI's. A class absent from both counts 0; absent from one, the diagonal
    of the image in mm.
    """
    device, dims = prediction.device, prediction.ndim - 2
    predictions, references = class_maps(prediction.cpu(), reference.cpu(), num_classes)
    sizes = [float(spacing)] * dims if isinstance(spacing, (int, float)) else [float(size) for size in spacing]
    if len(sizes) != dims or not all(size > 0 for size in sizes):
        raise ValueError(f"expected spacing in mm as one positive number or {dims} of them, got {spacing!r}")
    diagonal = math.hypot(*(n * size for n, size in zip(prediction.shape[2:], sizes, strict=True)))
    distance = [
        [_distance(predicted == k, referenced == k, sizes, diagonal) for k in range(num_classes)]
        for predicted, referenced in zip(predictions[:, 0].numpy(), references[:, 0].numpy(), strict=True)
    ]
    return torch.tensor(distance, dtype=torch.float32, device=device)


def _distance(a: np.ndarray, b: np.ndarray, spacing: Sequence[float], diagonal: float) -> float:
    if not a.any() or not b.any():
        return diagonal if a.any() or b.any() else 0.0
    # One organ is a small part of a volume. MONAI does the same, but copies the whole volume first, and its release
    # 1.6.1 warns of its own deprecated argument on every call.
    (box,) = find_objects((a | b).astype(np.uint8))
    a, b = _surface(a[box]), _surface(b[box])
    a_to_b = distance_transform_edt(~b, sampling=spacing)[a]
    b_to_a = distance_transform_edt(~a, sampling=spacing)[b]
    return float(max(np.percentile(a_to_b, 95), np.percentile(b_to_a, 95)))


def _surface(mask: np.ndarray) -> np.ndarray:
    # Outside the image counts as another class, so a mask cut by the border has its surface there.
    return mask & ~binary_erosion(mask)
