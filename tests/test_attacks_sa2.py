"""SA2 against its algorithm in NumPy and SciPy, block by block, and against the worst noise of a linear model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from medrobust.attacks import SA2, DiceCE, SoftDice
from medrobust.attacks.base import Model
from medrobust.attacks.sa2 import SpectralBall, band_mask
from tests.oracles import LinearObjective
from tests.vafa_oracle import DICE_CE, Loss, model_loss_and_gradient, ssim_and_gradient, tables, tiles
from tests.vafa_oracle import toy_case as case
from tests.vafa_oracle import toy_network as network

Array = NDArray[np.float64]
BANDS = ("all", "low", "middle", "high")


def mask(block: tuple[int, ...], band: str) -> NDArray[np.bool_]:
    """Which coefficients may change: the published pyramids around the first and the last one, for any block."""
    half = Fraction(1, 2)
    found = np.zeros(block, dtype=bool)
    for k in itertools.product(*(range(n) for n in block)):
        low = sum(Fraction(at, n) for at, n in zip(k, block, strict=True)) < half
        high = sum(Fraction(n - 1 - at, n) for at, n in zip(k, block, strict=True)) < half
        found[k] = {"all": True, "low": low, "high": high, "middle": not (low or high)}[band]
    found[(0,) * len(block)] = False
    return found


def render(image: Array, xi: Array, block: tuple[int, ...], band: str) -> Array:
    """Eq. 1 on intensities around 1/2; what the band leaves alone has the factor 1."""
    out, free = np.empty_like(image), mask(block, band)
    for at_xi, at_x in tiles(image.shape, block):
        out[at_x] = idctn(dctn(image[at_x] - 0.5, norm="ortho") * np.where(free, xi[at_xi], 1), norm="ortho") + 0.5
    return out


def backward(image: Array, gradient: Array, block: tuple[int, ...], band: str) -> Array:
    """dL/dxi from dL/d(rendered image): the transform is its own inverse's adjoint."""
    out, free = tables(image.shape, block, 0), mask(block, band)
    for at_xi, at_x in tiles(image.shape, block):
        out[at_xi] = free * dctn(image[at_x] - 0.5, norm="ortho") * dctn(gradient[at_x], norm="ortho")
    return out


def algorithm(
    model: Model,
    image: torch.Tensor,
    label: torch.Tensor,
    attack: SA2,
    *,
    loss: Loss,
    ssim_weight: float,
    step_size: float,
    clipped: bool,
    cosine: bool = False,
) -> Iterator[tuple[Array, Array]]:
    """Algorithm 1 for ``steps`` steps: what the model sees, and the noise that made it; seed 3."""
    x, block = image.numpy(), attack.block_size
    shape = tables(x.shape, block, 0).shape
    start = torch.rand((1, *shape[1:]), generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    xi = np.broadcast_to(1 - attack.rho + 2 * attack.rho * start, shape)
    for i in range(attack.steps):
        raw = render(x, xi, block, attack.band)
        image_adv = np.clip(raw, 0, 1) if clipped else raw
        yield image_adv, xi
        _, gradient = model_loss_and_gradient(model, image_adv, label, loss)
        gradient = -gradient if attack.targeted else gradient
        for b, c in np.ndindex(*x.shape[:2]):
            if ssim_weight:
                value, slope = ssim_and_gradient(x[b, c], image_adv[b, c])
                gradient[b, c] += ssim_weight * slope / np.prod(x.shape[:2]) * (value > 0)
        gradient = gradient * ((raw >= 0) & (raw <= 1)) if clipped else gradient
        slope = backward(x, gradient, block, attack.band)
        length = step_size * ((1 + np.cos(np.pi * i / attack.steps)) / 2 if cosine else 1)
        xi = np.clip(xi + length * np.sign(slope), 1 - attack.rho, 1 + attack.rho)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SHAPES = [
    ((2, 1, 8, 12, 8), (4, 4, 4)),
    ((1, 2, 8, 8, 6), (4, 8, 2)),
    ((1, 2, 8, 8, 3), (4, 4)),
    ((2, 1, 8, 12), (4, 6)),
]


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize(("band", "targeted"), [("all", False), ("middle", True)])
def test_reference_follows_the_published_loop(
    shape: tuple[int, ...], block: tuple[int, ...], band: str, targeted: bool
) -> None:
    """0.2 Dice loss - 0.75 (1 - SSIM) of the whole image, steps of 0.1, unclipped until the end."""
    model, (image, label) = network(shape[1], 3, len(shape) - 2), case(*shape)
    attack = SA2(steps=5, block_size=block, band=band, targeted=targeted, reference=True)
    theirs = list(
        algorithm(
            model,
            image,
            label,
            attack,
            loss=lambda logits, label: 0.2 * DICE_CE(logits, label),
            ssim_weight=0.75,
            step_size=0.1,
            clipped=False,
        )
    )
    ours = list(attack.trajectory(model, image, label, seed()))
    assert len(ours) == len(theirs) == 5
    for step, (image_adv, _) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(step.image_adv.numpy(), image_adv, rtol=0, atol=1e-9)
    last = theirs[-1][0]
    np.testing.assert_allclose(attack(model, image, label, generator=seed()).numpy(), np.clip(last, 0, 1), atol=1e-9)
    assert np.abs(last - theirs[-2][0]).max() > 1e-3
    assert min(image_adv.min() for image_adv, _ in theirs) < 0  # or clipping inside the loop would not show


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("ssim_weight", [0.0, 0.5])
def test_the_default_climbs_by_the_sign_of_its_own_gradient(
    shape: tuple[int, ...], block: tuple[int, ...], ssim_weight: float
) -> None:
    """Clipped to [0, 1] before the model looks, soft Dice, steps by a cosine from 2 rho; the best is returned."""
    model, (image, label) = network(shape[1], 3, len(shape) - 2), case(*shape)
    attack = SA2(rho=0.3, steps=5, block_size=block, ssim_weight=ssim_weight)
    theirs = algorithm(
        model,
        image,
        label,
        attack,
        loss=lambda logits, label: SoftDice()(logits, label).mean(),
        ssim_weight=ssim_weight,
        step_size=0.6,
        clipped=True,
        cosine=True,
    )
    ours = list(attack.trajectory(model, image, label, seed()))
    assert len(ours) == 6  # where the last step led is judged too
    for step, (image_adv, _) in zip(ours[:5], theirs, strict=True):
        np.testing.assert_allclose(step.image_adv.numpy(), image_adv, rtol=0, atol=1e-9)
    best = torch.stack([step.score for step in ours]).argmax(0)
    expected = torch.stack([ours[step].image_adv[one] for one, step in enumerate(best)])
    torch.testing.assert_close(attack(model, image, label, generator=seed()), expected, rtol=0, atol=1e-9)
    last = replace(attack, keep_best=False)(model, image, label, generator=seed())
    torch.testing.assert_close(last, ours[-1].image_adv, rtol=0, atol=1e-9)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    "settings", [{"steps": 1, "step_size": 0.6}, {"steps": 10}, {"steps": 10, "random_start": False}]
)
def test_reaches_the_worst_noise_of_a_linear_model(band: str, settings: dict) -> None:
    """Where the objective is linear in the voxels, each coefficient goes rho |c| along the objective's own."""
    block, objective = (4, 4, 4), LinearObjective()
    image, label = case(2, 1, 8, 8, 8, low=0.4, high=0.6)
    attack = SA2(rho=0.3, block_size=block, band=band, objective=objective, **settings)
    expected, weights = image.numpy().copy(), objective.weights(image).expand_as(image).numpy()
    for _, at in tiles(image.shape, block):
        slope = np.sign(dctn(weights[at], norm="ortho"))
        c = np.abs(dctn(image[at] - 0.5, norm="ortho")) * mask(block, band)
        expected[at] += idctn(0.3 * c * slope, norm="ortho")
    assert expected.min() > 0
    assert expected.max() < 1
    np.testing.assert_allclose(attack(lambda x: x, image, label).numpy(), expected, rtol=0, atol=1e-9)
    toward = replace(attack, targeted=True)(lambda x: x, image, label)
    np.testing.assert_allclose(toward.numpy(), 2 * image.numpy() - expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", [(4, 4, 4), (8, 8, 8), (6, 6), (5, 5, 5), (4, 2, 6), (3, 8)])
def test_bands_are_pyramids_at_both_ends_of_the_block(block: tuple[int, ...]) -> None:
    found = {band: band_mask(block, band).numpy() for band in BANDS}
    for band in BANDS:
        np.testing.assert_array_equal(found[band], mask(block, band))
    np.testing.assert_array_equal(sum(found[band].astype(int) for band in BANDS[1:]), found["all"])
    if len(set(block)) == 1 and block[0] % 2 == 0:
        half = block[0] // 2
        corner = half * (half + 1) * (half + 2) // 6 if len(block) == 3 else half * (half + 1) // 2
        assert found["high"].sum() == corner
        assert found["low"].sum() == corner - 1  # the constant coefficient never moves


@pytest.mark.parametrize("band", BANDS)
def test_nothing_changes_outside_the_band(band: str) -> None:
    block = (4, 4, 4)
    model, (image, label) = network(1, 3, 3), case(2, 1, 8, 8, 8, low=0.4, high=0.6)
    image_adv = SA2(block_size=block, band=band)(model, image, label)
    for _, at in tiles(image.shape, block):
        c, change = (dctn(x[at], norm="ortho") for x in (image.numpy(), (image_adv - image).numpy()))
        assert np.abs(change[~mask(block, band)]).max() < 1e-12
        assert (np.abs(change) <= 0.4 * np.abs(c) + 1e-12).all()
        assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"steps": 0}, {"reference": True}, {"band": "low"}, {"block_size": (4, 4)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_block_changes_by_more_than_its_share(options: dict, dtype: torch.dtype) -> None:
    """The norm of a block's change is at most rho times that of its free coefficients: clipped, and cut at the edge."""
    model, (image, label) = network(2, 3, 3).to(dtype), case(2, 2, 9, 6, 5)
    image = ((image - 0.2) / 0.6).clamp(0, 1)  # many voxels at both ends of the range
    image[0, :, :4, :4, :4] = 0.3  # a flat block
    image = image.to(dtype)
    attack = SA2(**{"block_size": (4, 4, 4), "steps": 4, **options})
    threat, block = attack.threat, attack.block_size
    for image_adv in (
        attack(model, image, label),
        *(s.image_adv for s in attack.trajectory(model, image, label, seed())),
    ):
        if not attack.reference:
            torch.testing.assert_close(threat.project(image_adv, image), image_adv, rtol=0, atol=2e-7)
    image_adv = attack(model, image, label)
    assert torch.equal(threat.project(image_adv, image), image_adv)
    assert torch.equal(threat.project(image, image), image)
    pads = [(0, 0), (0, 0)] + [(0, -n % b) for n, b in zip(image.shape[2:], block, strict=False)]
    pads += [(0, 0)] * (5 - len(pads))
    clean = np.pad(image.double().numpy(), pads, mode="edge")
    change = np.pad((image_adv - image).double().numpy(), pads)
    shares = []
    for _, at in tiles(clean.shape, block):
        free = dctn(clean[at] - 0.5, norm="ortho") * mask(block, attack.band)
        moved, bound = np.linalg.norm(change[at]), 0.4 * np.linalg.norm(free)
        assert moved <= bound * (1 + 1e-5) + 1e-6
        shares.append(moved / max(bound, 1e-3))
    assert max(shares) > 0.3


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 1, 8, 8, 8), (1, 2, 7, 9, 5), (2, 3, 9, 6)])
def test_projection_is_idempotent_from_anywhere(size: tuple[int, ...], band: str, dtype: torch.dtype) -> None:
    """Also around nearly flat blocks, whose bound is smaller than what rounding leaves."""
    generator = torch.Generator().manual_seed(2)
    threat = SpectralBall(0.2, (4, 4, 4), band)
    for flatness in (1.0, 1e-3, 1e-6, 1e-7, 0.0):
        image = (0.5 + flatness * (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5)).to(dtype)
        for reach in (1.0, 0.01, 1e-6):
            far = image + reach * torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            once = threat.project(far, image)
            assert once.dtype == dtype
            assert torch.equal(threat.project(once, image), once)
            assert (once - image).abs().max() <= 0.2 * 8 * flatness + 1e-6
        assert torch.equal(threat.project(image, image), image)


def test_projection_goes_to_the_nearest_point_of_one_block() -> None:
    """Inside [0, 1] the projection onto a ball is along the radius."""
    generator = torch.Generator().manual_seed(4)
    image = 0.4 + 0.2 * torch.rand((1, 1, 4, 4, 4), generator=generator, dtype=torch.float64)
    direction = torch.randn((1, 1, 4, 4, 4), generator=generator, dtype=torch.float64)
    bound = 0.1 * (image - image.mean()).norm()
    expected = image + direction * bound / direction.norm()
    torch.testing.assert_close(SpectralBall(0.1, (4, 4, 4)).project(image + direction, image), expected)


@pytest.mark.parametrize("reference", [False, True])
def test_without_a_bound_nothing_moves(reference: bool) -> None:
    model, (image, label) = network(1, 3, 3).float(), case(2, 1, 9, 8, 7)
    image = image.float()
    assert torch.equal(SA2(rho=0, block_size=(4, 4, 4), reference=reference)(model, image, label), image)


def test_is_stronger_than_random_factors_in_the_same_bounds() -> None:
    """Than 20 uniform draws, and than 20 draws of the extremes 1 - rho and 1 + rho."""
    block = (4, 4, 4)
    model, (image, label) = network(1, 3, 3), case(2, 1, 8, 8, 8, low=0.2, high=0.8)
    attack = SA2(block_size=block)
    harm = SoftDice()(model(attack(model, image, label)), label)
    rng = np.random.default_rng(0)
    draws = [
        replace(attack, steps=0)(model, image, label, generator=torch.Generator().manual_seed(n)) for n in range(20)
    ]
    for _ in range(20):
        xi = rng.choice([0.6, 1.4], tables(image.shape, block, 0).shape)
        draws.append(torch.from_numpy(np.clip(render(image.numpy(), xi, block, "all"), 0, 1)))
    clean = SoftDice()(model(image), label)
    gains = torch.stack([SoftDice()(model(x), label) - clean for x in draws])
    assert (harm - clean > 2 * gains.max(0).values).all()


def test_pictures_use_the_first_two_block_sizes() -> None:
    model, (image, label) = network(1, 3, 2), case(2, 1, 9, 10)
    three = SA2(block_size=(4, 5, 6))(model, image, label)
    assert torch.equal(three, SA2(block_size=(4, 5))(model, image, label))


def test_settings_left_open_are_resolved_and_printed() -> None:
    names = ("step_size", "schedule", "ssim_weight", "objective")
    assert [SA2().setting(name) for name in names] == [0.8, "cosine", 0, SoftDice()]
    assert SA2(rho=0.2, steps=20).setting("step_size") == pytest.approx(0.4)
    assert SA2(step_size=0.1).setting("schedule") == "constant"
    reference = SA2(rho=0.2, steps=20, reference=True)
    assert [reference.setting(name) for name in names] == [0.1, "constant", pytest.approx(3.75), DiceCE()]
    assert SA2(block_size=[8, 8, 8]) == SA2(block_size=(8, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho >= 0"),
        ({"rho": float("nan")}, "rho >= 0"),
        ({"rho": float("inf")}, "rho >= 0"),
        ({"steps": 2.5}, "whole steps"),
        ({"steps": -1}, "whole steps"),
        ({"block_size": (8,)}, "block sizes"),
        ({"block_size": (8, 8, 0)}, "block sizes"),
        ({"band": "top"}, "expected band"),
        ({"steps": 0, "reference": True}, "steps >= 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SA2(**settings)
