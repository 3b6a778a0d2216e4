"""Soft rounding: its values, its limit and its derivative in closed form."""

import math

import numpy as np
import pytest
import torch

from medrobust.transforms.quantize import nearest_quantum, quantize, soft_round
from tests.vafa_oracle import phi, phi_prime

ALPHAS = [0.1, 0.05, 0.005, 1e-3]


def grid(low: float = -3.0, high: float = 3.0, n: int = 4001) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_the_formula(alpha: float) -> None:
    np.testing.assert_allclose(soft_round(grid(), alpha).numpy(), phi(grid().numpy(), alpha), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_u_at_integers_and_half_integers(alpha: float) -> None:
    u = torch.arange(-8, 9, dtype=torch.float64) / 2
    torch.testing.assert_close(soft_round(u, alpha), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_is_continuous_monotone_and_moves_less_than_half(alpha: float) -> None:
    u = grid()
    rise = soft_round(u, alpha).diff()
    # The steepest slope, at a half-integer, bounds the rise between neighbours: a jump would break it.
    steepest = math.log(2 / alpha - 1) / (1 - alpha) / 2
    assert (rise > -1e-12).all()
    assert (rise <= steepest * u.diff() + 1e-12).all()
    assert ((soft_round(u, alpha) - u).abs() <= 0.5).all()


def test_approaches_rounding_as_alpha_falls() -> None:
    u = grid(n=601)
    u = u[(u - u.floor() - 0.5).abs() > 0.05]
    errors = [(soft_round(u, alpha) - u.round()).abs().max().item() for alpha in (0.1, 1e-3, 1e-6, 1e-30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2
    assert torch.equal(soft_round(u, 0.0), u.round())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_derivative_is_the_published_one(alpha: float) -> None:
    u = grid().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_round(u, alpha).sum(), u)
    np.testing.assert_allclose(gradient.numpy(), phi_prime(u.detach().numpy(), alpha), rtol=1e-9, atol=1e-12)


def test_gradcheck_away_from_the_integers() -> None:
    u = torch.tensor([-2.7, -1.4, -0.5, 0.2, 0.5, 0.9, 3.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: soft_round(t, 0.1), u)


def test_quantize_rounds_in_units_of_q() -> None:
    c = torch.tensor([-31.0, -9.0, 0.0, 4.0, 26.0, 500.0], dtype=torch.float64)
    q = torch.tensor([20.0, 20.0, 5.0, 5.0, 10.0, 7.0], dtype=torch.float64)
    expected = torch.tensor([-40.0, 0.0, 0.0, 5.0, 30.0, 497.0], dtype=torch.float64)
    torch.testing.assert_close(quantize(c, q, 0), expected)
    np.testing.assert_allclose(quantize(c, q, 0.1).numpy(), phi((c / q).numpy(), 0.1) * q.numpy(), rtol=0, atol=1e-10)


def test_gradient_of_the_tables() -> None:
    generator = torch.Generator().manual_seed(5)
    c = 100 * torch.randn(50, generator=generator, dtype=torch.float64)
    q = (5 + 15 * torch.rand(50, generator=generator, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(c, q, 0.07).sum(), q)
    u = (c / q.detach()).numpy()
    np.testing.assert_allclose(gradient.numpy(), phi(u, 0.07) - u * phi_prime(u, 0.07), rtol=1e-9, atol=1e-10)


def test_a_tiny_table_gives_the_coefficients_back() -> None:
    c = 100 * torch.randn(1000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    q = torch.full_like(c, 1e-6)
    for alpha in (0.0, 0.1):
        assert ((quantize(c, q, alpha) - c).abs() <= 0.5e-6 + 1e-12).all()


@pytest.mark.parametrize(("alpha", "reached"), [(0.0, 0.499), (0.005, 0.21), (0.1, 0.09)])
def test_moves_a_coefficient_by_at_most_half_its_quantum(alpha: float, reached: float) -> None:
    generator = torch.Generator().manual_seed(6)
    c = 300 * torch.randn(20000, generator=generator, dtype=torch.float64)
    q = 1 + 19 * torch.rand(20000, generator=generator, dtype=torch.float64)
    moved = (quantize(c, q, alpha) - c).abs() / q
    assert (moved <= 0.5 + 1e-12).all()
    assert moved.max() > reached


@pytest.mark.parametrize(("q_min", "q_max"), [(1.0, 20.0), (5.0, 20.0), (19.5, 20.0), (20.0, 20.0), (0.1, 8.0)])
def test_the_nearest_quantum_is_the_best_of_all(q_min: float, q_max: float) -> None:
    generator = torch.Generator().manual_seed(7)
    c = 40 * torch.randn(2000, generator=generator, dtype=torch.float64)
    c[:600] /= 20
    c[0] = 0
    target = c + 10 * torch.randn(2000, generator=generator, dtype=torch.float64)
    q = nearest_quantum(c, target, q_min, q_max)
    assert q_min <= q.min()
    assert q.max() <= q_max
    every = torch.linspace(q_min, q_max, 5001, dtype=torch.float64)
    brute_force = (quantize(c[:, None], every, 0) - target[:, None]).abs().amin(1)
    mine = (quantize(c, q, 0) - target).abs()
    # It stays a thousandth of a quantum off the places where rounding tips; a few coefficients lie there themselves.
    near = (c / q_min - 0.5) % 1
    tipping = torch.minimum(near, 1 - near) < 2e-3 * (c.abs() / q_min + 1)
    within = mine <= brute_force + 2e-3 * q_max
    assert within[~tipping].all()
    assert within.double().mean() > 0.99


def test_the_nearest_quantum_to_the_coefficient_itself_moves_it_least() -> None:
    c = torch.tensor([0.0, 0.3, 0.6, 7.0, -300.25], dtype=torch.float64)
    moved = quantize(c, nearest_quantum(c, c, 1.0, 20.0), 0) - c
    torch.testing.assert_close(moved, torch.tensor([0, -0.3, 0.4, 0, 0], dtype=torch.float64))
