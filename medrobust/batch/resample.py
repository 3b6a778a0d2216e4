"""The two transforms that change the grid, ``Orientationd`` and ``Spacingd``, at the memory of one slab.

MONAI's resampling holds the volume in float64 and three coordinates a voxel: 7 GB for 512 × 512 × 1500 voxels, five
times the volume. Here MONAI says where the new grid lies (its lazy mode), and the voxels are interpolated slab by slab,
with the same arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientationd, Spacingd
from monai.utils import GridSampleMode, GridSamplePadMode
from torch import Tensor

from medrobust.batch.sampling import as_integers, mapping, portions, ranges_of, reach, sample


def is_known(transform: Any, key: str = "image") -> bool:
    """Whether :func:`regridded` does what ``transform`` does to the key."""
    if isinstance(transform, Orientationd):
        return True
    if not isinstance(transform, Spacingd) or key not in transform.keys:
        return False
    at = transform.keys.index(key)
    usual = {
        "mode": GridSampleMode.BILINEAR,
        "padding_mode": GridSamplePadMode.BORDER,
        "align_corners": False,
        "dtype": np.float64,
        "scale_extent": False,
    }
    return all(getattr(transform, name)[at] == value for name, value in usual.items())


def regridded(image: MetaTensor, transform: Any) -> MetaTensor:
    """``transform`` of an image (C, X, Y, Z); one for which :func:`is_known` is true."""
    planned: MetaTensor = transform({"image": image}, lazy=True)["image"]
    affine = np.asarray(planned.peek_pending_affine(), dtype=np.float64)
    shape = tuple(int(side) for side in planned.peek_pending_shape())
    found = resample(image.as_subclass(Tensor), np.asarray(image.affine), shape, affine)
    return MetaTensor(found, affine=torch.tensor(affine), meta={"space": image.meta.get("space")})


def resample(volume: Tensor, source: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> Tensor:
    """(C, X, Y, Z) with affine ``source`` on the grid of ``shape`` and ``affine``, linearly; float32."""
    matrix = mapping(source, affine)
    size = tuple(volume.shape[1:])
    exact = as_integers(matrix, shape)
    if exact is not None and (turned := _turned(volume, exact, shape)) is not None:
        return turned
    found = torch.empty(volume.shape[0], *shape)
    axis = int(np.argmax(size))
    along = int(np.abs(matrix[axis, :3]).argmax())
    # A part of the source in float64 stands beside the result's; count it as well.
    share = int(np.ceil(np.prod(size, dtype=np.float64) / np.prod(shape, dtype=np.float64)))
    for planes in portions(shape, along, 2 * (volume.shape[0] * (1 + share) + 4)):
        ranges = ranges_of(shape, along, planes)
        low, high = reach(matrix, axis, ranges)
        first, last = (int(np.clip(edge, 0, size[axis] - 1)) for edge in (np.floor(low), np.ceil(high)))
        part = volume.narrow(axis + 1, first, last - first + 1).double()
        found.narrow(along + 1, planes.start, len(planes)).copy_(sample(part, matrix, ranges, axis, first, size)[0])
    return found


def _turned(volume: Tensor, matrix: np.ndarray, shape: tuple[int, ...]) -> Tensor | None:
    """Axes permuted and turned round, if that is all there is to do."""
    order = [int(np.abs(matrix[:3, one]).argmax()) for one in range(3)]
    signs = [int(matrix[source, one]) for one, source in enumerate(order)]
    begins = [0 if sign > 0 else side - 1 for sign, side in zip(signs, shape, strict=True)]
    if [int(matrix[source, 3]) for source in order] != begins or tuple(volume.shape[1 + o] for o in order) != shape:
        return None
    turned = volume.permute(0, *(source + 1 for source in order))
    backwards = [one + 1 for one, sign in enumerate(signs) if sign < 0]
    return turned.flip(backwards) if backwards else turned.contiguous()
