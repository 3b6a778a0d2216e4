"""APGD: PGD without a step size to choose (Croce & Hein, ICML 2020, 2003.01690), as SEA adapts it to segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model, at, per_case
from medrobust.attacks.norms import Norm, ball, random_start, scaled, steepest
from medrobust.attacks.objectives import CrossEntropy, Objective, SoftDice
from medrobust.attacks.scores import VoxelError, ceiling, reported
from medrobust.attacks.threat import Eps, ThreatModel, radius
from medrobust.attacks.voxel_losses import VoxelLoss

SHARES = (0.3, 0.3)
"""Of the steps, for the first two of the three radii 2 eps, 1.5 eps, eps."""


@dataclass(frozen=True, kw_only=True, repr=False)
class APGD(Attack):
    """Ascend with momentum; where a checkpoint finds no progress, halve the step and return to the best image.

    The paper's Algorithm 1 with the settings of 2306.12941: first step 2 eps, checkpoints after 22 % of the steps and
    then ever sooner. With ``progressive`` three runs in balls of radius 2 eps, 1.5 eps and eps (30, 30 and 40 % of the
    steps), each from the best image of the one before: what is wrong in a larger ball often stays wrong in the smaller.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel
            (``linf``), or a tuple of rows, one a case.
        norm: which ball; the published work has ``linf`` only.
        steps: gradient steps of one run. Below 100 nearly every step is a checkpoint and the search degenerates.
        criterion: what the best image is chosen by; ``None`` is hard Dice, or the share of wrong voxels when
            targeted.
        track: what progress is measured by; ``None`` is the objective itself, or soft Dice (cross-entropy when
            targeted) for objectives that look at some voxels only: those shrink while the attack succeeds.
        random_start: begin at a random point of the ball instead of the clean image.
        restarts: independent runs; the best over all of them is returned. Needs ``random_start``.
        progressive: shrink the radius in three stages; needs at least 4 steps.
        as_published: as the public code does it: of equal criteria the later image wins, the first checkpoint compares
            its first value with 0, and voxels without a say count as wrong at the start and as right later.
    """

    eps: Eps = 8 / 255
    norm: Norm = "linf"
    steps: int = 100
    criterion: Objective | None = None
    track: Objective | None = None
    random_start: bool = True
    restarts: int = 1
    progressive: bool = False
    as_published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)
        if not all(isinstance(count, int) and count >= 1 for count in (self.steps, self.restarts)):
            raise ValueError(f"expected whole steps and restarts of at least 1, got {self.steps} and {self.restarts}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"expected random_start with restarts={self.restarts}: else all runs are alike")
        if self.progressive and self.steps < 4:
            raise ValueError(f"expected at least 4 steps for three radii, got {self.steps}: give more")

    def defaults(self) -> dict[str, Any]:
        objective = self.objective or SoftDice()
        head = objective.head
        whole = CrossEntropy(head=head) if self.targeted else SoftDice(head=head)
        track = whole if isinstance(objective, VoxelLoss) else objective
        criterion = reported(head, targeted=self.targeted, classes=getattr(objective, "classes", None))
        return {**super().defaults(), "criterion": criterion, "track": track}

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        best = Best()
        for _ in range(self.restarts):
            image_adv = image
            for stage, (eps, steps) in enumerate(self.stages()):
                if stage == 0 and self.random_start:
                    image_adv = random_start(self.norm, eps, image, generator)
                score, image_adv = self.climb(
                    model, image, label, ball(self.norm, eps).project(image_adv, image), eps, steps
                )
            best.update(score, image_adv)
        assert best.image_adv is not None
        return best.image_adv

    def stages(self) -> list[tuple[Eps, int]]:
        """Radius and steps of each run."""
        if not self.progressive:
            return [(self.eps, self.steps)]
        first, second = (int(share * self.steps) for share in SHARES)
        return [
            (scaled(self.eps, 2.0), first),
            (scaled(self.eps, 1.5), second),
            (self.eps, self.steps - first - second),
        ]

    def climb(
        self, model: Model, image: Tensor, label: Tensor, start: Tensor, eps: Eps, steps: int
    ) -> tuple[Tensor, Tensor]:
        """One run from ``start`` in the ball of radius ``eps``: the best criterion seen, (B,), and its image."""
        threat = ball(self.norm, eps)
        track = self.setting("track")
        objective = self.setting("objective")

        def look(x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            """Progress, criterion and gradient at an image; the last image needs no gradient."""
            if step < steps:
                value, gradient, logits = self.ascent(model, x, label, at(objective, step, steps))
                # A track that is the objective itself is looked at with the same weights.
                progress = value if track == objective else self.judge(at(track, step, steps), logits, label)
            else:
                with torch.no_grad():
                    logits, gradient = model(x), torch.zeros_like(x)
                    progress = self.judge(at(track, step, steps), logits, label)
            return progress.detach(), self.judge(self.setting("criterion"), logits, label), gradient

        x, before = start, start
        progress, score, gradient = look(x, 0)
        if self.as_published and isinstance(self.setting("criterion"), VoxelError):
            score = score + (label.flatten(1) < 0).to(score).mean(1)
        found = _Found(x, score, ties=self.as_published)
        enough = math.inf if self.as_published else ceiling(self.setting("criterion"), targeted=self.targeted)
        best, best_x, best_gradient = progress, x, gradient
        history = [torch.zeros_like(progress) if self.as_published else progress]
        step_size = torch.full_like(progress, 2.0)
        checkpoint, window = _Checkpoints(steps), 0
        last_best, reduced = best, torch.ones_like(best, dtype=torch.bool)
        unit = radius(eps, image)
        for step in range(steps):
            if bool((found.score >= enough).all()):
                break  # all cases are broken: no image can do more
            move = per_case(step_size, x) * unit * steepest(self.norm, gradient)
            share = 1.0 if step == 0 else 0.75
            ahead = threat.project(x + move, image)
            x, before = threat.project(x + share * (ahead - x) + (1 - share) * (x - before), image), x
            progress, score, gradient = look(x, step + 1)
            found.update(score, x)
            better = progress > best
            best = torch.where(better, progress, best)
            best_x = torch.where(per_case(better, x), x, best_x)
            best_gradient = torch.where(per_case(better, x), gradient, best_gradient)
            history.append(progress)
            window += 1
            if window == checkpoint.interval:
                recent = torch.stack(history[-window - 1 :])
                stalls = (recent[1:] > recent[:-1]).sum(0) <= 0.75 * window
                reduced = stalls | (~reduced & (last_best >= best))
                last_best, window = best, 0
                step_size = torch.where(reduced, step_size / 2, step_size)
                x = torch.where(per_case(reduced, x), best_x, x)
                gradient = torch.where(per_case(reduced, x), best_gradient, gradient)
                checkpoint.advance()
        return found.score, found.image_adv


class _Found:
    """The image of the highest criterion so far; ``ties`` says whether a later equal one replaces it."""

    def __init__(self, image_adv: Tensor, score: Tensor, *, ties: bool) -> None:
        self.image_adv, self.score, self.ties = image_adv, score, ties

    def update(self, score: Tensor, image_adv: Tensor) -> None:
        better = score >= self.score if self.ties else score > self.score
        self.score = torch.where(better, score, self.score)
        self.image_adv = torch.where(per_case(better, image_adv), image_adv, self.image_adv)


class _Checkpoints:
    """Steps until the next checkpoint: 22 % of all, then 3 % fewer each time, down to 6 %; always at least one."""

    def __init__(self, steps: int) -> None:
        self.interval, self._least, self._less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))

    def advance(self) -> None:
        self.interval = max(self.interval - self._less, self._least)
