"""Block split and merge against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from medrobust.transforms.blocks import merge, split

CASES = [
    ((8, 8), (4, 4)),
    ((8, 12), (4, 2)),
    ((9, 7), (4, 4)),
    ((3, 5), (8, 8)),
    ((8, 8, 8), (4, 4, 4)),
    ((4, 6, 8), (2, 3, 4)),
    ((13, 9, 7), (4, 4, 4)),
    ((5, 4, 3), (1, 1, 1)),
    ((4, 4, 4), (4, 4, 4)),
]


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("size", "block"), CASES)
def test_split_equals_a_loop(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = draw(2, 3, *size)
    pads = [(0, -n % b) for n, b in zip(size, block, strict=True)]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode="edge")
    starts = itertools.product(*(range(0, n, b) for n, b in zip(padded.shape[2:], block, strict=True)))
    expected = [
        padded[(slice(None), slice(None), *(slice(at, at + b) for at, b in zip(start, block, strict=True)))]
        for start in starts
    ]
    np.testing.assert_array_equal(split(x, block).numpy(), np.stack(expected, 2))


@pytest.mark.parametrize(("size", "block"), CASES)
def test_merge_inverts_split(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = draw(2, 3, *size)
    blocks = split(x, block)
    n = math.prod(math.ceil(s / b) for s, b in zip(size, block, strict=True))
    assert blocks.shape == (2, 3, n, *block)
    assert torch.equal(merge(blocks, size), x)


@pytest.mark.parametrize(("size", "block"), [((8, 12), (4, 2)), ((4, 6, 8), (2, 3, 4))])
def test_split_inverts_merge(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    n = math.prod(size) // math.prod(block)
    blocks = draw(2, 1, n, *block)
    assert torch.equal(split(merge(blocks, size), block), blocks)


def test_merge_crops_what_split_padded() -> None:
    blocks = draw(1, 2, 2 * 2, 4, 4)
    whole = torch.cat(
        [torch.cat([blocks[:, :, 0], blocks[:, :, 1]], -1), torch.cat([blocks[:, :, 2], blocks[:, :, 3]], -1)], -2
    )
    assert torch.equal(merge(blocks, (7, 5)), whole[..., :7, :5])


def test_gradients_reach_every_voxel_once_and_the_edge_once_per_copy() -> None:
    x = draw(1, 1, 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(split(x, (2, 2)).sum(), x)
    expected = torch.ones_like(x)
    expected[:, :, 2] = 2
    assert torch.equal(gradient, expected)
    blocks = draw(1, 1, 4, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(merge(blocks, (3, 4)).sum(), blocks)
    assert torch.equal(gradient.sum((-2, -1)), torch.tensor([[[4.0, 4, 2, 2]]], dtype=torch.float64))
