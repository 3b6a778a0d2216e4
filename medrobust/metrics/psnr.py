"""Peak signal-to-noise ratio of two images, in dB."""

import math

from monai.metrics import PSNRMetric
from torch import Tensor

from medrobust.metrics._images import images

IDEAL = math.inf
HIGHER_IS_BETTER = True
UNIT = "dB"
INPUTS = "images"


def psnr(prediction: Tensor, reference: Tensor) -> Tensor:
    """PSNR with peak 1, by MONAI; images ``(B, C, *S)`` in [0, 1] -> ``(B, 1)`` in dB, infinite for equal images."""
    return PSNRMetric(max_val=1.0)(*images(prediction, reference))
