"""Linear interpolation of one part of a grid at the voxels of a part of another: for ``regrid`` and ``resample``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 1 << 25
"""Interpolated values at a time; 128 MB in float32."""
Shape = tuple[int, ...]


def mapping(to: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Voxels of the grid with affine ``source`` as voxels of the grid with affine ``to``."""
    return np.linalg.inv(np.asarray(to, dtype=np.float64)) @ np.asarray(source, dtype=np.float64)


def as_integers(matrix: np.ndarray, shape: Shape) -> np.ndarray | None:
    """``matrix`` with whole numbers, if it takes every voxel to a voxel (to a hundredth of one)."""
    whole = np.round(matrix)
    close = float((np.abs(matrix - whole)[:3] @ np.array([*shape, 1])).max()) < 0.01
    axes = np.abs(whole[:3, :3])
    if close and (axes.sum(0) == 1).all() and (axes.sum(1) == 1).all():
        return whole.astype(np.int64)
    return None


def portions(shape: Shape, along: int, values: int, backwards: bool = False) -> list[range]:
    """Parts of a volume along an axis that hold about ``BUDGET`` values, ``values`` for each voxel."""
    plane = int(np.prod(shape, dtype=np.int64)) // shape[along] * values
    step = max(1, BUDGET // plane)
    found = [range(start, min(start + step, shape[along])) for start in range(0, shape[along], step)]
    return found[::-1] if backwards else found


def reach(matrix: np.ndarray, axis: int, ranges: list[range]) -> tuple[float, float]:
    """Smallest and largest coordinate on ``axis`` of the other grid that a part of this one has."""
    ends = [sorted(matrix[axis, one] * end for end in (part.start, part.stop - 1)) for one, part in enumerate(ranges)]
    return (
        float(sum(pair[0] for pair in ends) + matrix[axis, 3]),
        float(sum(pair[1] for pair in ends) + matrix[axis, 3]),
    )


def ranges_of(shape: Shape, along: int, part: range) -> list[range]:
    """A part of a volume, whole in all axes but one."""
    return [part if one == along else range(side) for one, side in enumerate(shape)]


def sample(
    values: Tensor, matrix: np.ndarray, ranges: list[range], axis: int, first: int, size: Shape
) -> tuple[Tensor, Tensor]:
    """``values`` (C, *) at the voxels ``ranges``, in their own precision, continued beyond the border.

    Args:
        matrix: voxels of ``ranges`` -> voxels of the grid of ``size``.
        axis, first: ``values`` are the planes of that grid's ``axis`` from ``first`` on.

    Returns:
        (C, *ranges), and whether a voxel lies a whole voxel or more outside that grid.
    """
    grid = torch.empty(*(len(one) for one in ranges), 3, dtype=values.dtype)
    outside = torch.zeros(*(len(one) for one in ranges), dtype=torch.bool)
    steps = [torch.tensor(one, dtype=torch.float64) for one in ranges]
    for net in range(3):
        place = torch.full((1, 1, 1), float(matrix[net, 3]), dtype=torch.float64)
        for one, step in enumerate(steps):
            if matrix[net, one] != 0:
                place = place + (step * float(matrix[net, one])).reshape([-1 if dim == one else 1 for dim in range(3)])
        outside |= (place <= -1) | (place >= size[net])
        length = values.shape[net + 1]
        place = place - (first if net == axis else 0)
        # grid_sample counts from -1 to 1, its axes the other way round.
        grid[..., 2 - net] = place * (2 / (length - 1)) - 1 if length > 1 else place * 0
    sampled = F.grid_sample(values[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)
    return sampled[0], outside
