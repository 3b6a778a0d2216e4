"""VAFA's own arithmetic (blocks, transform, quantisation, similarity; forward and backward) against the published way.

The baseline does what the published code does, written anew: blocks cut and pasted in Python loops, FFT-based
transforms, the clean volume cut and transformed in every step, similarity by convolutions over all blocks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch_dct
from torch import Tensor

from medrobust.attacks import VAFA
from medrobust.transforms.quantize import quantize

SIDE, BATCH = 96, 1


def corners(size: Sequence[int], block: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(0, side, block) for side in size)))


def cut(x: Tensor, block: int) -> Tensor:
    places = corners(x.shape[2:], block)
    out = x.new_zeros(*x.shape[:2], len(places), block, block, block)
    for n, (i, j, k) in enumerate(places):
        out[:, :, n] = x[:, :, i : i + block, j : j + block, k : k + block]
    return out


def paste(blocks: Tensor, size: Sequence[int]) -> Tensor:
    block = blocks.shape[-1]
    out = blocks.new_zeros(*blocks.shape[:2], *size)
    for n, (i, j, k) in enumerate(corners(size, block)):
        out[:, :, i : i + block, j : j + block, k : k + block] = blocks[:, :, n]
    return out


def similarity(x: Tensor, y: Tensor) -> Tensor:
    tap = torch.tensor([0.3078, 0.3844, 0.3078])

    def smooth(z: Tensor) -> Tensor:
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = 3
            z = F.conv3d(z, tap.view(shape))
        return z

    x, y = (z.flatten(0, 2)[:, None] for z in (x, y))
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    return (((2 * mx * my + 1e-4) * (2 * cov + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()


def published_render(image: Tensor, q: Tensor) -> Tensor:
    coefficients = torch_dct.dct_3d(255 * cut(image, q.shape[-1]) - 128, norm="ortho")
    return (paste(torch_dct.idct_3d(quantize(coefficients, q, 0.1), norm="ortho"), image.shape[2:]) + 128) / 255


def published_step(image: Tensor, q: Tensor, block: int) -> Tensor:
    q = q.detach().requires_grad_()
    adversarial = published_render(image, q)
    score = adversarial.mean() - (1 - similarity(cut(image, block), cut(adversarial, block)))
    (gradient,) = torch.autograd.grad(score, q)
    return (q + gradient.sign()).clamp(5, 20)


class Mean(torch.nn.Module):
    """The cheapest model: what is measured is the attack."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([1 - image, image], 1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(BATCH, 1, SIDE, SIDE, SIDE, generator=generator)
    label = (image > 0.5).long()
    for block in (32, 8):
        steps = 3
        q = torch.full((BATCH, 1, len(corners([SIDE] * 3, block)), block, block, block), 20.0)
        start = time.perf_counter()
        for _ in range(steps):
            q = published_step(image, q, block)
        published = (time.perf_counter() - start) / steps
        attack = VAFA(steps=steps, block_size=(block,) * 3, ssim_weight=1.0)
        start = time.perf_counter()
        attack(Mean(), image, label)
        ours = (time.perf_counter() - start) / (steps + 1)  # it also judges the last tables
        times = published / ours
        print(f"block {block:>2}: published {published:.2f} s, ours {ours:.2f} s per step: {times:.1f} times faster")


if __name__ == "__main__":
    main()
