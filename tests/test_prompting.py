"""Attacks on all prompts of an image: every part that reads the channels reads one a prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medrobust import sea
from medrobust.attacks import APGD, CosPGD, CrossEntropy, MaskedCE, SoftDice, VoxelError
from medrobust.attacks.base import Attack
from medrobust.prompting import attack_all_prompts


class Bright(nn.Module):
    """One logit a pixel: what is brighter than 1/2."""

    def forward(self, image: Tensor) -> Tensor:
        return 10 * (image - 0.5)


@pytest.mark.parametrize(
    "attack",
    [
        CosPGD(),
        CosPGD(criterion=VoxelError()),
        APGD(objective=MaskedCE(), criterion=SoftDice(), track=CrossEntropy()),
        *sea.members("sea", budget="full").values(),
        *sea.members("sea-v2").values(),
    ],
)
def test_every_objective_of_an_attack_reads_a_channel_a_prompt(attack: Attack) -> None:
    image = torch.tensor([0.4, 0.48, 0.52, 0.6]).expand(1, 1, 4, 4)
    label = (image > 0.5).long()
    small = replace(attack, eps=0.05, steps=6)  # type: ignore[call-arg]
    image_adv = attack_all_prompts(small, [Bright(), Bright()], image, label, generator=torch.Generator())
    wrong = (Bright()(image_adv) > 0).long() != label
    assert wrong[..., 1:3].all()  # what eps reaches
    assert not wrong[..., (0, 3)].any()


def test_an_objective_without_a_head_is_named() -> None:
    image = torch.full((1, 1, 4, 4), 0.4)
    with pytest.raises(ValueError, match="expected an objective with a head"):
        attack_all_prompts(APGD(objective=torch.sum), [Bright()], image, image.long(), generator=torch.Generator())  # type: ignore[arg-type]
