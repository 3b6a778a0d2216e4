"""Attacks that change while a model trains."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from medrobust.attacks import FGSM, PGD, VAFA
from medrobust.schedules import Mix, WarmUp, attack_of, attacks_of


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.2), (2.5, 0.4), (5, 0.6), (10, 1), (99, 1)])
def test_warm_up_is_linear_and_ends_at_full_strength(epoch: float, share: float) -> None:
    attack = PGD(eps=8 / 255, steps=7)
    now = WarmUp(attack=attack, epochs=10, start=0.2)(epoch, torch.Generator())
    assert isinstance(now, PGD)
    assert now.eps == pytest.approx(share * 8 / 255)
    assert now.steps == 7
    # The step follows the radius.
    assert now.setting("step_size") / attack.setting("step_size") == pytest.approx(share)


def test_warm_up_of_tables() -> None:
    now = WarmUp(attack=VAFA(q_max=20), epochs=4, setting="q_max", start=0.5)(2, torch.Generator())
    assert isinstance(now, VAFA)
    assert now.q_max == pytest.approx(15)


def test_mix_draws_by_weight_and_repeats_with_its_generator() -> None:
    mix = Mix(attacks=[FGSM(), PGD(), WarmUp(attack=VAFA(), epochs=3, setting="q_max")], weights=[1, 3, 0])

    def draws(seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return [type(mix(0, generator)).__name__ for _ in range(400)]

    counts = Counter(draws(0))
    assert set(counts) == {"FGSM", "PGD"}
    assert counts["PGD"] == pytest.approx(300, abs=45)  # five standard deviations
    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_a_schedule_within_a_mix_is_resolved() -> None:
    mix = Mix(attacks=[WarmUp(attack=FGSM(eps=0.1), epochs=2, start=0.5)])
    now = attack_of(mix, 1.0, torch.Generator())
    assert isinstance(now, FGSM)
    assert now.eps == pytest.approx(0.075)
    assert attack_of(now, 0.0, torch.Generator()) is now


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: WarmUp(attack=FGSM(), epochs=3, setting="q_max"), "expected a setting of"),
        (lambda: WarmUp(attack=FGSM(), epochs=0), "expected epochs > 0"),
        (lambda: WarmUp(attack=FGSM(), epochs=1, start=0), "0 < start <= 1"),
        (lambda: WarmUp(attack=PGD(), epochs=1, setting="steps"), "expected a setting that can grow"),
        (lambda: WarmUp(attack=VAFA(q_min=5), epochs=1, setting="q_max"), "q_max=2"),
        (lambda: Mix(attacks=[FGSM()], weights=[0]), "one weight >= 0 per attack"),
        (lambda: Mix(attacks=[]), "one weight >= 0 per attack"),
        (lambda: Mix(attacks=[FGSM()], weights=[1, 2]), "one weight >= 0 per attack"),
        (lambda: Mix(attacks=[FGSM()], weights=[-1]), "one weight >= 0 per attack"),
    ],
)
def test_wrong_settings_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]


def test_all_attacks_of_a_schedule_are_known() -> None:
    fgsm, pgd = FGSM(), PGD()
    assert attacks_of(fgsm) == [fgsm]
    assert attacks_of(Mix(attacks=[fgsm, WarmUp(attack=pgd, epochs=2)])) == [fgsm, pgd]
    assert attacks_of(lambda epoch, generator: fgsm) == []


def test_a_step_size_that_grows_keeps_its_schedule() -> None:
    attack = PGD(eps=8 / 255, steps=7)
    warm = WarmUp(attack=attack, epochs=2, setting="step_size", start=0.5)
    half, full = (warm(epoch, torch.Generator()) for epoch in (0.0, 5.0))
    assert [full.step_size_at(step) for step in range(7)] == [attack.step_size_at(step) for step in range(7)]
    assert half.step_size_at(3) == pytest.approx(attack.step_size_at(3) / 2)
