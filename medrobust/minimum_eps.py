"""The smallest budget that breaks a case: how far each patient's segmentation is from failing.

A fixed budget says how many cases fall; this says for each case when it falls. All cases of a batch are searched at
once, each with a radius of its own, in two ways that need one another:

* bisection over an attack with an ``eps``. An image that broke the case is tried first, pulled into the smaller ball,
  so that an attack runs only where that is not enough; and each success is pulled back along its line to the clean
  image as far as the case stays broken;
* from the nearest image found so, one walk along the attack's objective, in a ball that shrinks while the case is
  broken and grows while it is not (Pintor et al., NeurIPS 2021, 2102.12827). Attacks begin anew at each radius, and end
  where they are trapped; the walk goes on from what was won.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Model, at, frozen, per_case
from medrobust.attacks.norms import ball, steepest
from medrobust.attacks.objectives import IGNORED, Objective, SoftDice
from medrobust.attacks.scores import HardDice, MissedForeground
from medrobust.attacks.step_sizes import share

JUDGES: dict[str, type[HardDice | MissedForeground]] = {"dice": HardDice, "recall": MissedForeground}
"""What a case is broken by, as it is typed: its mean Dice, or the share of its foreground that is still found."""

GROWTH = (0.05, 0.001)
"""Share by which the walk's radius changes at the first step and at the last (2102.12827, Sec. 2.2)."""
LENGTH = (1.0, 0.02)
"""First and last step of the walk, as a share of the radius."""


@dataclass(frozen=True, kw_only=True)
class Broken:
    """What was found; all (B,).

    Attributes:
        eps: size of the smallest perturbation found that breaks the case: infinity where none of at most ``most`` does,
            0 where the clean image is broken already. An upper bound of the true minimum, as any attack's success is.
        score: of that perturbation's image: below the threshold wherever ``eps`` is finite.
        image_adv: (B, C, *S) those images; the clean one where none was found.
        attacks: for how many budgets the attack was run.
    """

    eps: Tensor
    score: Tensor
    image_adv: Tensor
    attacks: int


@dataclass(frozen=True, kw_only=True)
class MinimumEps:
    """Bisect the eps at which an attack brings the Dice of a case below a threshold.

    Args:
        attack: any attack with ``eps`` and ``norm``; its own ``eps`` does not matter. The walk climbs its objective.
        below: a case is broken when its score is less than this.
        most: the largest eps tried, in the attack's unit.
        rounds: halvings of the interval; the last one is ``most / 2**rounds`` wide.
        walk: gradient steps of the walk; 0 leaves it out, and so do attacks that ask for no gradient.
        criterion: whose 1 minus value is the score: hard Dice of the foreground by default, or
            :class:`medrobust.attacks.scores.MissedForeground`, whose score is the share of the foreground's voxels that
            are still right (``below=0.1``: nine of ten have flipped). With ``classes`` both judge one structure.
    """

    attack: Attack
    below: float = 0.5
    most: float = 32 / 255
    rounds: int = 6
    walk: int = 100
    criterion: Objective = field(default_factory=HardDice)

    def __post_init__(self) -> None:
        if not (hasattr(self.attack, "eps") and hasattr(self.attack, "norm")) or self.attack.targeted:
            raise ValueError(f"expected an untargeted attack with an eps and a norm, got {self.attack!r}")
        if not (0 < self.below <= 1 and self.most > 0 and self.rounds >= 1 and self.walk >= 0):
            raise ValueError(
                "expected below in (0, 1], most > 0, at least 1 round and a walk of 0 or more steps, got "
                f"{self.below}, {self.most}, {self.rounds}, {self.walk}"
            )

    def of_structure(self, index: int) -> MinimumEps:
        """The search for one structure alone: its own score, and an attack on its own soft Dice.

        Args:
            index: the structure's class, numbered as in the label.

        Raises:
            ValueError: the attack climbs another objective, or chooses its image by one, which looks at all structures.
        """
        objective = self.attack.setting("objective")
        chosen = getattr(self.attack, "criterion", None) or getattr(self.attack, "track", None)
        if not isinstance(objective, SoftDice) or not isinstance(self.criterion, HardDice | MissedForeground) or chosen:
            raise ValueError(
                f"expected an attack on soft Dice, to climb one structure's, got {chosen or objective!r}: "
                "leave objective, criterion and track to their defaults"
            )
        return replace(
            self,
            attack=replace(self.attack, objective=replace(objective, classes=(index,))),
            criterion=replace(self.criterion, classes=(index,)),
        )

    @property
    def gradients_of_walk(self) -> int:
        """How many gradients of a case the walk takes."""
        return 0 if self.attack.gradient_free or self.attack.blind else self.walk

    @property
    def judge(self) -> str:
        """What the score is, as in ``JUDGES``."""
        return next((name for name, kind in JUDGES.items() if isinstance(self.criterion, kind)), "score")

    def __call__(
        self, model: Model, image: Tensor, label: Tensor, *, generator: Callable[[], torch.Generator] | None = None
    ) -> Broken:
        """Search for each case of ``image`` (B, C, *S) in [0, 1] with ``label`` (B, 1, *S).

        ``generator`` makes the source of chance for each attack; by default each begins with seed 0.
        """
        make = generator or (lambda: torch.Generator().manual_seed(0))
        norm = self.attack.norm  # type: ignore[attr-defined]
        aim = self._aim(label)
        low = image.new_zeros(len(image))
        high = torch.full_like(low, self.most)
        score = self._score(model, image, label)
        found = score < self.below
        eps = torch.where(found, 0.0, torch.inf)
        best, attacks = image.clone(), 0
        # The first round is the largest ball itself: cases that survive it are not searched.
        for turn in range(self.rounds + 1):
            middle = high if turn == 0 else (low + high) / 2
            open_ = (eps > 0) & ((turn == 0) | torch.isfinite(eps)) & (middle < eps)
            if not open_.any():
                continue
            trial = ball(norm, _rows(middle)).project(best, image)
            value = self._score(model, trial, label)
            if (open_ & (value >= self.below)).any():
                attacks += 1
                crafted: Any = replace(self.attack, eps=_rows(middle))  # type: ignore[call-arg]
                stronger = crafted(model, image, aim, generator=make())
                reached = self._score(model, stronger, label)
                better = (value >= self.below) & (reached < value)  # of others the attack was not asked for
                trial = torch.where(per_case(better, image), stronger, trial)
                value = torch.where(better, reached, value)
            broke = open_ & (value < self.below)
            trial = self._pulled_back(model, trial, image, label, broke)
            best = torch.where(per_case(broke, image), trial, best)
            score = torch.where(broke, self._score(model, best, label), score)
            eps = torch.where(broke, _size(norm, best - image).clamp_max(self.most), eps)
            high = torch.where(broke, eps, high)
            low = torch.where(open_ & ~broke, middle, low)
        bisected = Broken(eps=eps, score=score, image_adv=best, attacks=attacks)
        return self._walked(model, image, label, aim, bisected) if self.gradients_of_walk else bisected

    def _aim(self, label: Tensor) -> Tensor:
        """The label as the attack sees it: who goes for the foreground's recall need not touch anything else."""
        if not isinstance(self.criterion, MissedForeground):
            return label
        classes = self.criterion.classes
        wanted = label > 0
        if classes is not None and label.shape[1] == 1:
            wanted = torch.isin(label, torch.as_tensor(classes, device=label.device))
        elif classes is not None:
            channels = torch.arange(label.shape[1], device=label.device).view(1, -1, *[1] * (label.ndim - 2))
            wanted = wanted & torch.isin(channels, torch.as_tensor(classes, device=label.device))
        return torch.where(wanted, label, IGNORED)

    def _walked(self, model: Model, image: Tensor, label: Tensor, aim: Tensor, found: Broken) -> Broken:
        """Go on from what was found, in a ball that follows the case's own success."""
        norm, objective = self.attack.norm, self.attack.setting("objective")  # type: ignore[attr-defined]
        eps, score, best = found.eps, found.score, found.image_adv
        radius, x = eps.clamp_max(self.most), best
        with frozen(model), torch.inference_mode(False), torch.enable_grad():
            image, x, aim = image.clone(), x.clone(), aim.clone()
            for step in range(self.walk + 1):
                last = step == self.walk
                if last:
                    with torch.no_grad():
                        logits = model(x)
                else:
                    _, gradient, logits = self.attack.ascent(model, x, aim, at(objective, step, self.walk))
                value, size = 1 - self.criterion(logits, label), _size(norm, x - image).clamp_max(self.most)
                nearer = (value < self.below) & (size < eps)
                best = torch.where(per_case(nearer, image), x.detach(), best)
                score, eps = torch.where(nearer, value, score), torch.where(nearer, size, eps)
                if last:
                    break
                passed = share("cosine", step, self.walk)
                change = GROWTH[1] + (GROWTH[0] - GROWTH[1]) * passed
                shrunk = torch.minimum(radius, size) * (1 - change)
                grown = (radius * (1 + change)).clamp_max(self.most)
                radius = torch.where(value < self.below, shrunk, grown)
                length = radius * (LENGTH[1] + (LENGTH[0] - LENGTH[1]) * passed)
                x = x + per_case(length, x) * steepest(norm, gradient)
                x = ball(norm, _rows(radius)).project(x, image)
        return Broken(eps=eps, score=score, image_adv=best, attacks=found.attacks)

    def _score(self, model: Model, image: Tensor, label: Tensor) -> Tensor:
        with frozen(model), torch.no_grad():
            return 1 - self.criterion(model(image), label)

    def _pulled_back(self, model: Model, image_adv: Tensor, image: Tensor, label: Tensor, broke: Tensor) -> Tensor:
        """The nearest image on the line to the clean one that still is broken, to 1/32 of the line."""
        good = torch.ones_like(broke, dtype=image.dtype)
        bad = torch.zeros_like(good)
        for _ in range(5):
            middle = (good + bad) / 2
            value = self._score(model, image + per_case(middle, image) * (image_adv - image), label)
            still = broke & (value < self.below)
            good, bad = torch.where(still, middle, good), torch.where(still, bad, middle)
        nearer = image + per_case(good, image) * (image_adv - image)
        return torch.where(per_case(good < 1, image), nearer, image_adv)  # the whole line would round


def _rows(eps: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple((float(value),) for value in eps)


def _size(norm: str, delta: Tensor) -> Tensor:
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)
