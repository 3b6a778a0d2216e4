"""FGSM: one step along the gradient (Goodfellow et al., ICLR 2015, 1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Model
from medrobust.attacks.norms import Norm, ball, steepest
from medrobust.attacks.threat import Eps, ThreatModel, radius


@dataclass(frozen=True, kw_only=True, repr=False)
class FGSM(Attack):
    """Go to the edge of the ball in one step: ``image + eps * sign(gradient)`` for ``linf``.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel
            (``linf``), or a tuple of rows, one a case.
        norm: which ball.
    """

    eps: Eps = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        _, gradient = self.gradient(model, image, label)
        return image + radius(self.eps, image) * steepest(self.norm, gradient)
