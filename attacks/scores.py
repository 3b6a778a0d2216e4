"""What the best image of an attack is chosen by: the number that will be reported, not the loss that was climbed.

A score is an objective without a gradient: (logits, label) -> (B,), larger is worse for the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medrobust.attacks.objectives import Head, Objective, check_label, described, is_softmax, predict, rows_of
from medrobust.attacks.voxel_losses import VoxelLoss


@dataclass(frozen=True, kw_only=True, repr=False)
class HardDice:
    """One minus the Dice of the prediction, averaged over the foreground classes, as it is reported.

    A class that neither map shows has a Dice of 1; one that only one of them shows, 0. Voxels of -1 have no say.
    Counted by one ``bincount`` for the whole batch.

    Args:
        head: how the channels are read.
        classes: only these count (:func:`medrobust.attacks.objectives.rows_of`); ``None``: all of the foreground.
    """

    head: Head = "softmax"
    classes: tuple[int, ...] | None = None

    __repr__ = described

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        check_label(logits, label, self.head)
        pred, y = predict(logits, self.head).flatten(2), label.flatten(2).long()
        if is_softmax(logits, self.head):
            hits, size = _counts(pred[:, 0], y[:, 0], logits.shape[1])
        else:
            valid = y >= 0
            hits = ((pred == 1) & (y == 1)).sum(-1)
            size = ((pred == 1) & valid).sum(-1) + (y == 1).sum(-1)
        rows = rows_of(self.classes, logits, self.head)
        hits, size = hits[:, rows], size[:, rows]
        exact = torch.promote_types(logits.dtype, torch.float32)
        dice = torch.where(size > 0, 2 * hits.to(exact) / size.clamp_min(1), 1)
        return 1 - dice.mean(1)


@dataclass(frozen=True, kw_only=True)
class VoxelError:
    """Share of voxels that are wrong: one minus the accuracy of 2306.12941.

    Args:
        head: how the channels are read.
        of_all: divide by all voxels, those without a say included (they count as right): the published form.
    """

    head: Head = "softmax"
    of_all: bool = False

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        check_label(logits, label, self.head)
        y = label.flatten(1).long()
        wrong = ((predict(logits, self.head).flatten(1) != y) & (y >= 0)).sum(1)
        voxels = y.shape[1] if self.of_all else (y >= 0).sum(1).clamp_min(1)
        return wrong.to(torch.promote_types(logits.dtype, torch.float32)) / voxels


@dataclass(frozen=True, kw_only=True, repr=False)
class MissedForeground:
    """Share of the label's foreground voxels that the prediction gives to something else: one minus their recall.

    What an attack that erases wants, and what attacks of minimal norm on segmentation count (2206.07179). Voxels of
    overlapping channels count in each. Without any foreground it is 0.

    Args:
        head: how the channels are read.
        classes: only these count (:func:`medrobust.attacks.objectives.rows_of`); ``None``: all of the foreground.
    """

    head: Head = "softmax"
    classes: tuple[int, ...] | None = None

    __repr__ = described

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        check_label(logits, label, self.head)
        pred, y = predict(logits, self.head).flatten(2), label.flatten(2).long()
        rows = rows_of(self.classes, logits, self.head)
        if is_softmax(logits, self.head):
            wanted = torch.arange(logits.shape[1], device=y.device)[rows]
            true = torch.isin(y, wanted)
        else:
            pred, true = pred[:, rows], y[:, rows] == 1
            y = y[:, rows]
        missed = ((pred != y) & true).flatten(1).sum(1)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return missed.to(exact) / true.flatten(1).sum(1).clamp_min(1)


def reported(head: Head, *, targeted: bool, classes: tuple[int, ...] | None = None) -> HardDice | VoxelError:
    """The number that an attack is reported by: Dice, or toward a target the share of voxels that are not as wanted.

    Of an attack on some classes it is their Dice.
    Dice cannot tell there: of a class that shall be absent it is 0 until the last voxel is gone.
    """
    return VoxelError(head=head) if targeted else HardDice(head=head, classes=classes)


def ceiling(criterion: Objective, *, targeted: bool) -> float:
    """The score, as the attacker sees it, that no image can exceed: who reached it need not search on."""
    bounded = isinstance(criterion, HardDice | VoxelError | MissedForeground)
    return math.inf if not bounded else 0.0 if targeted else 1.0


def chooser(objective: Objective, *, targeted: bool) -> Objective:
    """What the best image of an attack on ``objective`` is chosen by: the objective itself where it can tell.

    An objective that looks at some voxels only shrinks while the attack succeeds, and one that changes from step to
    step has no values to compare: there it is the reported number.
    """
    if isinstance(objective, VoxelLoss) or hasattr(objective, "at"):
        return reported(objective.head, targeted=targeted)
    return objective


def _counts(pred: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Voxels where both maps (B, V) show a class, and the sum of each map's voxels of it; (B, K) integers."""
    cases = torch.arange(len(pred), device=pred.device)[:, None]
    # Row -1 collects the voxels without a say.
    cell = torch.where(label >= 0, (cases * classes + label) * classes + pred, len(pred) * classes**2)
    table = torch.bincount(cell.flatten(), minlength=len(pred) * classes**2 + 1)[:-1].view(-1, classes, classes)
    return table.diagonal(dim1=1, dim2=2), table.sum(1) + table.sum(2)
