"""Mean structural similarity of blocks, with the small window that VAFA uses inside its loss.

SSIM: Wang et al., 2004. VAFA compares blocks, not images, by a 3-tap Gaussian window without padding; sums of three
weighted slices give the same values and gradients as convolutions at about a tenth of the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""Stabilisers (K L)^2 for a data range L of 1."""


class BlockSSIM:
    """SSIM against fixed blocks, whose moments are computed once.

    Args:
        x: (..., *block) in [0, 1], the blocks compared against.
        spatial_dims: how many trailing dimensions a block has.
    """

    def __init__(self, x: Tensor, spatial_dims: int) -> None:
        self.x = x
        self.spatial_dims = spatial_dims
        self.mean = self._smooth(x)
        self.variance = self._smooth(x * x) - self.mean**2

    def __call__(self, y: Tensor) -> Tensor:
        """Mean SSIM per block of ``y`` (..., *block) -> (...)."""
        mean = self._smooth(y)
        variance = self._smooth(y * y) - mean**2
        covariance = self._smooth(self.x * y) - self.mean * mean
        contrast = (2 * covariance + C2) / (self.variance + variance + C2)
        luminance = (2 * self.mean * mean + C1) / (self.mean**2 + mean**2 + C1)
        return (luminance * contrast).flatten(-self.spatial_dims).mean(-1)

    def _smooth(self, x: Tensor) -> Tensor:
        """Gaussian-weighted sum of three neighbours along each axis of a block; axes shorter than that stay."""
        side = math.exp(-0.5 / SIGMA**2)
        side, centre = side / (1 + 2 * side), 1 / (1 + 2 * side)
        for dim in range(-self.spatial_dims, 0):
            inner = x.shape[dim] - 2
            if inner > 0:
                left, middle, right = (torch.narrow(x, dim, start, inner) for start in range(3))
                x = side * (left + right) + centre * middle
        return x


def block_ssim(x: Tensor, y: Tensor, spatial_dims: int) -> Tensor:
    """Mean SSIM per block of two sets of blocks (..., *block) in [0, 1] -> (...)."""
    return BlockSSIM(x, spatial_dims)(y)
