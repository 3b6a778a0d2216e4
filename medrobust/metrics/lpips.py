"""Learned perceptual distance (Zhang et al., CVPR 2018), slice by slice."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from medrobust.metrics._images import images

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = ""
INPUTS = "images"

SLICES_AT_ONCE = 16


def lpips(prediction: Tensor, reference: Tensor, network: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Mean LPIPS over axial slices; images ``(B, C, H, W[, D])`` in [0, 1] -> ``(B, 1)``, 0 for equal images.

    Slices run along the last axis, are mapped by ``2 x - 1``, and one channel is repeated three times; three channels
    are taken as colours. ``network`` takes two batches ``(N, 3, H, W)`` in [-1, 1] and returns N distances; the default
    is AlexNet of the package ``lpips``. VAFA's tables show ``100 (1 - LPIPS)``.

    Raises ImportError where the default network is wanted and its package is missing.
    """
    prediction, reference = images(prediction, reference)
    if prediction.shape[1] not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels, got {prediction.shape[1]}; pass one channel at a time")
    network = network or _alex(str(prediction.device))
    with torch.no_grad():
        return torch.stack([_case(network, *pair) for pair in zip(prediction, reference, strict=True)])


def _case(network: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, reference: Tensor) -> Tensor:
    chunks = zip(_slices(prediction).split(SLICES_AT_ONCE), _slices(reference).split(SLICES_AT_ONCE), strict=True)
    return torch.cat([network(2 * a - 1, 2 * b - 1).flatten() for a, b in chunks]).mean(0, keepdim=True)


def _slices(image: Tensor) -> Tensor:
    slices = image[None] if image.ndim == 3 else image.movedim(-1, 0)
    return slices.expand(-1, 3, -1, -1)


@lru_cache(maxsize=2)
def _alex(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        package = import_module("lpips")
    except ImportError as error:
        raise ImportError("the LPIPS metric needs a package of its own: pip install 'medrobust[lpips]'") from error
    return package.LPIPS(net="alex", verbose=False).eval().to(device)
