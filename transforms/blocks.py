"""Cut an image into equal blocks and put it together again, exactly and without loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def split(x: Tensor, block: Sequence[int]) -> Tensor:
    """(B, C, *S) -> (B, C, N, *block), blocks in row-major order (the first spatial axis varies slowest).

    An axis that the block does not divide is continued at its end with its last value: no edge appears that a
    frequency transform would see.

    Raises:
        ValueError: ``block`` has not one positive size per spatial axis.
    """
    size = x.shape[2:]
    if len(block) != len(size) or min(block) < 1:
        raise ValueError(f"expected one positive block size per spatial axis of {tuple(size)}, got {tuple(block)}")
    padding = [width for s, b in zip(reversed(size), reversed(block), strict=True) for width in (0, -s % b)]
    if any(padding):
        x = F.pad(x, padding, mode="replicate")
    counts = [s // b for s, b in zip(x.shape[2:], block, strict=True)]
    axes = len(block)
    interleaved = [extent for pair in zip(counts, block, strict=True) for extent in pair]
    order = [0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2)]
    return x.reshape(*x.shape[:2], *interleaved).permute(order).reshape(*x.shape[:2], math.prod(counts), *block)


def merge(blocks: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, N, *block) -> (B, C, *size): the inverse of :func:`split`; what was added at the ends is cut off.

    Raises:
        ValueError: the number of blocks is not the one that ``size`` splits into.
    """
    block = blocks.shape[3:]
    counts = [-(-s // b) for s, b in zip(size, block, strict=True)]
    if math.prod(counts) != blocks.shape[2]:
        raise ValueError(f"expected {math.prod(counts)} blocks for size {tuple(size)}, got {blocks.shape[2]}")
    axes = len(block)
    order = [0, 1, *(axis for i in range(axes) for axis in (2 + i, 2 + axes + i))]
    padded = [c * b for c, b in zip(counts, block, strict=True)]
    x = blocks.reshape(*blocks.shape[:2], *counts, *block).permute(order).reshape(*blocks.shape[:2], *padded)
    inner: tuple[Any, ...] = (..., *(slice(s) for s in size))
    return x[inner]
