"""Structural similarity of two images (Wang et al., IEEE TIP 2004)."""

from monai.metrics import SSIMMetric
from torch import Tensor

from medrobust.metrics._images import images

IDEAL = 1.0
HIGHER_IS_BETTER = True
UNIT = ""
INPUTS = "images"


def ssim(prediction: Tensor, reference: Tensor) -> Tensor:
    """Mean SSIM; images ``(B, C, *S)`` in [0, 1], 2-D or 3-D -> ``(B, 1)``, at most 1.

    MONAI's, with data range 1 and a Gaussian window of 11 voxels a side (sigma 1.5). Where an image is thinner than
    that, the window shrinks to the largest odd size that fits its thinnest side.
    """
    prediction, reference = images(prediction, reference)
    thinnest = min(prediction.shape[2:])
    window = min(11, thinnest - (thinnest + 1) % 2)
    return SSIMMetric(spatial_dims=prediction.ndim - 2, data_range=1.0, win_size=window)(prediction, reference)
