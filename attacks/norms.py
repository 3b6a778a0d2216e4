"""The two norm balls that voxel attacks move in: steepest direction, random start, set of allowed images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medrobust.attacks.base import draw, per_case
from medrobust.attacks.threat import L2Ball, LinfBall, ThreatModel

Norm = Literal["linf", "l2"]


def ball(norm: Norm, eps: float) -> ThreatModel:
    """The set of images within ``eps`` of the clean one and in [0, 1].

    Raises:
        ValueError: unknown norm or negative radius.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}")
    if not eps >= 0:
        raise ValueError(f"expected eps >= 0, got {eps}")
    return LinfBall(eps) if norm == "linf" else L2Ball(eps)


def steepest(norm: Norm, gradient: Tensor) -> Tensor:
    """Per case, the direction of unit norm along which a linear function grows fastest (zero where it is flat)."""
    if norm == "linf":
        return gradient.sign()
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_case(length.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def random_start(norm: Norm, eps: float, image: Tensor, generator: torch.Generator) -> Tensor:
    """A random image of the ball, before clipping: uniform in each voxel (linf), uniform in the ball (l2)."""
    if norm == "linf":
        return image + eps * (2 * draw(torch.rand, image, generator) - 1)
    direction = draw(torch.randn, image, generator)
    voxels = direction[0].numel()
    radius = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64) ** (1 / voxels)
    return image + eps * radius.to(image) * steepest("l2", direction)
