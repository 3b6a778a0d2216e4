"""PGD: projected gradient ascent from random starts (Madry et al., ICLR 2018, 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model
from medrobust.attacks.norms import Norm, ball, random_start, scaled, steepest
from medrobust.attacks.step_sizes import Schedule, check_schedule, share
from medrobust.attacks.threat import Eps, ThreatModel, radius


@dataclass(frozen=True, kw_only=True, repr=False)
class PGD(Attack):
    """Step along the steepest direction, project, repeat; keep the best image seen.

    The steps shrink by a cosine from ``2 * eps``: of the rules compared in docs/attacks.md the strongest, or close to
    it, for every attack, number of steps, norm and network. Published rules are a ``step_size`` away, which is then
    constant: 2/255 at 8/255 (``eps / 4``) and ``2.5 * eps / steps`` for PGD, 0.01 at 8/255 for SegPGD and CosPGD. Steps
    that shorten as their number grows, as in the second, waste it.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel
            (``linf``), or a tuple of rows, one a case.
        norm: which ball.
        steps: gradient steps of one run; the image after the last one is judged too.
        step_size: length of the first step, in the unit of ``eps``; ``None`` is ``2 * eps``.
        schedule: how the steps shrink: ``"constant"``, ``"linear"`` or ``"cosine"``, toward 0 after the last. ``None``
            is ``"cosine"``, or ``"constant"`` where a ``step_size`` is given.
        random_start: begin at a random point of the ball instead of the clean image.
        restarts: independent runs; the best over all of them is returned. Needs ``random_start``.
        keep_best: return the best iterate, by the objective, or by the reported number where the objective cannot tell
            (:func:`medrobust.attacks.scores.chooser`); ``False``, the textbook form, returns the last one.
    """

    eps: Eps = 8 / 255
    norm: Norm = "linf"
    steps: int = 20
    step_size: Eps | None = None
    schedule: Schedule | None = None
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)
        check_schedule(self.setting("schedule"))
        if not all(isinstance(count, int) and count >= 1 for count in (self.steps, self.restarts)):
            raise ValueError(f"expected whole steps and restarts of at least 1, got {self.steps} and {self.restarts}")
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(
                f"expected random_start and keep_best with restarts={self.restarts}: else all runs are alike"
            )

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
        image_adv = image
        for _ in range(self.restarts):
            start = random_start(self.norm, self.eps, image, generator) if self.random_start else image
            image_adv = self.threat.project(start, image)
            for step in range(self.steps):
                chosen, gradient = self.weighed_gradient(model, image_adv, label, step, self.steps)
                if self.keep_best:
                    best.update(chosen, image_adv)
                move = radius(self.step_size_at(step), image) * steepest(self.norm, gradient)
                image_adv = self.threat.project(image_adv + move, image)
            if self.keep_best:
                with torch.no_grad():
                    best.update(self.weigh(model, image_adv, label, self.steps, self.steps)[1], image_adv)
        return best.image_adv if self.keep_best and best.image_adv is not None else image_adv
