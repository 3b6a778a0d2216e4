"""Orthonormal type-II discrete cosine transform and its inverse, over any dimensions of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch_dct
from torch import Tensor


def dct(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Orthonormal DCT-II of ``x`` (any shape) along each of ``dims``; same shape, differentiable.

    Equals ``scipy.fft.dctn(x, axes=dims, norm="ortho")``. Computed as one matrix product a dimension: blocks are
    short, so this is about ten times cheaper than an FFT, and it runs on any device and floating dtype.
    """
    return _apply(x, dims, inverse=False)


def idct(coefficients: Tensor, dims: Sequence[int]) -> Tensor:
    """Inverse of :func:`dct`; being orthonormal, it is also its adjoint."""
    return _apply(coefficients, dims, inverse=True)


def _apply(x: Tensor, dims: Sequence[int], *, inverse: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # a bf16 product would round coefficients by whole quanta
        for dim in dims:
            basis = _basis(x.shape[dim], x.dtype, x.device)
            x = torch.movedim(torch.movedim(x, dim, -1) @ (basis.T if inverse else basis), -1, dim)
    return x


@lru_cache(maxsize=64)
def _basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size): row i is the transform of the i-th unit vector."""
    with torch.inference_mode(False), torch.no_grad():
        return torch_dct.dct(torch.eye(size, dtype=torch.float64), norm="ortho").to(device=device, dtype=dtype)
