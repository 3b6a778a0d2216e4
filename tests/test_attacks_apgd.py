"""APGD and its shrinking radius against a derivation from the publication by somebody else (sea_oracle)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sea_oracle as oracle
import torch
from oracles import SmallNet, data
from torch import Tensor, nn

from medrobust.attacks import APGD, PGD, CrossEntropy, HardDice, SoftDice, VoxelError
from medrobust.attacks.apgd import _Checkpoints
from medrobust.attacks.voxel_losses import (
    BalancedMaskedCE,
    CosPGDLoss,
    JensenShannon,
    MaskedCE,
    MaskedMargin,
    MaskedSpherical,
    MCEDice,
    SegPGDLoss,
)

EPS = 0.3
"""Large: in a small ball the signs of a small network never change and all variants agree."""

PAIRS: dict[str, tuple[Any, Any]] = {
    "masked ce": (MaskedCE(), oracle.mask_ce),
    "balanced": (
        BalancedMaskedCE(weights=(0.2, 0.3, 0.5)),
        partial(oracle.mask_ce_bal, weights=np.array([0.2, 0.3, 0.5])),
    ),
    "js": (JensenShannon(), oracle.js),
    "segpgd": (SegPGDLoss(), oracle.Scheduled(oracle.segpgd)),
    "cospgd": (CosPGDLoss(), oracle.cospgd),
    "spherical": (MaskedSpherical(), oracle.spherical),
    "mce-dice": (MCEDice(), oracle.mce_dice),
    "ce": (CrossEntropy(), oracle.ce),
}


def setting(classes: int = 3, ignored: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    model = SmallNet(2, classes=classes).eval().double()
    image, label = data(2, classes=max(classes, 2), side=8)
    if ignored:
        label[:, :, :2] = -1
    return model, image.double(), label


def noise(image: Tensor, seed: int) -> np.ndarray:
    drawn = torch.rand((1, *image.shape[1:]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * drawn - 1).numpy()


@pytest.mark.parametrize(
    ("steps", "as_published", "progressive"),
    [(10, True, False), (10, True, True), (10, False, True), (90, True, False), (90, False, False), (120, True, True)],
)
@pytest.mark.parametrize("name", PAIRS)
def test_follows_the_derivation(name: str, steps: int, as_published: bool, progressive: bool) -> None:
    model, image, label = setting()
    objective, loss = PAIRS[name]
    attack = APGD(
        eps=EPS,
        steps=steps,
        objective=objective,
        track=CrossEntropy(),
        criterion=VoxelError(),
        progressive=progressive,
        as_published=as_published,
    )
    ours = attack(model, image, label, generator=torch.Generator().manual_seed(3))
    x, y = image.numpy(), label.numpy()
    if progressive:
        found = oracle.red_eps(model, x, y, EPS, steps, loss, oracle.ce, noise(image, 3), as_published=as_published)
    else:
        start = np.clip(x + EPS * noise(image, 3), 0, 1)
        found = oracle.apgd(model, x, y, EPS, steps, loss, oracle.ce, start, as_published=as_published)
    torch.testing.assert_close(ours, torch.from_numpy(found.x_adv), rtol=0, atol=1e-6)
    error = VoxelError()(model(ours), label)
    torch.testing.assert_close(error, 1 - torch.from_numpy(found.accuracy), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "loss"),
    [(MaskedMargin(), oracle.mask_margin), (MCEDice(), oracle.mce_dice), (MaskedCE(), oracle.mask_ce)],
)
def test_follows_the_derivation_on_one_sigmoid_channel(objective: Any, loss: Any) -> None:
    model, image, label = setting(classes=1)
    attack = APGD(eps=EPS, steps=30, objective=objective, track=objective, criterion=VoxelError(), random_start=False)
    found = oracle.apgd(model, image.numpy(), label.numpy(), EPS, 30, loss, loss, image.numpy(), as_published=False)
    torch.testing.assert_close(attack(model, image, label), torch.from_numpy(found.x_adv), rtol=0, atol=1e-6)


def test_the_runs_compared_above_are_no_trivial_ones() -> None:
    """Different iterates, halved steps: else agreement would prove nothing."""
    model, image, label = setting()
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    APGD(eps=EPS, steps=90, objective=MaskedCE(), random_start=False)(spy, image, label)
    assert len(seen) == 91
    assert len({x.numpy().tobytes() for x in seen}) > 80
    moves = [(after - before).abs().max().item() for before, after in pairwise(seen)]
    assert max(moves[-10:]) < 0.3 * max(moves)


def test_published_ignored_voxels_hide_the_attack() -> None:
    """As published, the start looks so bad that no image replaces it; corrected, they have no say."""
    model, image, label = setting(ignored=True)
    label[:, :, :5] = -1
    attack = APGD(eps=0.05, steps=20, objective=MaskedCE(), criterion=VoxelError(of_all=True), as_published=True)
    start = np.clip(image.numpy() + 0.05 * noise(image, 0), image.numpy() - 0.05, image.numpy() + 0.05).clip(0, 1)
    torch.testing.assert_close(attack(model, image, label), torch.from_numpy(start), rtol=0, atol=1e-12)
    corrected = replace(attack, as_published=False, criterion=VoxelError())(model, image, label)
    gain = VoxelError()(model(corrected), label) - VoxelError()(model(torch.from_numpy(start)), label)
    assert (gain >= 0).all()
    assert gain.max() > 0.03


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (30, [6, 11, 15, 18, 20, *range(21, 31)]),
        (40, [8, 15, 21, 26, 30, 33, 35, 37, 39]),
        (90, [19, 36, 51, 64, 75, 84]),
        (120, [26, 49, 69, 86, 100, 111, 119]),
    ],
)
def test_checkpoints_are_the_published_ones(steps: int, expected: list[int]) -> None:
    checkpoints, found, step = _Checkpoints(steps), [], 0
    while (step := step + checkpoints.interval) <= steps:
        found.append(step)
        checkpoints.advance()
    assert found == expected


def test_stages_are_the_published_ones() -> None:
    attack = APGD(eps=0.1, steps=300, progressive=True)
    assert attack.stages() == [(0.2, 90), (pytest.approx(0.15), 90), (0.1, 120)]


def test_beats_pgd_with_as_many_steps() -> None:
    model, (image, label) = SmallNet().eval(), data()
    settings: dict[str, Any] = {"eps": 0.2, "steps": 40}
    ours = APGD(**settings)(model, image, label)
    theirs = PGD(**settings)(model, image, label)
    assert (HardDice()(model(ours), label) >= HardDice()(model(theirs), label)).all()


def test_l2_reaches_the_closed_form_on_a_linear_objective() -> None:
    from oracles import LinearObjective

    image = torch.full((2, 1, 5, 6, 7), 0.5)
    objective = LinearObjective()
    attack = APGD(norm="l2", eps=0.5, steps=100, objective=objective, criterion=objective)
    direction = objective.weights(image).expand_as(image)
    expected = image + 0.5 * direction / direction[0].norm()
    got = attack(lambda x: x, image, torch.zeros(2, 1, 5, 6, 7))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_chooses_by_the_criterion_that_is_given() -> None:
    model, (image, label) = SmallNet().eval(), data()
    by_dice = APGD(eps=0.2, steps=20, objective=MaskedCE())(model, image, label)
    by_loss = APGD(eps=0.2, steps=20, objective=MaskedCE(), criterion=SoftDice())(model, image, label)
    assert (HardDice()(model(by_dice), label) >= HardDice()(model(by_loss), label)).all()
    assert (SoftDice()(model(by_loss), label) >= SoftDice()(model(by_dice), label)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "whole steps"),
        ({"restarts": 2, "random_start": False}, "expected random_start"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"progressive": True, "steps": 3}, "at least 4 steps"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APGD(**settings)
