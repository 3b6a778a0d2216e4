"""SA2, the spectrum attack: amplify and weaken the image's block-wise cosine coefficients so that the model fails.

Hanif et al., "On Frequency Domain Adversarial Vulnerabilities of Volumetric Medical Image Segmentation", ISBI 2025,
Eq. 1 and Algorithm 1. Every coefficient of every block is multiplied by its own noise xi in [1 - rho, 1 + rho]; the
constant coefficient, the block's mean, stays. Nothing is rounded, so little of the image is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model, draw
from medrobust.attacks.objectives import DiceCE, SoftDice
from medrobust.attacks.step_sizes import Schedule, check_schedule, share
from medrobust.attacks.threat import SLACK, ThreatModel, slices_first, slices_last
from medrobust.transforms.blocks import merge, split
from medrobust.transforms.dct import dct, idct
from medrobust.transforms.ssim import BlockSSIM

Band = Literal["all", "low", "middle", "high"]

ROUNDING = 1e-7
"""Rounding moves intensities in single precision by less than this; it must not count against a nearly flat block."""


@dataclass(frozen=True)
class SpectralBall:
    """In every block the perturbation's Euclidean norm is at most ``rho`` times that of the band's coefficients.

    This is what multiplying coefficients c by factors in [1 - rho, 1 + rho] obeys: each moves by at most rho |c|, the
    transform keeps norms, and clipping to [0, 1] only shortens. A convex set that is somewhat larger than what the
    attack can reach: clipping spreads a perturbation over all coefficients. A block that the image's edge cuts is
    completed with copies of its last voxels, as the attack completes it, and has the bound of a whole one.

    ``block`` as in :class:`BlockRMSBall`, except that sizes beyond the image's axes are ignored.
    """

    rho: float
    block: tuple[int, ...]
    band: Band = "all"

    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        block = self.block[: image.ndim - 2]
        dims = tuple(range(-len(block), 0))
        delta = slices_first(image_adv - image, block)
        size = delta.shape[2:]
        missing = [width for s, b in zip(reversed(size), reversed(block), strict=True) for width in (0, -s % b)]
        blocks = split(F.pad(delta, missing), block)
        norm, limit = (
            torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float64)
            for x in (blocks, spectrum(image, block, self.band))
        )
        limit = self.rho * limit
        over = norm > limit * (1 + SLACK) + ROUNDING * math.sqrt(math.prod(block))
        nearer = blocks * (limit / norm.clamp_min(torch.finfo(torch.float64).tiny)).to(blocks.dtype)
        moved, over = (slices_last(merge(x, size), image) for x in (nearer, over.expand_as(blocks)))
        return torch.where(over, image + moved, image_adv).clamp(0, 1)


class Step(NamedTuple):
    """One evaluation of the attack."""

    image_adv: Tensor
    """What went into the model, (B, C, *S)."""
    xi: Tensor
    """The factors it was made with, (B, C, N, *block); for slices of a volume (B, C * D, N, *block)."""
    score: Tensor
    """What the attacker maximises, (B,)."""
    chosen: Tensor
    """What the best image is chosen by, (B,): the score, or the reported number where the objective cannot tell."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SA2(Attack):
    """Ascend the sign of the noise's gradient within its bounds, from a random start (Algorithm 1).

    On volumes (B, C, H, W, D), and on pictures (B, C, H, W) with the first two block sizes. With two block sizes, every
    slice of a volume along D is cut, as in the published SAA-2D. Sizes that the block does not divide are completed
    and cut back. Defaults are those of the published command; their blocks of 16 suit windows of 96.

    Args:
        rho: bound of the noise, a fraction of each coefficient: xi in [1 - rho, 1 + rho].
        block_size: block edge lengths in voxels, one per axis.
        steps: gradient steps; 0 returns the random start, the control without any optimisation.
        step_size: how far the first step moves xi; ``None`` is ``2 * rho``, and the published 0.1 with ``reference``.
        schedule: how the steps shrink: ``"constant"``, ``"linear"`` or ``"cosine"``, toward 0 after the last. ``None``
            is ``"cosine"``, or ``"constant"`` where a ``step_size`` is given and with ``reference``.
        band: which coefficients move. With frequencies k_i of a block of n_i, ``low`` is sum k_i / n_i < 1/2, ``high``
            is its mirror image sum (n_i - 1 - k_i) / n_i < 1/2, ``middle`` is the rest.
        random_start: begin with xi uniform in its bounds, as published, instead of at the clean image.
        ssim_weight: weight of the structural dissimilarity that is taken off the objective. ``None`` is 0: the bound
            limits the change already, and the penalty would hide what is possible within it. With ``reference`` it is
            the published command's 0.75 / 0.2.
        keep_best: return the best image, chosen as PGD does; ``False`` returns the last one.
        reference: the published code's arithmetic: Dice plus cross-entropy, steps of 0.1, a model that sees
            intensities outside [0, 1], clipped only at the end; returns the image before the last update.
    """

    rho: float = 0.4
    block_size: tuple[int, ...] = (16, 16, 16)
    steps: int = 10
    step_size: float | None = None
    schedule: Schedule | None = None
    band: Band = "all"
    random_start: bool = True
    ssim_weight: float | None = None
    keep_best: bool = True
    reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))  # configurations have lists
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"expected a finite rho >= 0, got {self.rho}")
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.steps, *self.block_size))
        if not whole or self.steps < 0 or len(self.block_size) not in (2, 3) or min(self.block_size) < 1:
            raise ValueError(
                f"expected whole steps >= 0 and two or three block sizes >= 1, got {self.steps} and {self.block_size}"
            )
        check_schedule(self.setting("schedule"))
        if self.band not in ("all", "low", "middle", "high"):
            raise ValueError(f"expected band 'all', 'low', 'middle' or 'high', got {self.band!r}")
        if self.reference and self.steps == 0:
            raise ValueError("expected steps >= 1 with reference, got 0: the published loop returns what a step saw")

    def defaults(self) -> dict[str, Any]:
        return {
            "objective": DiceCE() if self.reference else SoftDice(),
            "step_size": 0.1 if self.reference else 2 * self.rho,
            "schedule": "constant" if self.reference or self.step_size is not None else "cosine",
            "ssim_weight": 0.75 / 0.2 if self.reference else 0.0,
        }

    @property
    def threat(self) -> ThreatModel:
        return SpectralBall(self.rho, self.block_size, self.band)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        best, last = Best(), image
        for step in self.trajectory(model, image, label, generator):
            last = step.image_adv
            if self.keep_best and not self.reference:
                best.update(step.chosen, last)
        return last if best.image_adv is None else best.image_adv

    def trajectory(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Iterator[Step]:
        """Every evaluation in turn: ``steps`` of them with a gradient, then, unless ``reference``, the last noise."""
        coefficients = spectrum(image, self.block_size, self.band)
        ssim = BlockSSIM(image, image.ndim - 2) if self.setting("ssim_weight") else None
        start = self.rho * (2 * draw(torch.rand, coefficients, generator) - 1) if self.random_start else 0.0
        xi = torch.ones_like(coefficients) + start
        for i in range(self.steps):
            xi.requires_grad_()
            with torch.enable_grad():
                image_adv = self._image(image, coefficients, xi)
                score, chosen = self._score(model, image_adv, label, i, ssim)
                (gradient,) = torch.autograd.grad(score.sum(), xi)
            yield Step(image_adv.detach(), xi.detach(), score.detach(), chosen)
            move = self.setting("step_size") * share(self.setting("schedule"), i, self.steps)
            xi = xi.detach() + move * gradient.sign()
            xi = xi.clamp(1 - self.rho, 1 + self.rho)
        if not self.reference:
            with torch.no_grad():
                image_adv = self._image(image, coefficients, xi)
                yield Step(image_adv, xi, *self._score(model, image_adv, label, self.steps, ssim))

    def _image(self, image: Tensor, coefficients: Tensor, xi: Tensor) -> Tensor:
        """The image of these factors. What they add is added: where a factor is 1, nothing is rounded."""
        block = coefficients.shape[3:]
        delta = idct((xi - 1) * coefficients, tuple(range(-len(block), 0)))
        delta = slices_last(merge(delta, slices_first(image, block).shape[2:]), image)
        return image + delta if self.reference else (image + delta).clamp(0, 1)

    def _score(
        self, model: Model, image_adv: Tensor, label: Tensor, i: int, ssim: BlockSSIM | None
    ) -> tuple[Tensor, Tensor]:
        change = 0.0 if ssim is None else 1 - ssim(image_adv).clamp_min(0).mean(1)
        return self.weigh(model, image_adv, label, i, self.steps, self.setting("ssim_weight") * change)


def spectrum(image: Tensor, block: tuple[int, ...], band: Band = "all") -> Tensor:
    """(B, C, *S) -> (B, C, N, *block): cosine coefficients of the blocks, zero where the attack leaves them alone.

    That is the constant coefficient and what lies outside the band. Each block's mean is taken off before the
    transform, which changes no other coefficient but keeps small ones exact.
    """
    block = block[: image.ndim - 2]
    dims = tuple(range(-len(block), 0))
    blocks = split(slices_first(image, block), block)
    coefficients = dct(blocks - blocks.mean(dims, keepdim=True), dims)
    return coefficients * band_mask(block, band).to(coefficients)


def band_mask(block: tuple[int, ...], band: Band) -> Tensor:
    """Which coefficients of a block (*block) belong to a band, bool; the constant one belongs to none."""
    whole = math.prod(block)  # sums of k_i / n_i, times 2 n_1 n_2 n_3: whole numbers have no doubtful border
    k = torch.stack(torch.meshgrid(*(torch.arange(n) for n in block), indexing="ij"), -1)
    weight = torch.tensor([2 * whole // n for n in block])
    low = (k * weight).sum(-1) < whole
    high = ((torch.tensor(block) - 1 - k) * weight).sum(-1) < whole
    masks = {"all": torch.ones_like(low), "low": low, "middle": ~(low | high), "high": high & ~low}
    return masks[band] & (k.sum(-1) > 0)
