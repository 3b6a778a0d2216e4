"""Noise at the edge of a norm ball: the control that says how much of an attack's effect its budget alone explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Model, draw, per_case
from medrobust.attacks.norms import Norm, ball
from medrobust.attacks.threat import SLACK, Eps, L2Ball, ThreatModel, radius

HALVINGS = 40
LOUD = 1e6
"""Factor at which white noise drives every voxel to 0 or 1, but for one in a million."""


@dataclass(frozen=True)
class NoiseBall(L2Ball):
    """The images of an L2 ball, with a projection that scales a perturbation before clipping, not after.

    So noise that is too loud ends on the edge of the ball although clipping shortens it, inside a region as well.
    """

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        delta = image_adv - image
        target = image.new_zeros(len(image), dtype=torch.float64)
        target = target + torch.as_tensor(radius(self.eps, image)).flatten().to(target)
        low, high = target / _norm(delta).clamp_min(torch.finfo(torch.float64).tiny), torch.ones_like(target)
        outside = _norm(image_adv.clamp(0, 1) - image) > target * (1 + SLACK)
        if not outside.any():
            return image_adv.clamp(0, 1)
        # The norm grows with the scale. The scale may be anywhere between 1e-12 and 1: its logarithm is halved.
        for _ in range(HALVINGS):
            middle = (low * high).sqrt()
            over = _norm(_moved(image, delta, middle) - image) > target
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return torch.where(per_case(outside, image), _moved(image, delta, low), image_adv.clamp(0, 1))


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomNoise(Attack):
    """The largest random perturbation that the ball allows; looks at neither the model nor the label.

    ``linf``: every voxel moves by ``eps`` up or down at random. ``l2``: white Gaussian noise, scaled case by case so
    that its norm is ``eps`` after clipping to [0, 1], within the region where one is given. Where even noise that
    drives all voxels to 0 or 1 is shorter, that is the result.

    Args:
        eps: radius of the ball; intensity in [0, 1] for ``linf``, Euclidean norm over all voxels for ``l2``; a tuple
            of one a channel (``linf``), or a tuple of rows, one a case.
        norm: which ball.
    """

    blind: ClassVar[bool] = True

    eps: Eps = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    @property
    def threat(self) -> ThreatModel:
        return NoiseBall(self.eps) if self.norm == "l2" else ball(self.norm, self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        noise = draw(torch.randn, image, generator)
        if self.norm == "linf":
            return image + radius(self.eps, image) * torch.where(noise < 0, -1.0, 1.0).to(image)
        # Only the projection knows the region: it scales what lies there.
        return image + LOUD * noise


def _norm(delta: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)


def _moved(image: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    return (image + per_case(scale, image).to(image) * delta).clamp(0, 1)
