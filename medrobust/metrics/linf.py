"""The largest change of any voxel."""

from torch import Tensor

from medrobust.metrics._images import images

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "intensity"
INPUTS = "images"


def linf(prediction: Tensor, reference: Tensor) -> Tensor:
    """Linf norm of ``prediction - reference``; images ``(B, C, *S)`` -> ``(B, 1)`` in the unit of the images."""
    prediction, reference = images(prediction, reference)
    return (prediction - reference).flatten(1).abs().amax(1, keepdim=True)
