"""Per-block SSIM against one window at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

from medrobust.transforms.ssim import block_ssim
from tests.vafa_oracle import ssim_and_gradient


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over all windows of 3 voxels a side of the textbook SSIM with Gaussian-weighted moments."""
    tap = [math.exp(-(t**2) / 4.5) for t in (-1, 0, 1)]
    total = sum(tap)
    values = []
    for start in np.ndindex(*(n - 2 for n in x.shape)):
        weighted = [
            (
                math.prod(tap[o] / total for o in offset),
                x[tuple(np.add(start, offset))],
                y[tuple(np.add(start, offset))],
            )
            for offset in itertools.product(range(3), repeat=x.ndim)
        ]
        mx = sum(w * a for w, a, _ in weighted)
        my = sum(w * b for w, _, b in weighted)
        vx = sum(w * (a - mx) ** 2 for w, a, _ in weighted)
        vy = sum(w * (b - my) ** 2 for w, _, b in weighted)
        vxy = sum(w * (a - mx) * (b - my) for w, a, b in weighted)
        values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def pair(*shape: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    return x, (x + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("block", [(4, 4), (8, 8), (3, 5), (4, 4, 4), (3, 5, 4)])
def test_equals_a_loop_over_windows(block: tuple[int, ...]) -> None:
    x, y = pair(2, 1, 3, *block)
    value = block_ssim(x, y, len(block))
    assert value.shape == (2, 1, 3)
    expected = [[[by_hand(x[b, 0, n].numpy(), y[b, 0, n].numpy()) for n in range(3)]] for b in range(2)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-10)


def test_is_one_for_itself_symmetric_and_can_be_negative() -> None:
    x, y = pair(5, 4, 4, 4)
    torch.testing.assert_close(block_ssim(x, x, 3), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(block_ssim(x, y, 3), block_ssim(y, x, 3))
    assert (block_ssim(x, 1 - x, 3) < 0).all()


def test_two_constants_differ_in_luminance_alone() -> None:
    x, y = torch.full((1, 4, 4), 0.2, dtype=torch.float64), torch.full((1, 4, 4), 0.6, dtype=torch.float64)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    torch.testing.assert_close(block_ssim(x, y, 2), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("block", [(5, 4), (4, 3, 5)])
def test_gradient_equals_the_hand_derived_one(block: tuple[int, ...]) -> None:
    x, y = pair(*block)
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(block_ssim(x, y, len(block)), y)
    np.testing.assert_allclose(gradient.numpy(), ssim_and_gradient(x.numpy(), y.detach().numpy())[1], atol=1e-10)


def test_single_precision_is_close() -> None:
    x, y = pair(6, 8, 8, 8, noise=0.05)
    torch.testing.assert_close(block_ssim(x.float(), y.float(), 3).double(), block_ssim(x, y, 3), rtol=0, atol=1e-4)
