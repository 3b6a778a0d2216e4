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


def nearest_quantum(coefficients: Tensor, target: Tensor, q_min: float, q_max: float) -> Tensor:
    """The q in [q_min, q_max] with which exact rounding brings each coefficient nearest to its target.

    What rounding can make of a coefficient c >= 0 is the union, over whole numbers k, of the intervals k q with
    c / (k + 1/2) <= q <= c / (k - 1/2) and q in its bounds. Only two of them count: that of the smallest possible k,
    which q_max may cut, and the next one, which contains all further ones. Negative coefficients mirror.

    Args:
        coefficients, target: of one shape and unit. In single precision, coefficients above some 8000 quanta may come
            to lie on another multiple than the nearest.
        q_min, q_max: 0 < q_min <= q_max, in the coefficients' unit.
    """
    size = coefficients.abs()
    target = torch.where(coefficients < 0, -target, target)
    k = torch.ceil(size / q_max - 0.5).clamp_min(0)
    # A hair inside the intervals: on their ends, an error of rounding in c makes k the next number.
    half = 0.499
    first = torch.where(k > 0, target / k.clamp_min(1), q_max)
    first = torch.maximum(first, size / (k + half)).clamp(q_min, q_max)
    upper = size / (k + 1 - half)
    second = torch.minimum(torch.maximum(target / (k + 1), size / (k + 1 + half)).clamp_min(q_min), upper)
    nearer = ((k + 1) * second - target).abs() < (k * first - target).abs()
    return torch.where(nearer & (upper >= q_min), second, first)
