"""What an attacker maximises, one number per case: larger is worse for the model.

Every objective takes ``logits`` (B, K, *S) and ``label`` and returns (B,); a case never depends on its neighbours.
Three kinds of head are understood:

* softmax, K > 1: ``label`` (B, 1, *S) of integer classes 0..K-1;
* one sigmoid channel, K = 1: ``label`` (B, 1, *S) of 0 and 1;
* several sigmoid channels that may overlap, ``head="sigmoid"``: ``label`` (B, K, *S) of 0 and 1.

Voxels labelled -1 have no say.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Head = Literal["softmax", "sigmoid"]

IGNORED = -1
"""The label of voxels that have no say."""


class Objective(Protocol):
    """(logits, label) -> (B,), larger is worse for the model."""

    @property
    def head(self) -> Head:
        """How the model's channels are read."""
        ...

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor: ...


def described(objective: Any) -> str:
    """The ``repr`` of a dataclass whose ``classes`` are told where some are chosen: records name attacks by it."""
    told = [field.name for field in fields(objective) if field.name != "classes" or objective.classes is not None]
    return f"{type(objective).__name__}({', '.join(f'{name}={getattr(objective, name)!r}' for name in told)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class SoftDice:
    """One minus the soft Dice of the foreground, averaged over its classes: attack the number that is reported.

    Dice of class k is (2 sum p t + smooth) / (sum p + sum t + smooth) with probabilities p and one-hot labels t.
    Classes absent from the label count too: inventing a structure lowers the score of a case as missing one does.

    Args:
        head: how the channels are read; one channel is always a sigmoid.
        include_background: also count channel 0 of a softmax head.
        smooth: in voxels; it decides what an absent class is worth.
        classes: only these count (:func:`rows_of`), to attack one structure; ``None``: all.
    """

    head: Head = "softmax"
    include_background: bool = False
    smooth: float = 1.0
    classes: tuple[int, ...] | None = None

    __repr__ = described

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        p, t = probabilities(logits, label, self.head)
        rows = rows_of(self.classes, logits, self.head, include_background=self.include_background)
        p, t = p[:, rows], t[:, rows]
        overlap = (p * t).sum(-1)
        dice = (2 * overlap + self.smooth) / (p.sum(-1) + t.sum(-1) + self.smooth)
        return 1 - dice.mean(1)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy over voxels (softmax), or mean binary cross-entropy over voxels and channels (sigmoid)."""

    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        check_label(logits, label, self.head)
        logits, valid = full_precision(logits), label.flatten(1) >= 0
        if is_softmax(logits, self.head):
            voxels = F.cross_entropy(logits, label[:, 0].long(), reduction="none", ignore_index=IGNORED).flatten(1)
        else:
            target = label.to(logits.dtype)
            voxels = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1)
            voxels = torch.where(valid, voxels, 0)
        return voxels.sum(1) / valid.sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class DiceCE:
    """Dice plus cross-entropy as MONAI's ``DiceCELoss(squared_pred=True, smooth_nr=0, smooth_dr=1e-6)``, per case.

    This is what the VAFA paper calls its Dice loss (2307.07269): background included, squared denominators.
    """

    head: Head = "softmax"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        p, t = probabilities(logits, label, self.head)
        dice = 2 * (p * t).sum(-1) / ((p * p).sum(-1) + (t * t).sum(-1) + 1e-6)
        return 1 - dice.mean(1) + CrossEntropy(head=self.head)(logits, label)


def is_softmax(logits: Tensor, head: Head) -> bool:
    """Whether the channels compete."""
    return head == "softmax" and logits.shape[1] > 1


def rows_of(
    classes: tuple[int, ...] | None, logits: Tensor, head: Head, *, include_background: bool = False
) -> slice | list[int]:
    """Which channels of the logits (B, K, *S) a mean over classes takes.

    Classes are numbered as in the label: channels of a softmax head, of overlapping sigmoid channels from 0, and 1 for
    what a single sigmoid channel shows. ``None`` is all, without the background of a softmax head.

    Raises:
        ValueError: a class that the logits have no channel for.
    """
    channels = logits.shape[1]
    if classes is None:
        return slice(0 if include_background or not is_softmax(logits, head) else 1, None)
    rows = [index - 1 if channels == 1 else index for index in classes]
    if not rows or not all(0 <= row < channels for row in rows):
        raise ValueError(f"expected classes that logits {tuple(logits.shape)} of a {head} head have, got {classes}")
    return rows


def predict(logits: Tensor, head: Head) -> Tensor:
    """Hard decision: classes (B, 1, *S) for a softmax head, 0 or 1 per channel (B, K, *S) for a sigmoid head."""
    # max, because argmax over channels takes ten times as long on a CPU.
    return logits.max(1, keepdim=True).indices if is_softmax(logits, head) else (logits > 0).long()


def probabilities(logits: Tensor, label: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot labels, both (B, K, voxels), in float32 at least; both 0 where a voxel has no say."""
    check_label(logits, label, head)
    flat, y = full_precision(logits).flatten(2), label.flatten(2)
    valid = y >= 0
    if not is_softmax(logits, head):
        return torch.where(valid, torch.sigmoid(flat), 0), (y > 0).to(flat.dtype)
    classes = torch.arange(flat.shape[1], device=flat.device).view(1, -1, 1)
    return torch.where(valid, torch.softmax(flat, 1), 0), (y == classes).to(flat.dtype)


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: sums over millions of voxels need it."""
    return logits if logits.dtype == torch.float64 else logits.float()


_RANGES = WeakIdKeyDictionary()


def _range_of(label: Tensor) -> tuple[float, float]:
    """Smallest and largest value; asked once of a label, since attacks come with the same one in every step."""
    if label.is_inference():  # these do not tell when they are changed
        return label.min().item(), label.max().item()
    known: tuple[int, float, float] | None = _RANGES.get(label)
    if known is None or known[0] != label._version:
        known = _RANGES[label] = (label._version, label.min().item(), label.max().item())
    return known[1:]


def check_label(logits: Tensor, label: Tensor, head: Head) -> None:
    """Refuse a label that the head cannot be compared with.

    Raises:
        ValueError: other shape, or classes that the logits have no channel for.
    """
    channels = 1 if is_softmax(logits, head) else logits.shape[1]
    expected = (logits.shape[0], channels, *logits.shape[2:])
    if tuple(label.shape) != expected:
        raise ValueError(
            f"expected a label of shape {expected} for logits {tuple(logits.shape)} and a {head} head, "
            f"got {tuple(label.shape)}. Is the head right, and does the label lie on the image's grid?"
        )
    classes = logits.shape[1] if channels == 1 and logits.shape[1] > 1 else 2
    low, high = _range_of(label)
    if low < IGNORED or high >= classes:
        raise ValueError(
            f"expected label values in 0..{classes - 1} for logits {tuple(logits.shape)} and a {head} head, "
            f"got {low:g}..{high:g}. Map the label to the network's classes first; only {IGNORED}, for voxels without "
            "a say, may lie outside"
        )
