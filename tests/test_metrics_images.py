"""SSIM, PSNR, Linf, L2 and the flip rate against closed form and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from medrobust.metrics.flip_rate import flip_rate
from medrobust.metrics.l2 import l2
from medrobust.metrics.linf import linf
from medrobust.metrics.psnr import psnr
from medrobust.metrics.ssim import ssim


def scipy_ssim(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Wang et al. 2004 with a separable Gaussian window, where the window lies inside the image."""
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    weights /= weights.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in range(x.ndim):
            x = correlate1d(x, weights, axis=axis)
        return x[tuple(slice(window // 2, n - window // 2) for n in x.shape)]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


@pytest.mark.parametrize(("size", "window"), [((16, 20), 11), ((13, 12, 14), 11), ((12, 10, 6), 5), ((9, 9, 1), 1)])
def test_ssim_equals_scipy_with_the_window_that_fits(size: tuple[int, ...], window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 1, *size), generator=generator)
    image_adv = (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    expected = scipy_ssim(image_adv[0, 0].double().numpy(), image[0, 0].double().numpy(), window)
    assert ssim(image_adv, image).item() == pytest.approx(expected, abs=2e-5)


def test_norms_and_psnr_of_a_known_change() -> None:
    image = torch.full((2, 1, 4, 5, 5), 0.5)
    image_adv = image.clone()
    image_adv[0] += 8 / 255
    image_adv[1, 0, 0, 0, 0] -= 0.3
    torch.testing.assert_close(linf(image_adv, image), torch.tensor([[8 / 255], [0.3]]))
    torch.testing.assert_close(l2(image_adv, image), torch.tensor([[80 / 255], [0.3]]))
    decibels = [[-20 * math.log10(8 / 255)], [-10 * math.log10(0.09 / 100)]]
    torch.testing.assert_close(psnr(image_adv, image), torch.tensor(decibels))


def test_flip_rate_counts_changed_voxels() -> None:
    pred = torch.zeros(2, 1, 4, 5, dtype=torch.long)
    pred_adv = pred.clone()
    pred_adv[0, 0, 0] = torch.tensor([1, 2, 3, 0, 0])
    assert flip_rate(pred_adv, pred).flatten().tolist() == pytest.approx([0.15, 0.0])
