"""CosPGD: PGD that weighs voxels by how alike prediction and label are (Agnihotri et al., ICML 2024, 2302.02213)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medrobust.attacks.objectives import Objective
from medrobust.attacks.pgd import PGD
from medrobust.attacks.scores import reported
from medrobust.attacks.voxel_losses import CosPGDLoss


@dataclass(frozen=True, kw_only=True, repr=False)
class CosPGD(PGD):
    """PGD on :class:`CosPGDLoss`; the other settings are PGD's.

    Args:
        criterion: what the best image is chosen by: the weights make the objective itself small where it has won.
            ``None`` is hard Dice, or the share of wrong voxels when targeted.
    """

    criterion: Objective | None = None

    def defaults(self) -> dict[str, Any]:
        objective = self.objective or CosPGDLoss()
        criterion = reported(objective.head, targeted=self.targeted)
        return {**super().defaults(), "objective": objective, "criterion": criterion}

    def criterion_of(self) -> Objective:
        found: Objective = self.setting("criterion")
        return found
