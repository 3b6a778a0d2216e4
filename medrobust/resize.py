"""An inferer for networks of one image size: the image is resized for the network, the logits are resized back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor


class ResizeInferer(Inferer):
    """Segment (B, C, H, W) of any size with a network of one size; both resizings are differentiable.

    Through it an attack works on the image as it is stored, and Dice and HD95 are measured there: a perturbation that
    would not survive the resizing is none.

    Args:
        size: (height, width) of the network's images, or one number for squares.
        antialias: low-pass before shrinking, as PIL does and as the published models were trained.
        square: pad the shorter side with zeros (centred) first, so that shapes keep their proportions.
    """

    def __init__(self, size: int | Sequence[int], *, antialias: bool = True, square: bool = False) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise ValueError(f"expected a size of at least one pixel, got {size}")
        self.antialias = antialias
        self.square = square

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, K, H, W) of ``network`` on ``inputs`` (B, C, H, W)."""
        if inputs.ndim != 4:
            raise ValueError(f"expected images (B, C, H, W), got {tuple(inputs.shape)}: slice volumes first")
        height, width = inputs.shape[2:]
        side = max(height, width)
        top, left = ((side - height) // 2, (side - width) // 2) if self.square else (0, 0)
        if self.square:
            inputs = F.pad(inputs, (left, side - width - left, top, side - height - top))
        full = inputs.shape[2:]
        # Interpolation may leave [0, 1] by a rounding error.
        small = F.interpolate(inputs, self.size, mode="bilinear", antialias=self.antialias).clamp(0, 1)
        logits = network(small, *args, **kwargs)
        return F.interpolate(logits, full, mode="bilinear")[:, :, top : top + height, left : left + width]
