"""The standard ensemble: at least as strong as each of its members, done early where all is broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import SmallNet, VoxelLinear, data
from torch import Tensor

from medrobust.attacks import APGD, CrossEntropy, HardDice, SoftDice, Square, Standard, VoxelError
from medrobust.attacks.base import Model
from medrobust.attacks.scores import ceiling

EPS = 8 / 255


def harm(model: Model, image: Tensor, label: Tensor, head: str = "softmax") -> Tensor:
    with torch.no_grad():
        return HardDice(head=head)(model(image), label)


def test_each_case_gets_its_worst_member() -> None:
    model, (image, label) = SmallNet(2).eval(), data(2, batch=3)
    attack = Standard(eps=EPS)
    generator = torch.Generator().manual_seed(0)
    alone = [harm(model, member(model, image, label, generator=generator), label) for member in attack.members]
    worst = torch.stack([harm(model, image, label), *alone]).amax(0)
    assert torch.equal(harm(model, attack(model, image, label), label), worst)
    assert len({values.argmax().item() for values in torch.stack(alone).T}) >= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_parameter_free_and_takes_at_most_300_gradients(norm: str) -> None:
    model, (image, label) = SmallNet(2).eval(), data(2, batch=1)
    asked = {True: 0, False: 0}

    def counted(x: Tensor) -> Tensor:
        asked[x.requires_grad] += 1
        return model(x)

    Standard(eps=1e-4, norm=norm)(counted, image, label)
    assert asked[True] == 300
    assert asked[False] <= 120
    assert any(isinstance(member, Square) for member in Standard().members)


def test_it_ends_where_every_case_is_broken() -> None:
    """A voxel-linear model at an eps that flips everything: the first gradient does it, and nothing more is asked."""
    image, label = data(2, classes=2)
    asked = []

    def counted(x: Tensor) -> Tensor:
        asked.append(x)
        return VoxelLinear()(x)

    image_adv = Standard(eps=1.0)(counted, image, label)
    assert harm(VoxelLinear(), image_adv, label).tolist() == [1, 1]
    assert len(asked) < 10


def test_apgd_ends_where_every_case_is_broken_with_the_same_image() -> None:
    image, label = data(2, classes=2)
    asked = []

    def counted(x: Tensor) -> Tensor:
        asked.append(x)
        return VoxelLinear()(x)

    short = APGD(eps=1.0, steps=30)(counted, image, label)
    early = len(asked)
    assert early < 10
    # A criterion without a ceiling searches on, and finds no more.
    whole = APGD(eps=1.0, steps=30, criterion=SoftDice())(counted, image, label)
    assert len(asked) - early == 31
    assert harm(VoxelLinear(), short, label).tolist() == harm(VoxelLinear(), whole, label).tolist() == [1, 1]


def test_one_open_case_keeps_the_others_searching_and_changes_none_of_them() -> None:
    """A case's result does not depend on when its neighbours were broken."""
    model, (image, label) = SmallNet(2).eval(), data(2, batch=2)
    label[0] = model(image)[:1].argmax(1)
    together = APGD(eps=EPS, steps=12)(model, image, label)
    for case in range(2):
        one = slice(case, case + 1)
        torch.testing.assert_close(
            APGD(eps=EPS, steps=12)(model, image[one], label[one]), together[one], rtol=0, atol=2e-6
        )


def test_what_a_score_cannot_exceed() -> None:
    assert ceiling(HardDice(), targeted=False) == 1
    assert ceiling(VoxelError(), targeted=True) == 0
    assert ceiling(CrossEntropy(), targeted=False) == float("inf")


def test_heads_and_targets() -> None:
    model, (image, _) = SmallNet(2).eval(), data(2)
    label = (torch.rand(2, 3, *image.shape[2:], generator=torch.Generator().manual_seed(0)) < 0.3).long()
    attack = Standard(eps=EPS, objective=SoftDice(head="sigmoid"))
    assert {member.setting("objective").head for member in attack.members} == {"sigmoid"}
    clean = harm(model, image, label, "sigmoid")
    assert (harm(model, attack(model, image, label), label, "sigmoid") > clean).all()
    target = (model(image).argmax(1, keepdim=True) + 1) % 3
    toward = replace(Standard(eps=EPS), targeted=True)(model, image, target)
    error = VoxelError()
    assert (error(model(toward), target) < error(model(image), target)).all()
