"""MI-FGSM: iterated FGSM along an accumulated gradient (Dong et al., CVPR 2018, 1710.06081)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model, per_case
from medrobust.attacks.norms import Norm, ball, scaled, steepest
from medrobust.attacks.step_sizes import Schedule, check_schedule, share
from medrobust.attacks.threat import Eps, ThreatModel, radius


@dataclass(frozen=True, kw_only=True, repr=False)
class MIFGSM(Attack):
    """Add up the gradients, each divided by its L1 norm (Eq. 6), and step along the sum (Eq. 7; Eq. 10 for ``l2``).

    The sum forgets: before each gradient it is multiplied by ``decay``. Made to transfer to other models; starts at
    the clean image and uses no chance.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel (``linf``),
            or a tuple of rows, one a case.
        norm: which ball.
        steps: gradient steps; the image after the last one is judged too.
        step_size: length of the first step, in the unit of ``eps``; ``None`` is ``2 * eps``; the paper
            has ``eps / steps``, constant, which is by far the weakest of the rules compared in docs/attacks.md.
        schedule: how the steps shrink, as for PGD.
        decay: what remains of the sum at the next step; 0 is BIM, 1 the paper's choice. Against the network that the
            image is made on 0.5 is a little stronger, for other networks 1 (docs/attacks.md).
        keep_best: return the best iterate, chosen as PGD does; ``False``, the textbook form, returns the last one.
    """

    eps: Eps = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    step_size: Eps | None = None
    schedule: Schedule | None = None
    decay: float = 1.0
    keep_best: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)
        check_schedule(self.setting("schedule"))
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"expected whole steps of at least 1, got {self.steps}")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"expected a finite decay >= 0, got {self.decay}")

    def defaults(self) -> dict[str, Any]:
        return {
            **super().defaults(),
            "step_size": scaled(self.eps, 2.0),
            "schedule": "cosine" if self.step_size is None else "constant",
        }

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    def step_size_at(self, step: int) -> Eps:
        """Length of step ``step`` of 0 .. ``steps`` - 1, in the form of ``eps``."""
        return scaled(self.setting("step_size"), share(self.setting("schedule"), step, self.steps))

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        best = Best()
        image_adv, momentum = image, torch.zeros_like(image)
        for step in range(self.steps):
            chosen, gradient = self.weighed_gradient(model, image_adv, label, step, self.steps)
            best.update(chosen, image_adv)
            size = gradient.abs().flatten(1).sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
            momentum = self.decay * momentum + gradient / per_case(size, gradient)
            move = radius(self.step_size_at(step), image) * steepest(self.norm, momentum)
            image_adv = self.threat.project(image_adv + move, image)
        if self.keep_best:
            with torch.no_grad():
                best.update(self.weigh(model, image_adv, label, self.steps, self.steps)[1], image_adv)
        return best.image_adv if self.keep_best and best.image_adv is not None else image_adv
