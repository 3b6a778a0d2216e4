"""Objectives that look at voxels one by one: where the model is right, how sure it is, and what a flip would be worth.

Plain cross-entropy makes a weak attack on segmentation: voxels that are wrong already go on pulling. Each objective
here weighs voxels in another way (Croce et al., ECCV 2024, 2306.12941, and the works it builds on). All of them

* return the mean over voxels, per case, (B,); voxels labelled -1 have no say;
* understand a softmax head, and sigmoid channels as independent two-class voxels: logit z is the softmax of (0, z);
* hold weights fixed in differentiation: which voxels are right, and what they weigh, has no gradient;
* with ``targeted=True`` look at voxels that are not yet what the attacker wants, instead of those that are right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.attacks.objectives import Head, check_label, full_precision, is_softmax


@dataclass(frozen=True)
class Voxels:
    """What the objectives know of each voxel; all (B, R, V) with R = 1 (softmax) or one row a sigmoid channel.

    Attributes:
        logits: (B, K, V) of the head.
        label: classes, or 0 and 1; -1 has no say.
        log_p: log-probability of the label.
        valid: whether the voxel has a say.
        right: whether the prediction is the label (and the voxel has a say).
    """

    logits: Tensor
    label: Tensor
    log_p: Tensor
    valid: Tensor
    right: Tensor
    softmax: bool

    @classmethod
    def of(cls, logits: Tensor, label: Tensor, head: Head) -> Voxels:
        check_label(logits, label, head)
        u, y = full_precision(logits).flatten(2), label.flatten(2).long()
        valid = y >= 0
        safe = y.clamp_min(0)
        softmax = is_softmax(logits, head)
        if softmax:
            log_p = torch.log_softmax(u, 1).gather(1, safe)
            right = u.detach().max(1, keepdim=True).indices == y
        else:
            log_p = F.logsigmoid(u * (2 * safe - 1))
            right = (u.detach() > 0).long() == y
        return cls(logits=u, label=y, log_p=log_p, valid=valid, right=right & valid, softmax=softmax)

    def mean(self, values: Tensor) -> Tensor:
        """Over the voxels that have a say, per case, (B,); 0 where none has."""
        return torch.where(self.valid, values, 0).flatten(1).sum(1) / self.valid.flatten(1).sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class VoxelLoss(ABC):
    """Base: a value per voxel, averaged.

    Args:
        head: how the channels are read; one channel is always a sigmoid.
        targeted: the label is what the attacker wants to see; set by the attack.
    """

    head: Head = "softmax"
    targeted: bool = False

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        voxels = Voxels.of(logits, label, self.head)
        return voxels.mean(self.values(voxels))

    @abstractmethod
    def values(self, voxels: Voxels) -> Tensor:
        """One number a voxel, (B, R, V)."""

    def looked_at(self, voxels: Voxels) -> Tensor:
        """Voxels that still have to flip, (B, R, V) bool."""
        return voxels.valid & ~voxels.right if self.targeted else voxels.right


@dataclass(frozen=True, kw_only=True)
class MaskedCE(VoxelLoss):
    """Cross-entropy of the voxels that the model still gets right (2306.12941, Eq. 5): 1[right] (-log p)."""

    def values(self, voxels: Voxels) -> Tensor:
        return torch.where(self.looked_at(voxels), -voxels.log_p, 0)


@dataclass(frozen=True, kw_only=True)
class BalancedMaskedCE(VoxelLoss):
    """Masked cross-entropy with each class weighed by its rarity (2306.12941, Sec. 3.2).

    Args:
        weights: one a class (for sigmoid channels two: outside and inside), used as they are. ``None``: the inverse of
            each class's voxel count in the case itself, scaled to sum to 1.
    """

    weights: tuple[float, ...] | None = None

    def values(self, voxels: Voxels) -> Tensor:
        classes = voxels.logits.shape[1] if voxels.softmax else 2
        if self.weights is not None and len(self.weights) != classes:
            raise ValueError(
                f"expected {classes} class weights, got {len(self.weights)}: one a class, background first"
            )
        return torch.where(self.looked_at(voxels), -voxels.log_p, 0) * self._weight(voxels, classes)

    def _weight(self, voxels: Voxels, classes: int) -> Tensor:
        y = voxels.label.clamp_min(0)
        if self.weights is not None:
            return torch.tensor(self.weights, dtype=voxels.log_p.dtype, device=y.device)[y]
        counts = torch.stack([((voxels.label == k) & voxels.valid).sum(-1) for k in range(classes)], -1)
        rarity = torch.where(counts > 0, 1 / counts.clamp_min(1).to(voxels.log_p.dtype), 0)
        return (rarity / rarity.sum(-1, keepdim=True).clamp_min(1e-12)).gather(-1, y)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(VoxelLoss):
    """Jensen-Shannon divergence of the prediction and the label (2306.12941, Eq. 7): between 0 and log 2.

    Bounded, and its gradient fades for voxels that are wrong for good, so it needs no mask. Computed from the
    log-probability of the label alone; by way of the other classes it would be NaN once one of them underflows.
    """

    def values(self, voxels: Voxels) -> Tensor:
        p = voxels.log_p.exp()
        log2, mixed = math.log(2), torch.log1p(p)
        return 0.5 * (log2 - mixed) + 0.5 * (p * (log2 + voxels.log_p - mixed) + (1 - p) * log2)


@dataclass(frozen=True, kw_only=True)
class MaskedSpherical(VoxelLoss):
    """Minus the label's share of the logits' length, where the model is right: -1[right] u_y / |u| (2306.12941v1).

    Needs a softmax head: with two classes that a sigmoid stands for, its gradient vanishes.

    Args:
        masked: ``False`` looks at all voxels; that form is meant for tracking progress.
    """

    masked: bool = True

    def values(self, voxels: Voxels) -> Tensor:
        if not voxels.softmax:
            raise ValueError("expected a softmax head for MaskedSpherical, got sigmoid channels: use MaskedMargin")
        length = torch.linalg.vector_norm(voxels.logits, dim=1, keepdim=True)
        share = voxels.logits.gather(1, voxels.label.clamp_min(0)) / length.clamp_min(1e-12)
        return -torch.where(self.looked_at(voxels) if self.masked else voxels.valid, share, 0)


@dataclass(frozen=True, kw_only=True)
class MaskedMargin(VoxelLoss):
    """Minus the bounded margin where the model is right: -1[right] m / sqrt(tau^2 + m^2).

    The margin m is the label's logit above the best other (softmax), or the logit with the label's sign (sigmoid).
    Its gradient is largest near the decision: the spherical loss's idea in a form that a sigmoid has too.

    Args:
        tau: margin at which the slope has fallen to a third, in logits.
    """

    tau: float = 1.0

    def values(self, voxels: Voxels) -> Tensor:
        y = voxels.label.clamp_min(0)
        if voxels.softmax:
            own = voxels.logits.gather(1, y)
            margin = own - voxels.logits.scatter(1, y, -torch.inf).amax(1, keepdim=True)
        else:
            margin = voxels.logits * (2 * y - 1)
        bounded = margin / torch.sqrt(self.tau**2 + margin**2)
        return -torch.where(self.looked_at(voxels), bounded, 0)


@dataclass(frozen=True, kw_only=True)
class MCEDice(VoxelLoss):
    """Masked cross-entropy, each voxel weighed by the Dice that its flip would cost.

    With n label and m predicted voxels of a class and Dice D = 2 TP / (n + m), losing a true voxel costs
    (2 - D) / (n + m) and a new false one costs D / (n + m). Right foreground voxels weigh the first of their class;
    right background voxels the second, of the class that is next in line there. The weights follow the prediction from
    step to step. The first false voxel of a class that neither map shows costs its whole Dice, 1, wherever it appears:
    that 1 is shared among all voxels that have a say, for at full weight each of them would drown the other classes.
    Toward a label without a class, the 1 is shared among the voxels that still show it.
    """

    def values(self, voxels: Voxels) -> Tensor:
        # A targeted attack wants the label's Dice to rise: it looks at what is missing.
        return torch.where(self.looked_at(voxels), -voxels.log_p, 0) * self._weight(voxels)

    def _weight(self, voxels: Voxels) -> Tensor:
        u, y, valid = voxels.logits.detach(), voxels.label, voxels.valid
        if not voxels.softmax:
            pred = (u > 0) & valid
            true = (y == 1) & valid
            size = (pred.sum(-1, keepdim=True) + true.sum(-1, keepdim=True)).to(u.dtype)
            dice = 2 * (pred & true).sum(-1, keepdim=True) / size.clamp_min(1)
            gain = self._gain(dice, size, true.sum(-1, keepdim=True), valid.sum(-1, keepdim=True))
            return torch.where(true, (2 - dice) / size.clamp_min(1), gain)
        classes = torch.arange(u.shape[1], device=u.device).view(1, -1, 1)
        pred, true = (u.max(1, keepdim=True).indices == classes) & valid, (y == classes) & valid
        size = (pred.sum(-1) + true.sum(-1)).to(u.dtype)
        dice = 2 * (pred & true).sum(-1) / size.clamp_min(1)
        lose = torch.where(size > 0, (2 - dice) / size.clamp_min(1), 0)
        gain = self._gain(dice, size, true.sum(-1), valid.sum(-1))
        runner_up = u[:, 1:].max(1).indices + 1
        own = y[:, 0].clamp_min(0)
        return torch.where(own > 0, lose.gather(1, own), gain.gather(1, runner_up))[:, None]

    def _gain(self, dice: Tensor, size: Tensor, labelled: Tensor, voxels: Tensor) -> Tensor:
        """What a false voxel of each class is worth: the Dice it costs, or, when targeted, what its going brings."""
        gain = torch.where(size > 0, dice / size.clamp_min(1), 1 / voxels.clamp_min(1))
        return torch.where(labelled == 0, 1 / size.clamp_min(1), gain) if self.targeted else gain


@dataclass(frozen=True, kw_only=True)
class SegPGDLoss(VoxelLoss):
    """Cross-entropy that moves its weight from right to wrong voxels (Gu et al., ECCV 2022, 2207.12391, Eq. 4-6).

    Right voxels weigh 1 - lambda and wrong ones lambda; over T steps lambda goes from 0 to just below 1/2, as
    (t - 1) / (2 T).

    Args:
        wrong: lambda, the weight of wrong voxels; set by the attack from step to step.
    """

    wrong: float = 0.0

    def at(self, step: int, steps: int) -> SegPGDLoss:
        return replace(self, wrong=step / (2 * steps))

    def values(self, voxels: Voxels) -> Tensor:
        ce = -voxels.log_p
        return torch.where(self.looked_at(voxels), (1 - self.wrong) * ce, self.wrong * ce)


@dataclass(frozen=True, kw_only=True)
class CosPGDLoss(VoxelLoss):
    """Cross-entropy weighed by how alike prediction and label are (Agnihotri et al., ICML 2024, 2302.02213, Eq. 5).

    The weight is the cosine of the softmax and the one-hot label, p_y / |p|; for a targeted attack 1 minus it. A
    sigmoid channel counts as the two classes it stands for.
    """

    def values(self, voxels: Voxels) -> Tensor:
        with torch.no_grad():
            p = voxels.log_p.exp()
            length = (
                torch.linalg.vector_norm(torch.softmax(voxels.logits, 1), dim=1, keepdim=True)
                if voxels.softmax
                else torch.sqrt(p**2 + (1 - p) ** 2)
            )
            alike = p / length
        return -voxels.log_p * (1 - alike if self.targeted else alike)
