"""Sliding-window inference that never holds all logits: finished slabs come out while the windows slide on.

A volume of 512 × 512 × 1500 voxels and 14 classes has 20 GiB of logits. Here windows go along one axis; as soon as none
of those to come touches a plane, its logits are final and are handed on. What is held is one window's depth of planes,
along the axis where that is least. Values are those of MONAI's ``sliding_window_inference`` up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer, SlidingWindowInferer
from torch import Tensor, nn

from medrobust.inferers import WindowModel

PIECE = 8
"""Most planes of a slab."""


class Slab(NamedTuple):
    """Logits (K, *S) of the planes ``start``, ``start + 1``, ... of one axis; whole in the other two."""

    start: int
    logits: Tensor


def slide_axis(size: tuple[int, ...], roi: tuple[int, ...]) -> int:
    """The axis along which the fewest voxels have to be held."""
    whole = int(torch.tensor(size, dtype=torch.int64).prod())
    return min(range(len(size)), key=lambda axis: whole // size[axis] * min(roi[axis], size[axis]))


def stitch(
    image: Tensor,
    network: nn.Module,
    inferer: Inferer,
    *,
    device: torch.device | str = "cpu",
    windows: int | None = None,
) -> tuple[int, Iterator[Slab]]:
    """The axis of the slabs, and the slabs in order, on the CPU.

    Args:
        image: (C, *S), on the CPU.
        network: on ``device``, in evaluation mode.
        inferer: ``SlidingWindowInferer``; any other is taken to be the network on the whole volume.
        windows: in one call of the network; ``None`` is what the inferer says.
    """
    image = image.as_subclass(Tensor)
    if not isinstance(inferer, SlidingWindowInferer):
        return 0, _whole(image, network, device)
    model = WindowModel.of(network, inferer)
    padded, inner = model._pad(image[None])
    roi, size = model._window(padded), tuple(padded.shape[2:])
    axis = slide_axis(size, roi)
    return axis, _slabs(model, padded[0], inner[1:], axis, roi, device, windows or inferer.sw_batch_size)


@torch.inference_mode()
def _whole(image: Tensor, network: nn.Module, device: torch.device | str) -> Iterator[Slab]:
    yield Slab(0, network(image[None].to(device))[0].float().cpu())


def _slabs(
    model: WindowModel,
    image: Tensor,
    inner: tuple[slice, ...],
    axis: int,
    roi: tuple[int, ...],
    device: torch.device | str,
    windows: int,
) -> Iterator[Slab]:
    size = tuple(image.shape[1:])
    weight = compute_importance_map(roi, model.mode, model.sigma_scale, "cpu", torch.float32)
    groups: dict[int, list[tuple[slice, ...]]] = {}
    for batch in model._batches(image[None]):
        for place in batch:
            groups.setdefault(place[2 + axis].start, []).append(place[2:])
    starts = sorted(groups)
    total: Tensor | None = None
    count = torch.zeros([roi[axis] if one == axis else side for one, side in enumerate(size)])
    for start, following in zip(starts, [*starts[1:], size[axis]], strict=True):
        places = groups[start]
        for first in range(0, len(places), windows):
            some = places[first : first + windows]
            logits = _predict(model, image, some, roi, device)
            if total is None:
                total = torch.zeros(logits.shape[1], *count.shape)
            for window, place in zip(logits, some, strict=True):
                here: Any = tuple(slice(None) if one == axis else part for one, part in enumerate(place))
                total[(slice(None), *here)] += window * weight
                count[here] += weight
        assert total is not None
        step = following - start
        keep = [*inner]
        keep[axis] = slice(max(inner[axis].start - start, 0), min(inner[axis].stop - start, step))
        if keep[axis].start < keep[axis].stop:
            # In thin pieces: what is handed on is a copy.
            for planes in range(keep[axis].start, keep[axis].stop, PIECE):
                keep_some = [*keep]
                keep_some[axis] = slice(planes, min(planes + PIECE, keep[axis].stop))
                piece = (total[(slice(None), *keep_some)] / count[tuple(keep_some)]).contiguous()
                yield Slab(start + planes - inner[axis].start, piece)
        _shift(total, axis + 1, step)
        _shift(count, axis, step)


def _predict(
    model: WindowModel, image: Tensor, places: list[tuple[slice, ...]], roi: tuple[int, ...], device: torch.device | str
) -> Tensor:
    with torch.inference_mode():
        logits = model.network(torch.stack([image[(slice(None), *place)] for place in places]).to(device))
        if not isinstance(logits, Tensor) or tuple(logits.shape[2:]) != roi:
            raise ValueError(f"expected logits of the window's size {roi}")
        return logits.float().cpu()


def _shift(buffer: Tensor, axis: int, step: int) -> None:
    """Move planes to the front by ``step``, plane by plane, since a copy of the buffer is what we cannot afford."""
    length = buffer.shape[axis]
    for index in range(max(length - step, 0)):
        buffer.select(axis, index).copy_(buffer.select(axis, index + step))
    buffer.narrow(axis, max(length - step, 0), min(step, length)).zero_()
