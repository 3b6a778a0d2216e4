"""TRADES' regulariser: the adversarial prediction should be the clean one (Zhang et al., 1901.08573, Eq. 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrobust.attacks.objectives import Head, is_softmax
from medrobust.losses._pair import pair


class KLConsistencyLoss(nn.Module):
    """Kullback-Leibler divergence from adversarial to clean probabilities, KL(clean || adversarial), mean over voxels.

    Args:
        head: ``"softmax"`` sums over classes; ``"sigmoid"`` (and a single channel) sums the divergences of the
            channels' Bernoulli distributions.

    Raises:
        ValueError: logits of different shapes.
    """

    def __init__(self, head: Head = "softmax") -> None:
        super().__init__()
        self.head = head

    def forward(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """(B, K, *S) clean, (B, K, *S) adversarial -> scalar."""
        logits, logits_adv = pair(logits, logits_adv)
        with torch.autocast(logits.device.type, enabled=False):
            log_p, log_q = self._log_probabilities(logits), self._log_probabilities(logits_adv)
            return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        if is_softmax(logits, self.head):
            return F.log_softmax(logits, 1)
        return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], 1)
