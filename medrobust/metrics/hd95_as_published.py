"""HD95 as VAFA (Hanif et al., MICCAI 2023) and the benchmarks after it report it. For comparison with their tables."""

import math

import torch
from torch import Tensor

from medrobust.metrics._class_maps import counts
from medrobust.metrics.hd95 import hd95

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "voxels"
INPUTS = "classes"


def hd95_as_published(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Mean HD95 of a case in **voxels**, background included, over the classes found in both maps.

    Class maps ``(B, 1, *S)`` -> ``(B, 1)``. Missed and invented classes are left out of the mean, so a model that loses
    an organ altogether looks better here than one that finds half of it. Use ``hd95`` for your own conclusions. Where
    the maps share no class the published mean is undefined; the diagonal in voxels stands in, as NaN is never returned.
    """
    value = hd95(prediction, reference, num_classes)
    _, predicted, referenced = counts(prediction, reference, num_classes)
    shared = (predicted > 0) & (referenced > 0)
    number = shared.sum(1, keepdim=True)
    mean = torch.where(shared, value, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    return torch.where(number > 0, mean, math.hypot(*prediction.shape[2:]))
