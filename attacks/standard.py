"""The standard ensemble: the one number to quote for a budget, as AutoAttack is for classifiers (2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.apgd import APGD
from medrobust.attacks.base import Attack, Best, Model
from medrobust.attacks.norms import Norm, ball
from medrobust.attacks.scores import HardDice, VoxelError, ceiling, reported
from medrobust.attacks.square import Square
from medrobust.attacks.threat import Eps, ThreatModel
from medrobust.attacks.voxel_losses import CosPGDLoss

GRADIENTS = 100
"""Of each member that takes any."""
QUERIES = 100
"""Of the black box."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Standard(Attack):
    """Several attacks in turn, the worst image for each case; nothing to choose but the ball.

    At most 300 gradients a case: APGD on the soft Dice, the same in three stages of shrinking radius, APGD on CosPGD's
    loss; then Square, which sees no gradient. Of many candidates the first three were the strongest together, on clean
    and on hardened networks (docs/attacks.md). A batch whose cases are all broken (Dice 0) is done: what is left of the
    list is not run.

    Args:
        objective: what the first two members climb, and how all read the channels; ``None`` is the soft Dice.
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel (``linf``),
            or a tuple of rows, one a case.
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

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks in their order."""
        objective = self.setting("objective")
        shared: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "targeted": self.targeted}
        first = APGD(objective=objective, steps=GRADIENTS, criterion=self.judged_by, **shared)
        other = CosPGDLoss(head=objective.head)
        square = Square(objective=objective, queries=QUERIES, **shared)
        return first, replace(first, progressive=True), replace(first, objective=other), square

    @property
    def judged_by(self) -> HardDice | VoxelError:
        """What the members choose their images by, and what the worst of them is."""
        objective = self.setting("objective")
        return reported(objective.head, targeted=self.targeted, classes=getattr(objective, "classes", None))

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        criterion, best = self.judged_by, Best()

        def judged(x: Tensor) -> None:
            with torch.no_grad():
                best.update(self.judge(criterion, model(x), label), x)

        judged(image)
        for member in self.members:
            judged(member.perturb(model, image, label, generator))
            assert best.score is not None
            if bool((best.score >= ceiling(criterion, targeted=self.targeted)).all()):
                break
        assert best.image_adv is not None
        return best.image_adv
