"""What the best image of an attack is chosen by: what is kept is the worst of all that the model saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from oracles import SmallNet, data
from torch import Tensor

from medrobust.attacks import (
    APGD,
    BIM,
    MIFGSM,
    PGD,
    SA2,
    VAFA,
    VAFA2D,
    CosPGD,
    CrossEntropy,
    HardDice,
    MaskedCE,
    MCEDice,
    SegPGD,
    SegPGDLoss,
    SoftDice,
    Square,
    VoxelError,
)
from medrobust.attacks.base import Attack
from medrobust.attacks.scores import chooser

EPS = 0.1


@pytest.fixture(scope="module")
def fitted() -> tuple[SmallNet, Tensor, Tensor]:
    """A small network that gets nearly all of its two pictures right."""
    model, (image, label) = SmallNet(2).eval(), data(2, side=16)
    adam = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        adam.zero_grad()
        CrossEntropy()(model(image), label).sum().backward()
        adam.step()
    return model, image, label


ATTACKS: list[Attack] = [
    PGD(eps=EPS, steps=12),
    PGD(eps=EPS, steps=4, restarts=3),
    BIM(eps=EPS, steps=12),
    MIFGSM(eps=EPS, steps=12),
    SA2(rho=0.9, steps=12, block_size=(8, 8)),
    SA2(rho=0.9, steps=12, block_size=(8, 8), ssim_weight=1.0),
    VAFA2D(q_max=80, block_size=(8, 8), steps=12),
    VAFA(q_max=80, block_size=(8, 8), steps=12, solver="soft"),
]


@pytest.mark.parametrize("objective", [MaskedCE(), MCEDice(), SegPGDLoss()])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_masked_objective_keeps_the_image_of_the_lowest_dice(fitted: Any, attack: Attack, objective: Any) -> None:
    """Such an objective shrinks while the attack succeeds: its largest value marks an early, weak image."""
    model, image, label = fitted
    lost: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        logits = model(x)
        lost.append(HardDice()(logits, label).detach())
        return logits

    kept = HardDice()(model(replace(attack, objective=objective)(spy, image, label)), label)
    assert len(lost) in (13, 15)  # every step of every run, and the image after the last one
    torch.testing.assert_close(kept, torch.stack(lost).max(0).values, rtol=0, atol=1e-6)


def test_a_search_by_queries_climbs_what_images_are_chosen_by(fitted: Any) -> None:
    model, image, label = fitted
    attack = Square(eps=EPS, queries=60)
    kept = [
        HardDice()(model(replace(attack, objective=objective)(model, image, label)), label).mean()
        for objective in (MaskedCE(), SoftDice())
    ]
    assert kept[0] > 0.9 * kept[1] > 0.3


def test_the_objective_itself_would_choose_a_weak_image(fitted: Any) -> None:
    """Or the comparison above could not tell."""
    model, image, label = fitted
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor) -> Tensor:
        logits = model(x)
        seen.append((MaskedCE()(logits, label).detach(), HardDice()(logits, label).detach()))
        return logits

    PGD(eps=2 * EPS, steps=12, objective=MaskedCE())(spy, image, label)
    value, lost = (torch.stack(column) for column in zip(*seen, strict=True))
    assert lost.gather(0, value.argmax(0)[None]).mean() < lost.max(0).values.mean() - 0.1


@dataclass(frozen=True, kw_only=True)
class Told(CrossEntropy):
    """Cross-entropy that remembers how far the attack said it is."""

    steps: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def at(self, step: int, steps: int) -> Told:
        self.steps.append((step, steps))
        return self


@pytest.mark.parametrize("attack", [ATTACKS[0], *ATTACKS[2:]])
def test_an_objective_with_a_schedule_is_told_the_step(fitted: Any, attack: Attack) -> None:
    told = Told()
    replace(attack, objective=told)(*fitted)
    assert told.steps == [(step, 12) for step in range(13)]


def test_mifgsm_without_momentum_is_bim_on_a_schedule_too(fitted: Any) -> None:
    settings: dict[str, Any] = {"eps": EPS, "steps": 6, "step_size": EPS / 4, "objective": SegPGDLoss()}
    ours = MIFGSM(decay=0, keep_best=False, **settings)(*fitted)
    assert torch.equal(ours, BIM(keep_best=False, **settings)(*fitted))
    still = MIFGSM(decay=0, keep_best=False, **{**settings, "objective": MaskedCE()})(*fitted)
    assert not torch.equal(ours, still)


def test_no_steps_at_all_have_a_schedule_too(fitted: Any) -> None:
    for attack in (SA2(steps=0, block_size=(8, 8)), VAFA2D(steps=0, block_size=(8, 8))):
        assert torch.isfinite(replace(attack, objective=SegPGDLoss())(*fitted)).all()


@pytest.mark.parametrize(
    "attack",
    [
        CosPGD(eps=2 * EPS, steps=12, targeted=True),
        SegPGD(eps=2 * EPS, steps=12, targeted=True),
        PGD(eps=2 * EPS, steps=12, targeted=True, objective=MaskedCE()),
        PGD(eps=2 * EPS, steps=12, targeted=True, objective=MCEDice()),
        APGD(eps=2 * EPS, steps=20, targeted=True, objective=CrossEntropy()),
    ],
)
def test_a_structure_that_shall_go_is_erased_as_far_as_any_image_did(fitted: Any, attack: Attack) -> None:
    """Dice of a class that shall be absent is 0 until its last voxel is gone: it keeps an image of the first steps."""
    model, image, _ = fitted
    pred = model(image).argmax(1, keepdim=True)
    target = torch.where(pred == 1, 0, pred)
    wrong: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        logits = model(x)
        wrong.append(VoxelError()(logits, target).detach())
        return logits

    def erased(x: Tensor) -> float:
        return (model(x).argmax(1, keepdim=True) == 0)[pred == 1].float().mean().item()

    found = attack(spy, image, target)
    torch.testing.assert_close(VoxelError()(model(found), target), torch.stack(wrong).min(0).values)
    if hasattr(attack, "criterion"):
        by_dice = replace(attack, criterion=HardDice())(model, image, target)
        assert erased(found) > erased(by_dice) + 0.1
    if hasattr(attack, "keep_best"):
        assert erased(found) >= erased(replace(attack, keep_best=False)(model, image, target))
    assert erased(found) > 0.5


def test_the_rule() -> None:
    for objective in (SoftDice(), CrossEntropy(head="sigmoid")):
        assert chooser(objective, targeted=False) is objective
        assert chooser(objective, targeted=True) is objective
    assert chooser(MaskedCE(head="sigmoid"), targeted=False) == HardDice(head="sigmoid")
    assert chooser(MaskedCE(head="sigmoid"), targeted=True) == VoxelError(head="sigmoid")
    assert chooser(Told(), targeted=False) == HardDice()
    for cls in (APGD, SegPGD, CosPGD):
        assert cls().setting("criterion") == HardDice()
        assert cls(targeted=True).setting("criterion") == VoxelError()
        assert cls(targeted=True, criterion=SoftDice()).setting("criterion") == SoftDice()
    assert APGD(objective=MaskedCE()).setting("track") == SoftDice()
    assert APGD(objective=MaskedCE(), targeted=True).setting("track") == CrossEntropy()
