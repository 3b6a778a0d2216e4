"""How much too large or too small each class is predicted."""

import torch
from torch import Tensor

from medrobust.metrics._class_maps import counts

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = ""
INPUTS = "classes"


def volume_error(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Signed relative error of each class's volume; class maps ``(B, 1, *S)`` -> ``(B, K)``, background in column 0.

    (predicted - reference) / reference: 0.1 is a tenth too large, -1 is missed. It says nothing of where the voxels
    lie. Errors of both signs cancel in a mean: take magnitudes first where that matters, as ``HIGHER_IS_BETTER`` does.
    A class absent from both counts 0; absent from the reference alone, where the quotient has no bound, 1.
    """
    _, predicted, referenced = counts(prediction, reference, num_classes)
    error = (predicted - referenced).float() / referenced.clamp(min=1)
    return torch.where(referenced > 0, error, (predicted > 0).float())
