"""Gaussian noise of a given standard deviation: the corruption that the literature compares attacks with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Model, draw
from medrobust.attacks.threat import IntensityRange


@dataclass(frozen=True, kw_only=True, repr=False)
class GaussianNoise(Attack):
    """Add white Gaussian noise and clip to [0, 1]; looks at neither the model nor the label.

    Args:
        std: standard deviation, intensity in [0, 1].
    """

    blind: ClassVar[bool] = True

    std: float = 8 / 255

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise ValueError(f"expected std >= 0, got {self.std}")

    @property
    def threat(self) -> IntensityRange:
        return IntensityRange()

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        return (image + self.std * draw(torch.randn, image, generator)).clamp(0, 1)
