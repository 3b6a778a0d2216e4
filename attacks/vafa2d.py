"""VAFA-2D: the frequency attack on images, or on every axial slice of a volume (Hanif et al., 2307.07269, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from medrobust.attacks.vafa import VAFA


@dataclass(frozen=True, kw_only=True, repr=False)
class VAFA2D(VAFA):
    """VAFA with two-dimensional blocks: on images (B, C, H, W), or on each slice of (B, C, H, W, D) along D.

    The settings are VAFA's. The published code runs it without the similarity term, so ``ssim_weight`` is 0 with
    ``reference`` too; it also ran 10 steps whatever was asked for, which ``steps=10`` gives.
    """

    block_size: tuple[int, ...] = (32, 32)
    ssim_weight: float | None = 0.0
