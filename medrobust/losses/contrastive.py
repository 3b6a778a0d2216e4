"""CLIP's symmetric contrastive loss for batches in which several pairs may say the same.

With few classes a batch holds many captions of one meaning. The plain loss (2103.00020, Fig. 3) would call all but one
of them wrong; here all of an image's likes are right, as in UniCL (Yang et al., CVPR 2022, 2204.03610, Eq. 1-3).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medrobust.attacks.objectives import full_precision


class ContrastiveLoss(nn.Module):
    """Cross-entropy of images over captions and of captions over images, averaged; likes share the target evenly.

    With labels that all differ it is CLIP's own loss.
    """

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (B, B, 1, 1) of images (rows) for captions (columns), label (B, 1, 1, 1) of each pair -> scalar.

        Raises:
            ValueError: not as many captions as images, or as labels.
        """
        scores = full_precision(logits.as_subclass(Tensor)).flatten(1)
        y = label.as_subclass(Tensor).flatten()
        if scores.shape != (len(y), len(y)):
            raise ValueError(
                f"expected a square of logits, one caption and one label an image, got {tuple(logits.shape)} and "
                f"{len(y)} labels: pass input_ids of the batch's captions to the network"
            )
        target = (y[:, None] == y[None]).to(scores.dtype)
        target = target / target.sum(1, keepdim=True)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2
