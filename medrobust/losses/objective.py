"""A training loss as what an attack maximises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medrobust.attacks.objectives import Head, check_label


@dataclass(frozen=True, kw_only=True)
class LossObjective:
    """``loss`` of each case by itself, so that a case never depends on its neighbours in the batch.

    Args:
        loss: (logits (B, K, *S), label (B, 1, *S)) -> a number; its mean over a batch of one is that case's.
        name: what records call it, settings included, since a loss cannot say them itself.
        head: how the model's channels are read.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    name: str
    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        check_label(logits, label, self.head)
        return torch.stack([self.loss(logits[[case]], label[[case]]) for case in range(len(logits))])
