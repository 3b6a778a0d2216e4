"""SegPGD: PGD that first flips what is right, then keeps wrong what is wrong (Gu et al., ECCV 2022, 2207.12391)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medrobust.attacks.objectives import Objective
from medrobust.attacks.pgd import PGD
from medrobust.attacks.scores import reported
from medrobust.attacks.voxel_losses import SegPGDLoss


@dataclass(frozen=True, kw_only=True, repr=False)
class SegPGD(PGD):
    """PGD on :class:`SegPGDLoss`, whose weights change from step to step; the other settings are PGD's.

    Args:
        criterion: what the best image is chosen by, because the objective itself is another one at each step.
            ``None`` is hard Dice, or the share of wrong voxels when targeted.
    """

    criterion: Objective | None = None

    def defaults(self) -> dict[str, Any]:
        objective = self.objective or SegPGDLoss()
        criterion = reported(objective.head, targeted=self.targeted)
        return {**super().defaults(), "objective": objective, "criterion": criterion}

    def criterion_of(self) -> Objective:
        found: Objective = self.setting("criterion")
        return found
