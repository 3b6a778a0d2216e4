"""The DCT against scipy.fft, orthonormality, the inverse and the gradient."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from medrobust.transforms.dct import dct, idct

SIZES = [
    ((8, 8), (-2, -1)),
    ((5, 7), (-2, -1)),
    ((8, 8, 8), (-3, -2, -1)),
    ((4, 6, 9), (-3, -2, -1)),
    ((1, 3, 16), (-1,)),
]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("size", "dims"), SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_scipy(size: tuple[int, ...], dims: tuple[int, ...], dtype: torch.dtype, atol: float) -> None:
    x = draw(2, 3, *size, dtype=dtype)
    assert dct(x, dims).dtype == dtype
    np.testing.assert_allclose(dct(x, dims).numpy(), dctn(x.numpy(), axes=dims, norm="ortho"), rtol=0, atol=atol)
    np.testing.assert_allclose(idct(x, dims).numpy(), idctn(x.numpy(), axes=dims, norm="ortho"), rtol=0, atol=atol)


def test_is_exact_enough_on_the_0_to_255_scale_in_single_precision() -> None:
    x = 255 * torch.rand(4, 32, 32, 32, generator=torch.Generator().manual_seed(0)) - 128
    expected = dctn(x.double().numpy(), axes=(1, 2, 3), norm="ortho")
    np.testing.assert_allclose(dct(x, (-3, -2, -1)).numpy(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("size", "dims"), SIZES)
def test_is_orthonormal(size: tuple[int, ...], dims: tuple[int, ...]) -> None:
    x, y = draw(2, *size), draw(3, *size)[:2].flip(0)
    torch.testing.assert_close((dct(x, dims) * dct(y, dims)).sum(dims), (x * y).sum(dims))
    torch.testing.assert_close(dct(x, dims).square().sum(dims), x.square().sum(dims))


@pytest.mark.parametrize(("size", "dims"), SIZES)
def test_inverse(size: tuple[int, ...], dims: tuple[int, ...]) -> None:
    x = draw(2, *size)
    torch.testing.assert_close(idct(dct(x, dims), dims), x)
    torch.testing.assert_close(dct(idct(x, dims), dims), x)


def test_a_constant_has_only_a_mean() -> None:
    c = dct(torch.full((4, 6, 9), 2.0, dtype=torch.float64), (-3, -2, -1))
    expected = torch.zeros_like(c)
    expected[0, 0, 0] = 2 * (4 * 6 * 9) ** 0.5
    torch.testing.assert_close(c, expected)


def test_gradients() -> None:
    x = draw(2, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dct(t, (-3, -2, -1)), x)
    assert torch.autograd.gradcheck(lambda t: idct(t, (-2, -1)), x)


def test_adjoint_of_the_inverse_is_the_dct() -> None:
    x, g = draw(4, 4, 4).requires_grad_(), draw(8, 4, 4)[4:]
    (gradient,) = torch.autograd.grad(idct(x, (-3, -2, -1)), x, g)
    torch.testing.assert_close(gradient, dct(g, (-3, -2, -1)))
