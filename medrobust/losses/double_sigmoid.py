"""VLSM-Adapter's training loss as its public code computes it, for reproducing its tables."""

from __future__ import annotations

from monai.losses import DiceCELoss
from torch import Tensor, nn


class DoubleSigmoidDiceCE(nn.Module):
    """1.5 Dice + 1.0 cross-entropy of one sigmoid channel, whose cross-entropy takes **probabilities for logits**.

    The published code passes ``sigmoid(logits)`` to MONAI's ``DiceCELoss``, whose cross-entropy then applies another
    sigmoid: it never falls below 0.313 where all is foreground and 0.693 where nothing is. What was meant is
    ``DiceCELoss(sigmoid=True, lambda_dice=1.5, lambda_ce=1.0)``.
    """

    def __init__(self, lambda_dice: float = 1.5, lambda_ce: float = 1.0) -> None:
        super().__init__()
        self.loss = DiceCELoss(lambda_dice=lambda_dice, lambda_ce=lambda_ce)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (B, 1, *S) and label (B, 1, *S) of 0 and 1 -> scalar."""
        loss: Tensor = self.loss(logits.sigmoid(), label)
        return loss
