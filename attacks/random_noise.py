"""Noise at the edge of a norm ball: the control that says how much of an attack's effect its budget alone explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Model, draw, per_case
from medrobust.attacks.norms import Norm, ball
from medrobust.attacks.threat import Eps, ThreatModel, radius

HALVINGS = 40


@dataclass(frozen=True, kw_only=True, repr=False)
class RandomNoise(Attack):
    """The largest random perturbation that the ball allows; looks at neither the model nor the label.

    ``linf``: every voxel moves by ``eps`` up or down at random. ``l2``: white Gaussian noise, scaled case by case so
    that its norm is ``eps`` after clipping to [0, 1].

    Args:
        eps: radius of the ball; intensity in [0, 1] for ``linf``, Euclidean norm over all voxels for ``l2``; a tuple
            of one a channel (``linf``), or a tuple of rows, one a case.
        norm: which ball.
    """

    blind: ClassVar[bool] = True

    eps: Eps = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        ball(self.norm, self.eps)

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        noise = draw(torch.randn, image, generator)
        if self.norm == "linf":
            return image + radius(self.eps, image) * torch.where(noise < 0, -1.0, 1.0).to(image)
        return self._scaled(image, noise.expand_as(image))

    def _scaled(self, image: Tensor, noise: Tensor) -> Tensor:
        """Bisect the scale at which the clipped noise has the wanted norm: the norm grows with the scale."""
        low = image.new_zeros(len(image))
        high = torch.full_like(low, 2.0 / noise.abs().amax().clamp_min(1e-9).item())
        target = torch.zeros_like(low) + torch.as_tensor(radius(self.eps, image)).flatten().to(low)
        for _ in range(HALVINGS):
            short = self._norm(image, noise, high) < target
            if not short.any():
                break
            high = torch.where(short & (high < 1e6), 2 * high, high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = self._norm(image, noise, middle) > target
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return (image + per_case(low, image) * noise).clamp(0, 1)

    def _norm(self, image: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
        delta = (image + per_case(scale, image) * noise).clamp(0, 1) - image
        return torch.linalg.vector_norm(delta.flatten(1), dim=1)
