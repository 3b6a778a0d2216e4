"""The two norm balls that voxel attacks move in: steepest direction, random start, set of allowed images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medrobust.attacks.base import draw, per_case
from medrobust.attacks.threat import Eps, L2Ball, LinfBall, ThreatModel, radius

Norm = Literal["linf", "l2"]


def ball(norm: Norm, eps: Eps) -> ThreatModel:
    """The set of images within ``eps`` of the clean one and in [0, 1].

    Raises:
        ValueError: unknown norm, negative radius, or radii per channel for ``l2``.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}")
    rows = torch.as_tensor(eps, dtype=torch.float64)
    if rows.ndim > 2 or rows.numel() == 0 or not (rows >= 0).all():
        raise ValueError(f"expected eps >= 0, one number, one a channel, or a row a case, got {eps}")
    if norm == "l2" and rows.ndim and rows.shape[-1] != 1:
        raise ValueError(f"expected one eps for all channels with norm 'l2', got {eps}: the norm runs over all of them")
    return LinfBall(eps) if norm == "linf" else L2Ball(eps)


def scaled(eps: Eps, factor: float) -> Eps:
    """Radii times a factor, in the form they came."""
    if isinstance(eps, tuple):
        rows: tuple[Eps, ...] = tuple(scaled(part, factor) for part in eps)
        return rows  # type: ignore[return-value]
    return eps * factor


def steepest(norm: Norm, gradient: Tensor) -> Tensor:
    """Per case, the direction of unit norm along which a linear function grows fastest (zero where it is flat)."""
    if norm == "linf":
        return gradient.sign()
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_case(length.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def random_start(norm: Norm, eps: Eps, image: Tensor, generator: torch.Generator) -> Tensor:
    """A random image of the ball, before clipping: uniform in each voxel (linf), uniform in the ball (l2)."""
    if norm == "linf":
        return image + radius(eps, image) * (2 * draw(torch.rand, image, generator) - 1)
    direction = draw(torch.randn, image, generator)
    voxels = direction[0].numel()
    length = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64) ** (1 / voxels)
    return image + radius(eps, image) * length.to(image) * steepest("l2", direction)
