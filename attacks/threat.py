"""Threat models: what an attacker may do to an image.

An image is allowed if and only if ``project`` leaves it unchanged; so ``project`` is idempotent and the clean image is
always allowed. Intensities are in [0, 1] everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.transforms.blocks import merge, split

Eps = float | tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A radius: one number, a tuple of one a channel, or a tuple of rows, one a case, as long as the channels or 1."""

SLACK = 1e-6
"""A norm this much (relative) above its bound counts as on it: without, rounding would make projections drift."""


class ThreatModel(Protocol):
    """The set of images an attacker may choose from, given the clean one."""

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        """The allowed image that stands for ``image_adv`` (B, C, *S) around ``image`` (B, C, *S)."""
        ...


def radius(eps: Eps, image: Tensor) -> Tensor | float:
    """Radii that broadcast over an image (B, C, *S).

    Raises:
        ValueError: as many channels or cases as the image does not have.
    """
    if not isinstance(eps, tuple):
        return eps
    rows = torch.as_tensor(eps, dtype=image.dtype, device=image.device)
    rows = rows if rows.ndim == 2 else rows[None]
    if any(have not in (1, wanted) for have, wanted in zip(rows.shape, image.shape, strict=False)):
        raise ValueError(f"expected eps for images {tuple(image.shape[:2])} (cases, channels), got {eps}")
    return rows.reshape(*rows.shape, *[1] * (image.ndim - 2))


@dataclass(frozen=True)
class IntensityRange:
    """Any image in [0, 1]."""

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        return image_adv.clamp(0, 1)


@dataclass(frozen=True)
class LinfBall:
    """No voxel moves by more than ``eps`` (intensity in [0, 1])."""

    eps: Eps

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        eps = radius(self.eps, image)
        return torch.clamp(image_adv, image - eps, image + eps).clamp(0, 1)


@dataclass(frozen=True)
class L2Ball:
    """The perturbation of a case has a Euclidean norm of at most ``eps`` over all its channels and voxels."""

    eps: Eps

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        delta = image_adv - image
        # Clipping afterwards only shortens the perturbation, because the clean image lies in [0, 1].
        return (image + delta * _shrink(delta, radius(self.eps, image), delta.ndim - 1)).clamp(0, 1)


@dataclass(frozen=True)
class Within:
    """An image that ``inner`` allows and that differs from the clean one only in a region.

    Args:
        inner: the threat model without the region.
        region: (B or 1, C or 1, *S) bool, where the attacker may change the image.
    """

    inner: ThreatModel
    region: Tensor

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        inside = torch.where(self.region, image_adv, image)
        return torch.where(self.region, self.inner.project(inside, image), image)


@dataclass(frozen=True)
class BlockRMSBall:
    """In every block the root mean square of the perturbation is at most ``eps`` (intensity in [0, 1]).

    This is the bound that quantisation obeys: rounding an orthonormal DCT coefficient to a multiple of q moves it by
    at most q / 2, so a block of n voxels moves by at most sqrt(n) q / 2 in Euclidean norm, that is q / 2 in root mean
    square. A block that the image's edge cuts has the bound of a whole one.

    ``block`` names the trailing axes' block sizes; with fewer sizes than spatial axes (slices of a volume),
    the remaining axis, the last, is not cut.
    """

    eps: float
    block: tuple[int, ...]

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        delta = slices_first(image_adv - image, self.block)
        size = delta.shape[2:]
        # Zeros, not copies, continue the perturbation: what lies outside the image does not count.
        missing = [width for s, b in zip(reversed(size), reversed(self.block), strict=True) for width in (0, -s % b)]
        blocks = split(F.pad(delta, missing), self.block)
        limit = self.eps * math.sqrt(math.prod(self.block))
        delta = merge(blocks * _shrink(blocks, limit, len(self.block)), size)
        return (image + slices_last(delta, image)).clamp(0, 1)


def slices_first(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """View (B, C, H, W, D) as (B, C * D, H, W) when blocks are two-dimensional; leave anything else as it is."""
    return x.movedim(-1, 2).flatten(1, 2) if x.ndim - 2 > len(block) else x


def slices_last(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`slices_first`; ``like`` has the shape to come back to."""
    if x.ndim == like.ndim:
        return x
    return x.unflatten(1, (like.shape[1], like.shape[-1])).movedim(2, -1)


def _shrink(delta: Tensor, limit: Tensor | float, dims: int) -> Tensor:
    """Factor in (0, 1] that brings the norm over the last ``dims`` dimensions to ``limit``."""
    norm = torch.linalg.vector_norm(delta, dim=tuple(range(-dims, 0)), keepdim=True, dtype=torch.float64)
    factor = torch.where(norm > limit * (1 + SLACK), limit / norm.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return factor.to(delta.dtype)
