"""Normalised surface Dice: the share of the two surfaces that agree within a tolerance (Nikolov et al., 1809.04430)."""

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor

from medrobust.metrics._class_maps import class_maps

IDEAL = 1.0
HIGHER_IS_BETTER = True
UNIT = ""
INPUTS = "classes"

ROUNDING = 1e-5
"""Relative; a spacing of 0.7 comes from a file as 0.69999999, and that must not decide what lies within 2.1 mm."""


def nsd(
    prediction: Tensor,
    reference: Tensor,
    num_classes: int,
    spacing: float | Sequence[float] = 1.0,
    *,
    tolerance_mm: float | Sequence[float] = 1.0,
) -> Tensor:
    """NSD of each class; class maps ``(B, 1, *S)``, 2-D or 3-D -> ``(B, K)`` in [0, 1], background in column 0.

    ``spacing`` is the voxel size in mm: one number, or one for each spatial axis. ``tolerance_mm`` is one number for
    all classes, or one for each, and belongs to the range too. A surface runs between voxels and is weighed by its
    area (in 2-D its length), so that thick slices count as much as they span; this is MONAI's with
    ``use_subvoxels=True``. The border of the image cuts a class off and is surface. A class absent from both counts 1,
    from one of them 0.
    """
    device, dims = prediction.device, prediction.ndim - 2
    predictions, references = class_maps(prediction.cpu(), reference.cpu(), num_classes)
    if dims not in (2, 3):
        raise ValueError(f"expected class maps (B, 1, H, W) or (B, 1, H, W, D), got shape {tuple(prediction.shape)}")
    sizes = [float(spacing)] * dims if isinstance(spacing, (int, float)) else [float(size) for size in spacing]
    if len(sizes) != dims or not all(size > 0 for size in sizes):
        raise ValueError(f"expected spacing in mm as one positive number or {dims} of them, got {spacing!r}")
    same = [tolerance_mm] * num_classes if isinstance(tolerance_mm, (int, float)) else tolerance_mm
    tolerances = [float(value) for value in same]
    if len(tolerances) != num_classes or not all(0 <= value < np.inf for value in tolerances):
        raise ValueError(
            f"expected tolerance_mm as one number of at least 0 or one for each of {num_classes} classes, "
            f"got {tolerance_mm!r}"
        )
    value = [
        [_nsd(predicted == k, referenced == k, sizes, tolerances[k]) for k in range(num_classes)]
        for predicted, referenced in zip(predictions[:, 0].numpy(), references[:, 0].numpy(), strict=True)
    ]
    return torch.tensor(value, dtype=torch.float32, device=device)


def _nsd(a: np.ndarray, b: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    if not a.any() or not b.any():
        return 0.0 if a.any() or b.any() else 1.0
    (box,) = find_objects((a | b).astype(np.uint8))
    pair = [torch.from_numpy(np.pad(mask[box], 1)) for mask in (a, b)]
    # On the corners where voxels meet: which of them the surface passes, and its area there.
    on_a, on_b, area_a, area_b = (part.numpy() for part in get_mask_edges(*pair, crop=False, spacing=spacing))
    agreed = area = 0.0
    for here, there, areas in ((on_a, on_b, area_a), (on_b, on_a, area_b)):
        near = distance_transform_edt(~there, sampling=spacing)[here] <= tolerance * (1 + ROUNDING)
        agreed += areas[here][near].sum(dtype=np.float64)
        area += areas[here].sum(dtype=np.float64)
    return float(agreed / area)
