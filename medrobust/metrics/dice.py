"""Dice overlap of each class."""

import torch
from torch import Tensor

from medrobust.metrics._class_maps import counts

IDEAL = 1.0
HIGHER_IS_BETTER = True
UNIT = ""
INPUTS = "classes"


def dice(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Dice of each class; class maps ``(B, 1, *S)`` -> ``(B, K)`` in [0, 1], background in column 0.

    A class absent from both counts 1, from one of them 0.
    """
    overlap, predicted, referenced = counts(prediction, reference, num_classes)
    total = predicted + referenced
    return torch.where(total > 0, 2 * overlap.float() / total.clamp(min=1), torch.ones_like(total, dtype=torch.float32))
