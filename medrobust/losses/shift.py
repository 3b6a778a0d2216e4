"""How far an embedding moved from where it should be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medrobust.attacks.objectives import full_precision


class ShiftLoss(nn.Module):
    """Mean squared length of embeddings' shifts (B, D, 1, 1) -> scalar; the label has no say.

    On attacked images, with the untouched model's embedding of the clean image as reference, this is FARE's loss
    (Schlarmann et al., ICML 2024, 2402.12336, Eq. 3), which needs no labels.
    """

    def forward(self, shift: Tensor, label: Tensor | None = None) -> Tensor:
        loss: Tensor = torch.mean(full_precision(shift.as_subclass(Tensor)).flatten(1).square().sum(1))
        return loss
