"""PGD: projected gradient ascent from random starts (Madry et al., ICLR 2018, 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model
from medrobust.attacks.norms import Norm, ball, random_start, steepest
from medrobust.attacks.threat import ThreatModel


@dataclass(frozen=True, kw_only=True, repr=False)
class PGD(Attack):
    """Step along the steepest direction, project, repeat; keep the best image seen.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``.
        norm: which ball.
        steps: gradient steps of one run; the image after the last one is judged too.
        step_size: length of a step, in the unit of ``eps``; ``None`` is ``2.5 * eps / steps`` (the paper's rule).
        random_start: begin at a random point of the ball instead of the clean image.
        restarts: independent runs; the best over all of them is returned. Needs ``random_start``.
        keep_best: return the iterate of the highest score; ``False``, the textbook form, returns the last one.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = True

    def __post_init__(self) -> None:
        ball(self.norm, self.eps)
        if not all(isinstance(count, int) and count >= 1 for count in (self.steps, self.restarts)):
            raise ValueError(f"expected whole steps and restarts of at least 1, got {self.steps} and {self.restarts}")
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(
                f"expected random_start and keep_best with restarts={self.restarts}: else all runs are alike"
            )

    def defaults(self) -> dict[str, Any]:
        return {**super().defaults(), "step_size": 2.5 * self.eps / self.steps}

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        best = Best()
        image_adv = image
        for _ in range(self.restarts):
            start = random_start(self.norm, self.eps, image, generator) if self.random_start else image
            image_adv = self.threat.project(start, image)
            for _ in range(self.steps):
                score, gradient = self.gradient(model, image_adv, label)
                best.update(score, image_adv)
                step = self.setting("step_size") * steepest(self.norm, gradient)
                image_adv = self.threat.project(image_adv + step, image)
            if self.keep_best:
                with torch.no_grad():
                    best.update(self.score(model, image_adv, label), image_adv)
        return best.image_adv if self.keep_best and best.image_adv is not None else image_adv
