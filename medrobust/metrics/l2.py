"""The Euclidean length of the change."""

import torch
from torch import Tensor

from medrobust.metrics._images import images

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "intensity"
INPUTS = "images"


def l2(prediction: Tensor, reference: Tensor) -> Tensor:
    """L2 norm of ``prediction - reference`` over all voxels; images ``(B, C, *S)`` -> ``(B, 1)``."""
    prediction, reference = images(prediction, reference)
    return torch.linalg.vector_norm((prediction - reference).flatten(1), dim=1, keepdim=True)
