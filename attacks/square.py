"""Square attack: random search that asks the model for scores only (Andriushchenko et al., ECCV 2020, 1912.00049)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from medrobust.attacks.base import Attack, Best, Model, draw
from medrobust.attacks.norms import Norm, ball, steepest
from medrobust.attacks.threat import Eps, ThreatModel, radius
from medrobust.transforms.blocks import merge

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations of 10000 after which the changed fraction halves."""

TILES = 5
"""Bumps along each axis of the first L2 image."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Square(Attack):
    """Change one random square (cube) at a time and keep it where the score rises (Algorithms 1 to 3).

    No gradient is asked for: it also shows whether a model that resists gradients only hides them. Here the score is
    that of a whole segmentation (hard Dice for objectives that look at some voxels only), and each case keeps what
    raises its own. All cases of a batch try the same squares.

    ``linf`` starts from stripes of +-eps that run along the first spatial axis and sets squares to +-eps, one sign per
    channel. ``l2`` starts from a grid of bumps, and moves the norm of one window into a new bump in another.

    Args:
        eps: radius; intensity in [0, 1] for ``linf``, Euclidean norm for ``l2``; a tuple of one a channel (``linf``),
            or a tuple of rows, one a case.
        norm: which ball.
        queries: forward passes in all, that of the clean image and that of the start included.
        p_init: the fraction of the image that the first squares cover; it halves along the published schedule.
    """

    gradient_free: ClassVar[bool] = True

    eps: Eps = 8 / 255
    norm: Norm = "linf"
    queries: int = 1000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        ball(self.norm, self.eps)
        if not (isinstance(self.queries, int) and self.queries >= 2):
            raise ValueError(
                f"expected at least 2 whole queries, one for the clean image and one for the start, got {self.queries}"
            )
        if not 0 < self.p_init <= 1:
            raise ValueError(f"expected a fraction p_init in (0, 1], got {self.p_init}")

    @property
    def threat(self) -> ThreatModel:
        return ball(self.norm, self.eps)

    @torch.no_grad()
    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        # A search climbs what images are chosen by: an objective that shrinks while it succeeds leads it back.
        criterion = self.criterion_of()

        def score_of(x: Tensor) -> Tensor:
            # What one small square changes in a whole volume drowns in single precision.
            return self.judge(criterion, model(x).double(), label)

        clean = score_of(image)
        best, current = Best(), None
        for i in range(self.queries - 1):
            tried = self.start(image, generator) if current is None else self.change(current, image, i - 1, generator)
            tried = self.threat.project(tried, image)
            best.update(score_of(tried), tried)
            current = best.image_adv
        best.update(clean, image)  # only now: the search goes on from its start, also where that is a bad one
        return image if best.image_adv is None else best.image_adv

    def start(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """The first image tried, (B, C, *S): stripes or bumps."""
        if self.norm == "linf":
            return image + radius(self.eps, image) * _signs(image[:, :, :1], generator)
        return image + radius(self.eps, image) * steepest("l2", bumps(image, generator))

    def change(self, image_adv: Tensor, image: Tensor, i: int, generator: torch.Generator) -> Tensor:
        """What iteration ``i`` tries instead of ``image_adv``, the best so far: one window of it anew."""
        p = fraction(self.p_init, i, self.queries)
        change = self._change_linf if self.norm == "linf" else self._change_l2
        return change(image_adv, image, p, generator)

    def _change_linf(self, image_adv: Tensor, image: Tensor, p: float, generator: torch.Generator) -> Tensor:
        """Algorithm 2: one window to +-eps; where a case has these signs there already, the opposite ones."""
        size = image.shape[2:]
        window = place(edges(p, size), size, generator)
        step = radius(self.eps, image) * _signs(_first(image, 1), generator)
        clean, found = image[window], image_adv[window]
        tried = (clean + step).clamp(0, 1)
        spent = ((tried - found).abs() < 1e-7).flatten(1).all(1).view(-1, *[1] * (image.ndim - 1))
        image_adv = image_adv.clone()
        image_adv[window] = torch.where(spent, (clean - step).clamp(0, 1), tried)
        return image_adv

    def _change_l2(self, image_adv: Tensor, image: Tensor, p: float, generator: torch.Generator) -> Tensor:
        """Algorithm 3: what two windows hold, and what is left of eps, goes into a new bump in the first of them."""
        size = image.shape[2:]
        sides = [min(max(n, 3) | 1, whole) for n, whole in zip(edges(p, size), size, strict=True)]
        window, emptied = (place(sides, size, generator) for _ in range(2))
        shape = bump(sides, _integer(len(size), generator), image)
        sign = _signs(_first(image, 1), generator)

        delta = image_adv - image
        both = torch.zeros_like(image[:1, :1])
        both[window] = both[emptied] = 1
        unused = (radius(self.eps, image) ** 2 - _norm(delta, 1) ** 2).clamp_min(0) / image.shape[1]
        length = (unused + _norm(delta * both, 2) ** 2).sqrt()
        new = _unit(sign * shape + _unit(delta[window]))
        delta[emptied] = 0
        delta[window] = length * new
        return image + radius(self.eps, image) * steepest("l2", delta)


def fraction(p_init: float, i: int, iterations: int) -> float:
    """The fraction of the image that iteration ``i`` changes: the published schedule, stretched to ``iterations``."""
    return p_init / 2 ** sum(10000 * i // iterations > halving for halving in HALVINGS)


def edges(p: float, size: Sequence[int]) -> list[int]:
    """Edge lengths of a window that covers the fraction ``p``: a square or cube, longer where an axis is too short."""
    found, left = [1] * len(size), p * math.prod(size)
    for done, axis in enumerate(sorted(range(len(size)), key=lambda axis: size[axis])):
        edge = min(left ** (1 / (len(size) - done)), size[axis])
        found[axis], left = max(round(edge), 1), left / edge
    return found


def place(sides: Sequence[int], size: Sequence[int], generator: torch.Generator) -> tuple[Any, ...]:
    """A window of these edges anywhere in the image, as an index."""
    starts = [_integer(whole - n + 1, generator) for n, whole in zip(sides, size, strict=True)]
    return (..., *(slice(start, start + n) for start, n in zip(starts, sides, strict=True)))


def bump(sides: Sequence[int], axis: int, like: Tensor) -> Tensor:
    """Two opposite peaks side by side along an axis, (*sides), of norm 1: the shape that L2 squares have."""
    half = sides[axis] // 2
    peaks = [peak([*sides[:axis], n, *sides[axis + 1 :]], like) for n in (half, sides[axis] - half)]
    shape = torch.cat([peaks[0], -peaks[1]], axis)
    return shape / torch.linalg.vector_norm(shape)


def peak(sides: Sequence[int], like: Tensor) -> Tensor:
    """Nested boxes around the middle, the k-th of height 1 / k^2 and half-width k, cut at the edges; norm 1."""
    grid = torch.meshgrid(*((torch.arange(n, device=like.device) - n // 2).abs() for n in sides), indexing="ij")
    boxes = 1 / torch.arange(1, max(sides) // 2 + 2, device=like.device, dtype=like.dtype) ** 2
    height = boxes.flip(0).cumsum(0).flip(0)[torch.stack(grid).amax(0)]
    return height / torch.linalg.vector_norm(height)


def bumps(image: Tensor, generator: torch.Generator) -> Tensor:
    """A grid of bumps, each along a random axis and of a random sign per channel, (1, C, *S)."""
    size, dims = image.shape[2:], image.ndim - 2
    sides = [max(n // TILES, 1) for n in size]
    shapes = torch.stack([bump(sides, axis, image) for axis in range(dims)])
    tiles = _first(image, TILES)
    axes = (dims * draw(torch.rand, tiles[:, :1], generator)).long().clamp_max(dims - 1)
    signs = _signs(tiles, generator)
    covered = [n * count for n, count in zip(sides, tiles.shape[2:], strict=True)]
    grid = merge(shapes[axes.flatten(2)] * signs.flatten(2).unflatten(2, (-1, *[1] * dims)), covered)
    rest = [whole - n for whole, n in zip(size, covered, strict=True)]
    return F.pad(grid, [width for n in reversed(rest) for width in (n // 2, n - n // 2)])


def _first(image: Tensor, n: int) -> Tensor:
    """The first ``n`` voxels along every axis."""
    for axis in range(2, image.ndim):
        image = image.narrow(axis, 0, min(n, image.shape[axis]))
    return image


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 at random, one case's shape, (1, ...)."""
    return torch.where(draw(torch.rand, like, generator) < 0.5, -1.0, 1.0).to(like)


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator, device=generator.device))


def _norm(x: Tensor, keep: int) -> Tensor:
    """Euclidean norm over all dimensions but the first ``keep``, which stay."""
    return torch.linalg.vector_norm(x, dim=tuple(range(keep, x.ndim)), keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """Of norm 1 per case and channel; zero stays zero."""
    return x / _norm(x, 2).clamp_min(torch.finfo(x.dtype).tiny)
