"""VAFA: learn quantisation tables of the image's block-wise cosine transform that fool the model.

Hanif et al., "Frequency Domain Adversarial Training for Robust Volumetric Medical Segmentation", MICCAI 2023
(2307.07269), Algorithm 1 and Eq. 2. Every coefficient of every block has its own quantum q; the image is transformed,
divided by q, rounded, multiplied back and transformed back. Two solvers look for the worst q: the published one, and
one that walks among the images such tables can make, which is far stronger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model, per_case
from medrobust.attacks.objectives import DiceCE, SoftDice
from medrobust.attacks.step_sizes import Schedule, check_schedule, share
from medrobust.attacks.threat import BlockRMSBall, IntensityRange, ThreatModel, slices_first, slices_last
from medrobust.transforms.blocks import merge, split
from medrobust.transforms.dct import dct, idct
from medrobust.transforms.quantize import nearest_quantum, quantize
from medrobust.transforms.ssim import BlockSSIM

ScoreOf = Callable[[Tensor, int], tuple[Tensor, Tensor]]

SOFTNESS = 0.1
"""Softness of the rounding at the first step; it falls linearly and would reach 0 after the last."""


class Step(NamedTuple):
    """One evaluation of the attack."""

    image_adv: Tensor
    """What went into the model, (B, C, *S)."""
    q: Tensor
    """The tables it was rendered with, (B, C, N, *block), on the 0..255 scale of intensities."""
    score: Tensor
    """What the attacker maximises, (B,)."""
    chosen: Tensor
    """What the best image is chosen by, (B,): the score, or the reported number where the objective cannot tell."""


@dataclass(frozen=True, kw_only=True, repr=False)
class VAFA(Attack):
    """Volumetric frequency attack on (B, C, H, W, D); block sizes that do not divide the volume are padded and cut.

    The result is honestly bounded: in every block the root mean square of the change is at most ``q_max / 2 / 255``,
    because rounding moves a coefficient by at most half its quantum and nothing else touches the image.

    Args:
        q_max: largest quantum, in grey levels of 255 (20 moves a block by at most 10/255 in root mean square).
        q_min: smallest quantum; ``None`` is 1, as in the paper (5 with ``reference``).
        q_init: quantum at the start; ``None`` is ``q_min``, as in the paper, and ``q_max`` with the ``"soft"`` solver,
            as in the published code.
        steps: gradient steps.
        step_size: how far the first step moves a coefficient (``"projected"``) or a quantum (``"soft"``), in grey
            levels of 255. ``None`` is ``q_max / 2``, the farthest that rounding can move a coefficient, and, as
            published, 1.
        schedule: how the steps shrink: ``"constant"``, ``"linear"`` or ``"cosine"``, toward 0 after the last. ``None``
            is ``"cosine"``, or ``"constant"`` where a ``step_size`` is given and with the published solver.
        block_size: block edge lengths in voxels, one per axis. 32 as in the paper's comparisons; its Table 4 and our
            measurements agree that small blocks are weaker.
        solver: ``"projected"`` moves every coefficient along the sign of its gradient and projects it onto what
            rounding with a quantum in [q_min, q_max] can make of it; it always rounds truly. ``"soft"`` is the
            published solver: the quanta follow the sign of their gradient through soft rounding. Both choose from
            the same set of images. ``None`` is ``"projected"`` (``"soft"`` with ``reference``).
        ssim_weight: weight of the structural dissimilarity that is taken off the objective (Eq. 2; 1 is the paper's).
            ``None`` is 0: the tables bound the change already, and the penalty would hide what is possible within them.
            With ``reference`` it is 1.
        final: with the ``"soft"`` solver, ``"soft"`` returns what the model saw while attacked; ``"hard"`` renders the
            best tables once more with true rounding, so that the tables alone give the image back.
        reference: the published code's arithmetic: q in [5, q_max], Dice plus cross-entropy, every axial slice
            stretched to [0, 1] by its own minimum and maximum (which alone moves voxels by up to 84/255 and breaks
            the bound), the last rendered image returned. Where a rendered slice is constant and the published code
            divides 0 by 0, the clean slice stands.
    """

    q_max: float = 20.0
    q_min: float | None = None
    q_init: float | None = None
    steps: int = 20
    step_size: float | None = None
    schedule: Schedule | None = None
    block_size: tuple[int, ...] = (32, 32, 32)
    ssim_weight: float | None = None
    solver: str | None = None
    final: str = "soft"
    reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))  # configurations have lists
        q_min = self.setting("q_min")
        if not 0 < q_min <= self.q_max or not q_min <= self.setting("q_init") <= self.q_max:
            raise ValueError(
                f"expected 0 < q_min <= q_init <= q_max, got q_min={q_min}, q_init={self.setting('q_init')}, "
                f"q_max={self.q_max}"
            )
        if self.setting("solver") not in ("projected", "soft") or (self.reference and self.solver == "projected"):
            raise ValueError(f"expected solver='projected' or 'soft', with reference 'soft', got {self.solver!r}")
        check_schedule(self.setting("schedule"))
        if self.final not in ("soft", "hard"):
            raise ValueError(f"expected final='soft' or 'hard', got {self.final!r}")
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.steps, *self.block_size))
        if not whole or self.steps < 0 or min(self.block_size) < 1:
            raise ValueError(f"expected whole steps >= 0 and block sizes >= 1, got {self.steps} and {self.block_size}")
        if not (math.isfinite(self.q_max) and self.setting("step_size") > 0):
            raise ValueError(
                f"expected a finite q_max and step_size > 0, got {self.q_max} and {self.setting('step_size')}"
            )

    def defaults(self) -> dict[str, Any]:
        soft = self.reference or self.solver == "soft"
        q_min = min(5.0 if self.reference else 1.0, self.q_max)
        return {
            "objective": DiceCE() if self.reference else SoftDice(),
            "q_min": q_min,
            "q_init": self.q_max if soft else q_min if self.q_min is None else self.q_min,
            "step_size": 1.0 if soft else self.q_max / 2,
            "schedule": "cosine" if self.step_size is None and not soft else "constant",
            "solver": "soft" if soft else "projected",
            "ssim_weight": 1.0 if self.reference else 0.0,
        }

    @property
    def threat(self) -> ThreatModel:
        return IntensityRange() if self.reference else BlockRMSBall(self.q_max / 2 / 255, self.block_size)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        best, best_q = Best(), image.new_empty(0)
        last = image
        for step in self.trajectory(model, image, label):
            last = step.image_adv
            better = best.update(step.chosen, last)
            best_q = step.q if best_q.numel() == 0 else torch.where(per_case(better, step.q), step.q, best_q)
        if self.final == "hard" and self.setting("solver") == "soft":
            q = step.q if self.reference else best_q
            return self._render(self._coefficients(image), q, 0.0, image).detach()
        return last if self.reference or best.image_adv is None else best.image_adv

    def trajectory(self, model: Model, image: Tensor, label: Tensor) -> Iterator[Step]:
        """Every evaluation in turn: ``steps`` of them with a gradient, then, unless ``reference``, the last tables."""
        coefficients = self._coefficients(image)
        ssim = BlockSSIM(self._blocks(image), len(self.block_size)) if self.setting("ssim_weight") else None
        q = torch.full_like(coefficients, self.setting("q_init"))
        walk = self._walk if self.setting("solver") == "projected" else self._walk_softly
        yield from walk(q, coefficients, lambda image_adv, i: self._score(model, image_adv, label, i, ssim), image)

    def _walk(self, q: Tensor, coefficients: Tensor, score_of: ScoreOf, image: Tensor) -> Iterator[Step]:
        """Projected sign gradient among the coefficients that tables can make; steps shrink towards the end."""
        for i in range(self.steps + 1):
            last = i == self.steps
            quantized = quantize(coefficients, q, 0.0).requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                image_adv = self._image(quantized, image)
                score, chosen = score_of(image_adv, i)
            yield Step(image_adv.detach(), q, score.detach(), chosen)
            if not last:
                (gradient,) = torch.autograd.grad(score.sum(), quantized)
                move = self.setting("step_size") * share(self.setting("schedule"), i, self.steps)
                target = quantized.detach() + move * gradient.sign()
                q = nearest_quantum(coefficients, target, self.setting("q_min"), self.q_max)

    def _walk_softly(self, q: Tensor, coefficients: Tensor, score_of: ScoreOf, image: Tensor) -> Iterator[Step]:
        """The published walk: the quanta's own sign gradient, through rounding that hardens from step to step."""
        for i in range(self.steps):
            q.requires_grad_()
            with torch.enable_grad():
                image_adv = self._render(coefficients, q, SOFTNESS * (1 - i / self.steps), image)
                score, chosen = score_of(image_adv, i)
                (gradient,) = torch.autograd.grad(score.sum(), q)
            yield Step(image_adv.detach(), q.detach(), score.detach(), chosen)
            move = self.setting("step_size") * share(self.setting("schedule"), i, self.steps)
            q = (q.detach() + move * gradient.sign()).clamp(self.setting("q_min"), self.q_max)
        if self.steps == 0 or not self.reference:
            with torch.no_grad():
                image_adv = self._render(coefficients, q, SOFTNESS / max(self.steps, 1), image)
                yield Step(image_adv, q, *score_of(image_adv, self.steps))

    def _score(
        self, model: Model, image_adv: Tensor, label: Tensor, i: int, ssim: BlockSSIM | None
    ) -> tuple[Tensor, Tensor]:
        change = 0.0 if ssim is None else 1 - ssim(self._blocks(image_adv)).clamp_min(0).flatten(1).mean(1)
        return self.weigh(model, image_adv, label, i, self.steps, self.setting("ssim_weight") * change)

    def _render(self, coefficients: Tensor, q: Tensor, alpha: float, image: Tensor) -> Tensor:
        """The image that quantised coefficients stand for, in [0, 1]."""
        return self._image(quantize(coefficients, q, alpha), image)

    def _image(self, coefficients: Tensor, image: Tensor) -> Tensor:
        """The image of these coefficients, in [0, 1]."""
        blocks = idct(coefficients, self._dims)
        levels = slices_last(merge(self._block_axis(blocks), self._sliced(image).shape[2:]), image) + 128
        return _stretch_slices(levels, image) if self.reference else (levels / 255).clamp(0, 1)

    def _coefficients(self, image: Tensor) -> Tensor:
        return dct(255 * self._blocks(image) - 128, self._dims)

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.block_size), 0))

    def _blocks(self, image: Tensor) -> Tensor:
        """(B, C, N, *block): the image's blocks; of a volume's slices, (B, C, D, N, *block)."""
        blocks = split(self._sliced(image), self.block_size)
        return blocks if self._sliced(image).ndim == image.ndim else blocks.unflatten(1, (image.shape[1], -1))

    def _block_axis(self, blocks: Tensor) -> Tensor:
        """Undo the last line of ``_blocks``."""
        return blocks.flatten(1, 2) if blocks.ndim - len(self.block_size) > 3 else blocks

    def _sliced(self, image: Tensor) -> Tensor:
        return slices_first(image, self.block_size)


def _stretch_slices(levels: Tensor, image: Tensor) -> Tensor:
    """Min-max stretch of every axial slice to [0, 1], as the published code does; constant slices stay clean."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    constant = high <= low
    return torch.where(constant, image, (levels - low) / torch.where(constant, 1.0, high - low))
