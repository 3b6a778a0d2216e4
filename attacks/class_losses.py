"""Objectives for models that give one answer an image, such as CLIP's: logits (B, K, 1, 1), label (B, 1, 1, 1).

They take maps as well, and then average over voxels; voxels labelled -1 have no say. Cross-entropy is in
``objectives``. With ``targeted=True`` an attack brings its value down: toward the label instead of away from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medrobust.attacks.objectives import Head, check_label, full_precision, is_softmax


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The best other logit minus the label's: above 0 where the model is wrong (Carlini & Wagner, 1608.04644)."""

    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        u, y, valid = _flat(self, logits, label)
        return _mean(_best_other(u, y) - u.gather(1, y), valid)


@dataclass(frozen=True, kw_only=True)
class DLR:
    """Difference of logits ratio: the margin over the gap from the first to the third logit (2003.01690, Eq. 6).

    It does not change when the logits are scaled, so a model cannot hide behind a large temperature. Needs three
    channels. A targeted attack sees the targeted form of Eq. 7, for four channels, as a distance from the label.

    Args:
        targeted: the label is what the attacker wants to see; set by the attack.
    """

    head: Head = "softmax"
    targeted: bool = False

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        u, y, valid = _flat(self, logits, label)
        least = 4 if self.targeted else 3
        if u.shape[1] < least:
            raise ValueError(f"expected at least {least} channels for DLR, got {u.shape[1]}: use Margin")
        top = u.topk(least, dim=1).values
        lowest = (top[:, 2:3] + top[:, 3:4]) / 2 if self.targeted else top[:, 2:3]
        gap = (top[:, :1] - lowest).clamp_min(1e-12)
        return _mean((_best_other(u, y) - u.gather(1, y)) / gap, valid)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Minus the label's logit: pushes an image away from a text, whatever else it comes close to.

    With a softmax head the label is one channel's number. With ``head="sigmoid"`` it marks any number of channels
    (B, K, *S), such as all captions of an image, and their mean logit counts. ``targeted=True`` of the attack pulls the
    image toward them.
    """

    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        if is_softmax(logits, self.head):
            u, y, valid = _flat(self, logits, label)
            return _mean(-u.gather(1, y), valid)
        check_label(logits, label, self.head)
        marked = (label > 0).flatten(1)
        u = full_precision(logits).flatten(1)
        return -torch.where(marked, u, 0).sum(1) / marked.sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Squared length of what the model returns, summed over channels, averaged over voxels; the label has no say.

    For a model that returns how far an embedding moved, as FARE attacks it (2402.12336, Eq. 3).
    """

    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        return full_precision(logits).flatten(2).square().sum(1).mean(1)


def _flat(objective: Margin | DLR | Similarity, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K, V), the label's channel (B, 1, V), and whether the voxel has a say."""
    if not is_softmax(logits, objective.head):
        raise ValueError(
            f"expected two or more channels that compete for {type(objective).__name__}, got {logits.shape[1]} with a "
            f"{objective.head} head: use MaskedMargin"
        )
    check_label(logits, label, objective.head)
    y = label.flatten(2).long()
    return full_precision(logits).flatten(2), y.clamp_min(0), y >= 0


def _best_other(u: Tensor, y: Tensor) -> Tensor:
    return u.scatter(1, y, -torch.inf).amax(1, keepdim=True)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)
