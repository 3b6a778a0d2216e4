"""Scores and objectives of chosen classes, against counting by hand and MONAI."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import DiceMetric
from monai.networks import one_hot
from oracles import data

from medrobust.attacks import HardDice, MissedForeground, SoftDice


def logits_and_label(channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, channels, 5, 6, 4, generator=generator)
    label = torch.randint(0, channels, (3, 1, 5, 6, 4), generator=generator)
    return logits, label


@pytest.mark.parametrize("classes", [(1,), (2,), (1, 3), (0, 2)])
def test_dice_of_chosen_classes_is_monais(classes: tuple[int, ...]) -> None:
    logits, label = logits_and_label()
    prediction = one_hot(logits.argmax(1, keepdim=True), 4)
    dice = DiceMetric(include_background=True, reduction="none")(prediction, one_hot(label, 4))
    expected = 1 - dice[:, list(classes)].mean(1)
    torch.testing.assert_close(HardDice(classes=classes)(logits, label), expected)
    sure = 100 * one_hot(logits.argmax(1, keepdim=True), 4).float()
    torch.testing.assert_close(SoftDice(classes=classes, smooth=1e-6)(sure, label), expected)


def test_channels_of_sigmoids_are_numbered_from_0_and_a_single_one_shows_class_1() -> None:
    logits, label = logits_and_label(3)
    hot = one_hot(label, 3).long()
    hard = HardDice(head="sigmoid", classes=(0, 2))(logits, hot)
    each = [HardDice(head="sigmoid")(logits[:, k : k + 1], hot[:, k : k + 1]) for k in (0, 2)]
    torch.testing.assert_close(hard, sum(each) / 2)
    torch.testing.assert_close(HardDice(classes=(1,))(logits[:, :1], hot[:, :1]), HardDice()(logits[:, :1], hot[:, :1]))


@pytest.mark.parametrize("score", [HardDice, SoftDice, MissedForeground])
@pytest.mark.parametrize(("channels", "classes"), [(3, (3,)), (3, (-1,)), (3, ()), (1, (0,)), (1, (2,))])
def test_classes_that_are_not_there(score: type, channels: int, classes: tuple[int, ...]) -> None:
    logits, label = logits_and_label(channels)
    with pytest.raises(ValueError, match="expected classes that logits"):
        score(classes=classes)(logits, label)


def test_missed_foreground_is_one_minus_recall() -> None:
    """Eight voxels: of class 1 two of three are found, of class 2 one of two; one has no label."""
    label = torch.tensor([1, 1, 1, 2, 2, 0, 0, -1]).view(1, 1, 2, 4)
    found = torch.tensor([1, 1, 0, 2, 1, 1, 0, 2]).view(1, 1, 2, 4)
    logits = one_hot(found, 3)
    assert MissedForeground()(logits, label).item() == pytest.approx(2 / 5)
    assert MissedForeground(classes=(1,))(logits, label).item() == pytest.approx(1 / 3)
    assert MissedForeground(classes=(2,))(logits, label).item() == pytest.approx(1 / 2)
    assert MissedForeground()(logits, label.clamp_max(0)).item() == 0
    two = torch.stack([label[:, 0] == 1, label[:, 0] == 2], 1).long()
    signs = 2.0 * torch.stack([found[:, 0] == 1, found[:, 0] == 2], 1) - 1
    assert MissedForeground(head="sigmoid")(signs, two).item() == pytest.approx(2 / 5)
    assert MissedForeground()(signs[:, :1], two[:, :1]).item() == pytest.approx(1 / 3)


def test_classes_are_told_where_some_are_chosen() -> None:
    assert repr(SoftDice()) == "SoftDice(head='softmax', include_background=False, smooth=1.0)"
    assert repr(HardDice()) == "HardDice(head='softmax')"
    chosen = MissedForeground(head="sigmoid", classes=(0, 2))
    assert repr(chosen) == "MissedForeground(head='sigmoid', classes=(0, 2))"
    assert eval(repr(SoftDice(classes=(1,)))) == SoftDice(classes=(1,))
    assert SoftDice(classes=(1,)) != SoftDice()


def test_a_gradient_of_chosen_classes_touches_no_other() -> None:
    _, label = data(2, classes=3)
    logits = torch.zeros(2, 3, *label.shape[2:], requires_grad=True)
    SoftDice(classes=(2,), head="sigmoid")(logits, torch.cat([label == k for k in range(3)], 1).long()).sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, :2].abs().max() == 0
    assert logits.grad[:, 2].abs().max() > 0
