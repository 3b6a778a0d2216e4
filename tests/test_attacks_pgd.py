"""PGD and its kin against their textbook forms and closed-form worst cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import LinearObjective, SmallNet, data
from torch import Tensor

from medrobust.attacks import BIM, FGSM, PGD, CrossEntropy, DiceCE, SoftDice
from medrobust.attacks.base import Attack
from medrobust.attacks.step_sizes import share

EPS, STEP = 8 / 255, 2 / 255


def textbook(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor, start: Tensor, steps: int) -> Tensor:
    """x <- clip(clip(x + a sign(grad), image - eps, image + eps), 0, 1), the last x."""
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(DiceCE()(model(x), label).sum(), x)
        x = torch.max(torch.min(x + STEP * gradient.sign(), image + EPS), image - EPS).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("steps", [1, 5])
def test_bim_is_the_textbook_form(steps: int) -> None:
    model, (image, label) = SmallNet().eval(), data()
    ours = BIM(eps=EPS, step_size=STEP, steps=steps, objective=DiceCE(), keep_best=False)(model, image, label)
    assert torch.equal(ours, textbook(model, image, label, image, steps))


def test_pgd_is_the_textbook_form_from_the_same_start() -> None:
    model, (image, label) = SmallNet().eval(), data()
    noise = torch.rand((1, *image.shape[1:]), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = (image + EPS * (2 * noise.float() - 1)).clamp(image - EPS, image + EPS).clamp(0, 1)
    attack = PGD(eps=EPS, step_size=STEP, steps=5, objective=DiceCE(), keep_best=False)
    ours = attack(model, image, label, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours, textbook(model, image, label, start, 5), rtol=0, atol=1e-7)


def test_one_bim_step_of_full_length_is_fgsm() -> None:
    model, (image, label) = SmallNet().eval(), data()
    one = BIM(eps=EPS, step_size=EPS, steps=1, keep_best=False)(model, image, label)
    torch.testing.assert_close(one, FGSM(eps=EPS)(model, image, label), rtol=0, atol=1e-7)


@pytest.mark.parametrize("make", [FGSM, BIM, PGD])
def test_l2_reaches_the_closed_form_on_a_linear_objective(make: type[Attack]) -> None:
    """The best point of an L2 ball for a linear function is eps along its gradient."""

    def model(x: Tensor) -> Tensor:
        return x

    image = torch.full((2, 1, 5, 6, 7), 0.5)
    objective = LinearObjective()
    settings = {} if make is FGSM else {"steps": 30, "step_size": 0.25}
    attack = make(norm="l2", eps=0.5, objective=objective, **settings)
    direction = objective.weights(image).expand_as(image)
    expected = image + 0.5 * direction / direction[0].norm()
    got = attack(model, image, torch.zeros(2, 1, 5, 6, 7))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    gain = objective(got - image, image) / objective(expected - image, image)
    assert (gain > 0.999).all()


def test_the_best_iterate_is_kept_per_case() -> None:
    """With steps far too long the last iterate is worse than an earlier one; the best of all is returned."""
    model, (image, label) = SmallNet().eval(), data()
    attack = PGD(eps=0.3, step_size=0.5, steps=6)
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        logits = model(x)
        seen.append(SoftDice()(logits, label).detach())
        return logits

    image_adv = attack(spy, image, label)
    assert len(seen) == 7  # a forward pass for every step, one for the last image
    torch.testing.assert_close(SoftDice()(model(image_adv), label), torch.stack(seen).max(0).values)


def test_restarts_are_at_least_as_strong_as_each_run() -> None:
    model, (image, label) = SmallNet().eval(), data()
    generator = torch.Generator().manual_seed(9)
    singles = [PGD(steps=2)(model, image, label, generator=generator) for _ in range(3)]
    together = PGD(steps=2, restarts=3)(model, image, label, generator=torch.Generator().manual_seed(9))
    score = torch.stack([SoftDice()(model(single), label) for single in singles]).max(0).values
    torch.testing.assert_close(SoftDice()(model(together), label), score)


def test_step_size_follows_eps_in_a_sweep() -> None:
    attack = PGD(eps=8 / 255, steps=20)
    assert attack.setting("step_size") == pytest.approx(16 / 255)
    assert replace(attack, eps=4 / 255).setting("step_size") == pytest.approx(8 / 255)
    assert replace(attack, step_size=0.01).setting("step_size") == 0.01


def test_steps_shrink_by_the_rule_unless_their_size_is_given() -> None:
    attack = PGD(eps=8 / 255, steps=4)
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [attack.step_size_at(step) for step in range(4)] == pytest.approx([16 / 255 * share for share in cosine])
    given = replace(attack, step_size=0.01)
    assert [given.step_size_at(step) for step in range(4)] == [0.01] * 4
    linear = replace(given, schedule="linear")
    assert [linear.step_size_at(step) for step in range(4)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert "step_size=0.01, schedule='constant'" in repr(given)
    rows = replace(attack, eps=((0.1,), (0.2,)), schedule="linear")
    assert rows.step_size_at(2) == ((0.1,), (0.2,))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_each_schedule_takes_the_steps_it_says(norm: str, schedule: str) -> None:
    """A linear objective far from the edge of a wide ball: the way is the sum of the steps."""
    image, objective = torch.full((1, 1, 4, 4, 4), 0.5), LinearObjective()
    settings = {"eps": 100.0, "norm": norm, "step_size": 1e-3, "steps": 5, "objective": objective}
    attack = BIM(**settings, schedule=schedule)
    got = attack(lambda x: x, image, torch.zeros_like(image)) - image
    way = sum(share(schedule, step, 5) for step in range(5)) * 1e-3
    weights = objective.weights(image)
    direction = weights.sign() if norm == "linf" else weights / weights.norm()
    torch.testing.assert_close(got, way * direction, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "whole steps"),
        ({"steps": 2.5}, "whole steps"),
        ({"restarts": 3, "random_start": False}, "expected random_start"),
        ({"eps": -1}, "eps >= 0"),
        ({"eps": float("nan")}, "eps >= 0"),
        ({"norm": "l1"}, "norm 'linf' or 'l2'"),
        ({"schedule": "cos"}, "schedule among constant, linear, cosine"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**settings)


def test_a_model_that_gives_nan_is_named() -> None:
    image, label = data()
    with pytest.raises(ValueError, match="expected finite objectives"):
        PGD(objective=CrossEntropy())(lambda x: x.expand(-1, 3, -1, -1, -1) * float("nan"), image, label)
