"""Frequency consistency: clean and adversarial logits should agree coefficient by coefficient.

Hanif et al., "Frequency Domain Adversarial Training for Robust Volumetric Medical Segmentation", MICCAI 2023
(2307.07269), Eq. 4: the L1 distance between the cosine transforms of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medrobust.losses._pair import pair
from medrobust.transforms.blocks import split
from medrobust.transforms.dct import dct

REDUCTIONS = ("mean", "sum", "relative")


class FrequencyConsistencyLoss(nn.Module):
    """L1 distance between block-wise cosine transforms of two sets of logits, a scalar.

    The transform runs in single precision whatever autocast says, and both arguments get gradients.

    Args:
        block_size: block edge lengths, one per spatial axis; ``None`` takes each axis whole, as the published code
            does with its patch. Sizes that the block does not divide are continued by copies of the edge.
        reduction: ``"mean"`` over batch, classes and coefficients, so that the weight of the term does not depend on
            the patch; ``"sum"`` is Eq. 4 as written; ``"relative"`` is the published code's: the sum divided by the
            sum of the clean logits' absolute coefficients.

    Raises:
        ValueError: unknown reduction, or logits of different shapes.
    """

    def __init__(self, block_size: Sequence[int] | None = None, *, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"expected a reduction among {REDUCTIONS}, got {reduction!r}")
        self.block_size = None if block_size is None else tuple(block_size)
        self.reduction = reduction

    def forward(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """(B, K, *S) clean, (B, K, *S) adversarial -> scalar."""
        logits, logits_adv = pair(logits, logits_adv)
        with torch.autocast(logits.device.type, enabled=False):
            clean, adversarial = self._coefficients(logits), self._coefficients(logits_adv)
            distance = (clean - adversarial).abs()
            if self.reduction == "mean":
                return distance.mean()
            return distance.sum() if self.reduction == "sum" else distance.sum() / clean.abs().sum()

    def _coefficients(self, logits: Tensor) -> Tensor:
        size = tuple(logits.shape[2:])
        return dct(split(logits, self.block_size or size), tuple(range(-len(size), 0)))
