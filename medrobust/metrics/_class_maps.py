"""Class maps at the door, and the voxel counts from which overlap and emptiness follow.

Voxels that the reference labels -1 have no say: they are in no count, and background in both maps for what looks at
surfaces.
"""

from typing import Literal, NamedTuple

import torch
from monai.utils import convert_to_tensor
from torch import Tensor

IGNORED = -1

Status = Literal["ok", "both empty", "missed", "invented"]


class Counts(NamedTuple):
    """Voxels per case and class, each ``(B, K)``."""

    overlap: Tensor
    prediction: Tensor
    reference: Tensor


def class_maps(prediction: Tensor, reference: Tensor, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Both maps as plain ``int64`` tensors ``(B, 1, *S)``, ignored voxels as background.

    Raises:
        ValueError: anything that is no class map.
    """
    prediction, reference = _class_maps(prediction, reference, num_classes)
    ignored = reference == IGNORED
    return prediction.masked_fill(ignored, 0), reference.masked_fill(ignored, 0)


def _class_maps(prediction: Tensor, reference: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor]:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"expected prediction and reference of one shape, got {tuple(prediction.shape)} and "
            f"{tuple(reference.shape)}; invert the transforms or resample one of them"
        )
    return _class_map(prediction, "prediction", num_classes, 0), _class_map(
        reference, "reference", num_classes, IGNORED
    )


def _class_map(classes: Tensor, name: str, num_classes: int | None, lowest: int) -> Tensor:
    # Arithmetic on a MetaTensor copies its metadata each time, and a metric has no use for it.
    classes = convert_to_tensor(classes, track_meta=False)
    if classes.ndim < 3 or classes.shape[1] != 1 or classes.numel() == 0:
        raise ValueError(
            f"expected {name} as class indices (B, 1, *S), got shape {tuple(classes.shape)}; "
            "take the argmax over the channels of logits or one-hot maps with keepdim=True"
        )
    whole = classes.long()
    if classes.is_floating_point() and not torch.equal(whole.to(classes), classes):
        raise ValueError(f"expected whole class indices in {name}, got fractions; threshold or argmax first")
    low, high = whole.aminmax()
    if low < lowest or (num_classes is not None and high >= num_classes):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        other = f", and {IGNORED} for voxels without a say" if lowest < 0 else ""
        raise ValueError(
            f"expected classes from 0{top}{other} in {name}, got {int(low)} to {int(high)}; "
            "correct num_classes or map the stray classes to 0"
        )
    return whole


def counts(prediction: Tensor, reference: Tensor, num_classes: int) -> Counts:
    """Exact voxel counts from one confusion matrix a case: no one-hot volume is built."""
    prediction, reference = _class_maps(prediction, reference, num_classes)
    # Ignored voxels go to one more cell behind the matrix.
    cells = torch.where(reference == IGNORED, num_classes**2, reference * num_classes + prediction).flatten(1)
    confusion = torch.stack([torch.bincount(cell, minlength=num_classes**2 + 1)[:-1] for cell in cells])
    confusion = confusion.view(-1, num_classes, num_classes)
    return Counts(confusion.diagonal(dim1=1, dim2=2), confusion.sum(1), confusion.sum(2))


def status(prediction: Tensor, reference: Tensor, num_classes: int) -> list[list[Status]]:
    """What kind of number each class of each case has; class maps ``(B, 1, *S)`` -> B lists of K words.

    "ok": both hold the class. "both empty": neither does. "missed": the reference alone does. "invented": the
    prediction alone does.
    """
    _, predicted, referenced = counts(prediction, reference, num_classes)
    words: dict[tuple[bool, bool], Status] = {
        (True, True): "ok",
        (False, False): "both empty",
        (False, True): "missed",
        (True, False): "invented",
    }
    pairs = torch.stack([predicted > 0, referenced > 0], dim=-1).tolist()
    return [[words[in_prediction, in_reference] for in_prediction, in_reference in case] for case in pairs]
