"""Dice as VAFA (Hanif et al., MICCAI 2023) and the benchmarks after it report it. For comparison with their tables."""

import torch
from torch import Tensor

from medrobust.metrics._class_maps import counts
from medrobust.metrics.dice import dice

IDEAL = 1.0
HIGHER_IS_BETTER = True
UNIT = ""
INPUTS = "classes"


def dice_as_published(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Mean Dice of a case over the classes its reference holds, **background included**.

    Class maps ``(B, 1, *S)`` -> ``(B, 1)`` in [0, 1]. A class absent from the reference is left out of the mean, so an
    invented organ costs nothing; the easy background lifts every number. Use ``dice`` for your own conclusions. Where
    every voxel of the reference is labelled -1 the published mean is undefined; 1 stands in, as NaN is never returned.
    """
    value = dice(prediction, reference, num_classes)
    present = counts(prediction, reference, num_classes).reference > 0
    number = present.sum(1, keepdim=True)
    mean = torch.where(present, value, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    return torch.where(number > 0, mean, 1.0)
