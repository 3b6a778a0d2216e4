"""What every consistency loss asks of its two sets of logits."""

from __future__ import annotations

from torch import Tensor

from medrobust.attacks.objectives import full_precision


def pair(logits: Tensor, logits_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, K, *S) without metadata, in single precision at least.

    Raises:
        ValueError: they differ in shape.
    """
    if logits.shape != logits_adv.shape:
        raise ValueError(
            f"expected clean and adversarial logits of one shape, got {tuple(logits.shape)} and "
            f"{tuple(logits_adv.shape)}"
        )
    return full_precision(logits.as_subclass(Tensor)), full_precision(logits_adv.as_subclass(Tensor))
