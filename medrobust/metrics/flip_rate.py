"""The share of voxels whose predicted class changed."""

from torch import Tensor

from medrobust.metrics._class_maps import class_maps

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "share"
INPUTS = "classes"


def flip_rate(prediction: Tensor, reference: Tensor) -> Tensor:
    """Share of voxels where two predictions differ; class maps ``(B, 1, *S)`` -> ``(B, 1)`` in [0, 1].

    ``prediction`` is the one on the adversarial image, ``reference`` the one on the clean image: no label is needed.
    """
    prediction, reference = class_maps(prediction, reference)
    return (prediction != reference).flatten(1).float().mean(1, keepdim=True)
