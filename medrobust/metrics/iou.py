"""Intersection over union (Jaccard index) of each class."""

import torch
from torch import Tensor

from medrobust.metrics._class_maps import counts

IDEAL = 1.0
HIGHER_IS_BETTER = True
UNIT = ""
INPUTS = "classes"


def iou(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """IoU of each class; class maps ``(B, 1, *S)`` -> ``(B, K)`` in [0, 1], background in column 0.

    A class absent from both counts 1, from one of them 0.
    """
    overlap, predicted, referenced = counts(prediction, reference, num_classes)
    union = predicted + referenced - overlap
    return torch.where(union > 0, overlap.float() / union.clamp(min=1), torch.ones_like(union, dtype=torch.float32))
