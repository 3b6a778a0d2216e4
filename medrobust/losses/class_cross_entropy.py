"""Cross-entropy for models that give one answer an image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medrobust.attacks.objectives import full_precision


class ClassCrossEntropy(nn.Module):
    """Cross-entropy of class logits (B, K, 1, 1) with labels (B, 1, 1, 1) -> scalar.

    On attacked images, with the class texts fixed as anchors, this is TeCoA's loss (Mao et al., ICLR 2023, 2212.07016,
    Eq. 3).
    """

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        scores = full_precision(logits.as_subclass(Tensor)).flatten(1)
        loss: Tensor = F.cross_entropy(scores, label.as_subclass(Tensor).flatten().long())
        return loss
