"""The worst of several attacks for each case, and the voxel counts from which overlaps follow.

Members are predictions for the same cases, one under each attack. The clean image is a member too: pass it as member 0,
then no worst case is better than the clean one, and ties go to it. The attacker plays one member a case.

Where a metric is a mean over cases, each case's worst member is the exact worst case (``worst``), for that metric: the
member with the lowest Dice need not have the largest HD95, so choose by each metric for itself. Where counts are pooled
over cases first, cases depend on one another: see ``medrobust.pooled``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Each case's worst member: its ``value`` and its index ``member``, both ``(cases,)``."""

    value: NDArray[np.float64]
    member: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Voxels of each class found (``tp``), invented (``fp``) and missed (``fn``); ``(members, cases, K)`` int64."""

    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    fn: NDArray[np.int64]

    @classmethod
    def of(cls, confusions: ArrayLike) -> Counts:
        """From matrices ``(members, cases, K, K)`` of ``confusion``: stack members, join batches of cases."""
        matrices = np.asarray(confusions)
        if matrices.ndim != 4 or matrices.shape[-1] != matrices.shape[-2] or matrices.dtype.kind not in "iu":
            raise ValueError(
                f"expected integer confusion matrices (members, cases, K, K), got {matrices.dtype} of shape "
                f"{matrices.shape}; stack the members and join the cases along axis 1"
            )
        matrices = matrices.astype(np.int64)
        tp = np.diagonal(matrices, axis1=-2, axis2=-1).copy()
        return cls(tp=tp, fp=matrices.sum(-2) - tp, fn=matrices.sum(-1) - tp)

    @property
    def union(self) -> NDArray[np.int64]:
        """Voxels of prediction or reference, the denominator of IoU; its numerator is ``tp``."""
        return self.tp + self.fp + self.fn

    @property
    def size(self) -> NDArray[np.int64]:
        """Voxels of prediction plus voxels of reference, the denominator of Dice; its numerator is ``2 tp``."""
        return 2 * self.tp + self.fp + self.fn

    def dice(self) -> NDArray[np.float64]:
        """Dice of each class ``(members, cases, K)``; a class absent from prediction and reference counts 1."""
        return _ratio(2 * self.tp, self.size)

    def iou(self) -> NDArray[np.float64]:
        """IoU of each class ``(members, cases, K)``; a class absent from prediction and reference counts 1."""
        return _ratio(self.tp, self.union)

    def accuracy(self) -> NDArray[np.float64]:
        """Share of voxels with the right class ``(members, cases)``; 1 for a case whose voxels are all ignored."""
        return _ratio(self.tp.sum(-1), (self.tp + self.fn).sum(-1))


def confusion(
    prediction: Tensor, reference: Tensor, num_classes: int, *, ignore: Tensor | None = None
) -> NDArray[np.int64]:
    """Confusion matrices ``[case, reference class, predicted class]``; class maps ``(B, 1, *S)`` -> ``(B, K, K)``.

    Voxels with a negative label have no say, nor have those where ``ignore`` ``(B, 1, *S)`` is true, whatever is
    predicted there. Raises ValueError for maps of other shapes, fractions, or classes outside 0 to K - 1.
    """
    # Reports read worst cases from records, where no torch is needed.
    import torch
    from monai.utils import convert_to_tensor

    from medrobust.metrics._class_maps import class_maps

    prediction, reference = (convert_to_tensor(classes, track_meta=False) for classes in (prediction, reference))
    ignored = reference < 0
    if ignore is not None:
        mask = convert_to_tensor(ignore, track_meta=False)
        if mask.shape != reference.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected ignore as bool of shape {tuple(reference.shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}; compare with the value to ignore, as in label == 255"
            )
        ignored = ignored | mask
    if prediction.shape == reference.shape:  # else class_maps refuses them; masks would be broadcast
        prediction, reference = prediction.masked_fill(ignored, 0), reference.masked_fill(ignored, 0)
    prediction, reference = class_maps(prediction, reference, num_classes)
    cases = len(prediction)
    first = torch.arange(cases, device=prediction.device).view(-1, *[1] * (prediction.ndim - 1)) * num_classes
    cells = ((first + reference) * num_classes + prediction)[~ignored]
    matrices = torch.bincount(cells, minlength=cases * num_classes**2).view(cases, num_classes, num_classes)
    return matrices.cpu().numpy()


def worst(values: ArrayLike, larger_is_worse: bool = False) -> Worst:
    """Each case's worst member by one metric, exactly; ``values`` ``(members, cases)``. Ties go to the first member.

    The mean of ``value`` is the worst mean over cases that one member a case can reach. Raises ValueError for NaN.
    """
    table = _checked(values, 2, "(members, cases)")
    member = (table.argmax(0) if larger_is_worse else table.argmin(0)).astype(np.int64)
    return Worst(value=table[member, np.arange(table.shape[1])], member=member)


def joint(values: ArrayLike, member: ArrayLike) -> NDArray[np.float64]:
    """Per-class values of the selected members: ``(members, cases, K)``, ``(cases,)`` -> ``(cases, K)``.

    All classes of a case are of one image, so the table can be reached. Say "joint" where it is shown.
    """
    table = _checked(values, 3, "(members, cases, K)")
    chosen = np.asarray(member)
    if chosen.shape != (table.shape[1],) or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"expected one member index a case, {table.shape[1]} integers, got {chosen.dtype} of shape "
            f"{chosen.shape}; pass worst(...).member"
        )
    return table[chosen, np.arange(table.shape[1])]


def envelope(values: ArrayLike, larger_is_worse: bool = False) -> NDArray[np.float64]:
    """Each class's own worst value: ``(members, cases, K)`` -> ``(cases, K)``.

    Classes of a case may come from different images, so no attack reaches the whole table. Say "envelope" where it is
    shown: it bounds every ``joint`` table from the worse side.
    """
    table = _checked(values, 3, "(members, cases, K)")
    return table.max(0) if larger_is_worse else table.min(0)


def _checked(values: ArrayLike, dimensions: int, shape: str) -> NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != dimensions or not table.size:
        raise ValueError(
            f"expected values {shape}, at least one each, got shape {table.shape}; stack the members first"
        )
    if np.isnan(table).any():
        raise ValueError("expected a number for every member and case, got nan; give empty cases their stated value")
    return table


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.ones(denominator.shape), where=denominator > 0)
