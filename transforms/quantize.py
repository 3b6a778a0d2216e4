"""Divide, round, multiply back: quantisation of coefficients that a gradient can pass.

Soft rounding as in differentiable soft quantization (Gong et al., ICCV 2019, 1908.05033), used by VAFA
(Hanif et al., MICCAI 2023, 2307.07269).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_round(u: Tensor, alpha: float) -> Tensor:
    """Round ``u`` (any shape) softly: continuous, increasing, equal to ``u`` at integers and half-integers.

    ``alpha`` in (0, 1) is the softness: towards 0 this becomes rounding; 0 is exact rounding, with no gradient.

    Raises:
        ValueError: ``alpha`` is outside [0, 1).
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"expected a softness alpha in [0, 1), got {alpha}")
    if alpha == 0:
        return torch.round(u)
    low = torch.floor(u).detach()
    slope = math.log(2 / alpha - 1)
    return low + (torch.tanh(slope * (u - low - 0.5)) / (1 - alpha) + 1) / 2


def quantize(coefficients: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Coefficients rounded to multiples of ``q`` (broadcastable, positive, in the coefficients' unit)."""
    return soft_round(coefficients / q, alpha) * q
