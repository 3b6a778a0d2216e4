"""MI-FGSM against its equations, written out, and against closed-form worst cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import LinearObjective, SmallNet, VoxelLinear, data
from torch import Tensor

from medrobust.attacks import BIM, MIFGSM, CrossEntropy, DiceCE, RandomNoise, SoftDice

EPS, STEP = 8 / 255, 2 / 255


def equations(model: SmallNet, image: Tensor, label: Tensor, norm: str, steps: int, decay: float) -> np.ndarray:
    """Eq. 6, then Eq. 7 or 10, clipped to the ball and to [0, 1]; one case after the other, float64 NumPy."""
    results = []
    for case in range(len(image)):
        clean = image[case : case + 1].numpy()
        x, g = clean.copy(), np.zeros_like(clean)
        for _ in range(steps):
            leaf = torch.from_numpy(x).requires_grad_()
            (slope,) = torch.autograd.grad(DiceCE()(model(leaf), label[case : case + 1]).sum(), leaf)
            g = decay * g + slope.numpy() / np.abs(slope.numpy()).sum()
            if norm == "linf":
                x = np.clip(x + STEP * np.sign(g), clean - EPS, clean + EPS)
            else:
                x = x + STEP * g / np.sqrt((g**2).sum())
                length = np.sqrt(((x - clean) ** 2).sum())
                x = clean + (x - clean) * min(1, EPS / length)
            x = np.clip(x, 0, 1)
        results.append(x)
    return np.concatenate(results)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_is_what_the_equations_say(norm: str, decay: float) -> None:
    model, (image, label) = SmallNet().eval().double(), data()
    image = image.double()
    attack = MIFGSM(eps=EPS, norm=norm, steps=6, step_size=STEP, decay=decay, objective=DiceCE(), keep_best=False)
    expected = equations(model, image, label, norm, 6, decay)
    np.testing.assert_allclose(attack(model, image, label).numpy(), expected, rtol=0, atol=1e-9)
    assert np.abs(expected - image.numpy()).max() > 1e-4


def test_momentum_changes_the_way() -> None:
    """Or the comparison above could not tell whether the momentum is there."""
    model, (image, label) = SmallNet().eval().double(), data()
    few, many = (equations(model, image.double(), label, "linf", 6, decay) for decay in (0.0, 1.0))
    assert (np.abs(few - many) > STEP / 2).mean() > 0.01


def test_without_momentum_it_is_bim() -> None:
    model, (image, label) = SmallNet().eval(), data()
    settings = {"eps": EPS, "step_size": STEP, "steps": 5}
    assert torch.equal(MIFGSM(decay=0, **settings)(model, image, label), BIM(**settings)(model, image, label))


@pytest.mark.parametrize("objective", [SoftDice(), CrossEntropy(), DiceCE()])
def test_reaches_the_worst_image_of_a_voxel_linear_model(objective: object) -> None:
    image, label = data(classes=2)
    expected = VoxelLinear.worst(image, label, EPS)
    attack = MIFGSM(eps=EPS, objective=objective)
    torch.testing.assert_close(attack(VoxelLinear(), image, label), expected, rtol=0, atol=1e-6)
    target = replace(attack, targeted=True)(VoxelLinear(), image, 1 - label)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)


def test_l2_reaches_the_closed_form_on_a_linear_objective() -> None:
    """All gradients agree, so the steps end at the edge of the ball, eps along the gradient."""
    image, objective = torch.full((2, 1, 5, 6, 7), 0.5), LinearObjective()
    direction = objective.weights(image).expand_as(image)
    expected = image + 0.5 * direction / direction[0].norm()
    got = MIFGSM(norm="l2", eps=0.5, objective=objective)(lambda x: x, image, torch.zeros(2, 1, 5, 6, 7))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_best_iterate_is_kept_per_case() -> None:
    """With steps far too long the last iterate is worse than an earlier one; the best of all is returned."""
    model, (image, label) = SmallNet().eval(), data()
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        logits = model(x)
        seen.append(SoftDice()(logits, label).detach())
        return logits

    image_adv = MIFGSM(eps=0.3, step_size=0.5, steps=6)(spy, image, label)
    assert len(seen) == 7  # a forward pass for every step, one for the last image
    scores = torch.stack(seen)
    assert (scores.argmax(0) < 6).any()
    torch.testing.assert_close(SoftDice()(model(image_adv), label), scores.max(0).values)


def test_each_channel_has_a_radius_of_its_own() -> None:
    image, label = data(channels=2, classes=2)
    up = (1 - 2 * label).expand_as(image)
    expected = (image + torch.tensor([EPS, EPS / 4]).view(1, 2, 1, 1, 1) * up).clamp(0, 1)
    attack = MIFGSM(eps=(EPS, EPS / 4), steps=4)
    assert attack.setting("step_size") == (2 * EPS, EPS / 2)
    torch.testing.assert_close(attack(VoxelLinear(), image, label), expected, rtol=0, atol=1e-6)


def test_a_flat_model_leaves_the_image_alone() -> None:
    image, label = data()
    image_adv = MIFGSM()(lambda x: (0 * x).expand(-1, 3, -1, -1, -1), image, label)
    assert torch.equal(image_adv, image)


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_beats_noise_of_the_same_ball(norm: str, eps: float) -> None:
    model, (image, label) = SmallNet().eval(), data()
    harm = SoftDice()(model(MIFGSM(norm=norm, eps=eps)(model, image, label)), label)
    noise = RandomNoise(norm=norm, eps=eps)
    draws = [noise(model, image, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert (harm > torch.stack([SoftDice()(model(draw), label) for draw in draws]).max(0).values).all()


def test_step_size_follows_eps_in_a_sweep() -> None:
    attack = MIFGSM(eps=8 / 255, steps=16)
    assert attack.setting("step_size") == pytest.approx(16 / 255)
    assert replace(attack, eps=4 / 255).setting("step_size") == pytest.approx(8 / 255)
    assert replace(attack, step_size=0.01).setting("step_size") == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "whole steps"),
        ({"steps": 2.5}, "whole steps"),
        ({"decay": -0.1}, "decay >= 0"),
        ({"decay": float("nan")}, "decay >= 0"),
        ({"eps": -1}, "eps >= 0"),
        ({"norm": "l1"}, "norm 'linf' or 'l2'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIFGSM(**settings)
