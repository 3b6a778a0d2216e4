"""From logits on the network's grid to labels on the scan's own grid, slab by slab.

Where both grids have the same voxels (other axes, cropped, padded) labels are carried over exactly. Else logits are
interpolated linearly at each of the scan's voxels and the largest wins, as MONAI's ``Invertd`` does with
``nearest_interp: false``. What the preprocessing cropped away is background.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medrobust.batch.faults import Exit, RunError
from medrobust.batch.sampling import as_integers, mapping, portions, ranges_of, reach, sample
from medrobust.batch.stitch import Slab


def regrid(
    slabs: Iterator[Slab],
    axis: int,
    *,
    size: tuple[int, ...],
    affine: np.ndarray,
    scan_shape: tuple[int, int, int],
    scan_affine: np.ndarray,
    classes: int,
) -> np.ndarray:
    """Labels (X, Y, Z) of the scan, in the smallest unsigned type that holds ``classes``.

    Args:
        slabs: logits in the order of ``axis``; one channel is a sigmoid's, more are a softmax's.
        size, affine: of the network's grid.
        scan_shape, scan_affine: of the scan.

    Raises:
        RunError: the network has another number of classes.
    """
    to_net = mapping(affine, scan_affine)
    exact = as_integers(to_net, scan_shape)
    labels = np.zeros(scan_shape, dtype=np.uint8 if classes <= 256 else np.uint16, order="F")
    along = int(np.abs(to_net[axis, :3]).argmax())
    held = _Held(slabs, axis, size[axis])
    if held.channels != classes and (held.channels, classes) != (1, 2):
        raise RunError(Exit.USAGE, f"expected logits of {classes} classes, as the bundle names, got {held.channels}")
    for planes in portions(scan_shape, along, held.channels + 3, bool(to_net[axis, along] < 0)):
        ranges = ranges_of(scan_shape, along, planes)
        low, high = reach(to_net, axis, ranges)
        if high <= -1 or low >= size[axis]:
            continue
        first, last = int(np.clip(np.floor(low), 0, size[axis] - 1)), int(np.clip(np.ceil(high), 0, size[axis] - 1))
        logits = held.between(first, last)
        found = (_carried if exact is not None else _interpolated)(
            logits, exact if exact is not None else to_net, ranges, axis, first, size
        )
        where: list[Any] = [slice(None)] * 3
        where[along] = slice(planes.start, planes.stop)
        labels[tuple(where)] = found.numpy().astype(labels.dtype, copy=False)
    return labels


class _Held:
    """The planes that are still needed."""

    def __init__(self, slabs: Iterator[Slab], axis: int, length: int) -> None:
        self.slabs, self.axis, self.length = slabs, axis, length
        first = next(slabs)
        self.start, self.parts = first.start, [first.logits]
        self.channels = first.logits.shape[0]

    def between(self, first: int, last: int) -> Tensor:
        """Planes ``first`` to ``last``, both included; those before ``first`` are let go."""
        dim = self.axis + 1
        while self.start + sum(part.shape[dim] for part in self.parts) <= last:
            self.parts.append(next(self.slabs).logits)
        while self.start + self.parts[0].shape[dim] <= first:
            self.start += self.parts.pop(0).shape[dim]
        whole = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=dim)
        if first > self.start and len(self.parts) > 1:
            whole = whole.narrow(dim, first - self.start, whole.shape[dim] - (first - self.start)).contiguous()
            self.start = first
        self.parts = [whole]
        return whole.narrow(dim, first - self.start, last - first + 1)


def _decide(logits: Tensor) -> Tensor:
    return (logits[0] > 0).to(torch.int64) if logits.shape[0] == 1 else logits.argmax(0)


def _carried(
    logits: Tensor, to_net: np.ndarray, ranges: list[range], axis: int, first: int, size: tuple[int, ...]
) -> Tensor:
    labels = _decide(logits)
    order = [int(np.abs(to_net[:3, one]).argmax()) for one in range(3)]
    for one, net in enumerate(order):
        places = torch.tensor(ranges[one]) * int(to_net[net, one]) + int(to_net[net, 3])
        inside = (places >= 0) & (places < size[net])
        places = (places - (first if net == axis else 0)).clamp(0, labels.shape[net] - 1)
        labels = labels.index_select(net, places)
        labels *= inside.reshape([-1 if dim == net else 1 for dim in range(3)])
    return labels.permute(order)


def _interpolated(
    logits: Tensor, to_net: np.ndarray, ranges: list[range], axis: int, first: int, size: tuple[int, ...]
) -> Tensor:
    sampled, outside = sample(logits, to_net, ranges, axis, first, size)
    return _decide(sampled).masked_fill_(outside, 0)
