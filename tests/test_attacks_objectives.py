"""Objectives against closed forms and MONAI, for every head, case by case."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor

from medrobust.attacks import CrossEntropy, DiceCE, SoftDice
from medrobust.attacks.objectives import Head, check_label, predict

SIZE = (5, 6, 4)


def draw(channels: int, head: Head, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, channels, *SIZE, generator=generator, dtype=torch.float64)
    if head == "softmax" and channels > 1:
        return logits, torch.randint(0, channels, (2, 1, *SIZE), generator=generator)
    return logits, torch.randint(0, 2, (2, channels, *SIZE), generator=generator)


HEADS: list[tuple[int, Head]] = [(4, "softmax"), (1, "softmax"), (1, "sigmoid"), (3, "sigmoid")]


@pytest.mark.parametrize(("channels", "head"), HEADS)
@pytest.mark.parametrize("smooth", [1.0, 1e-5])
def test_soft_dice_is_monais(channels: int, head: Head, smooth: float) -> None:
    logits, label = draw(channels, head)
    softmax = head == "softmax" and channels > 1
    loss = DiceLoss(
        include_background=not softmax,
        to_onehot_y=softmax,
        softmax=softmax,
        sigmoid=not softmax,
        reduction="none",
        smooth_nr=smooth,
        smooth_dr=smooth,
    )
    expected = loss(logits, label).flatten(1).mean(1)
    torch.testing.assert_close(SoftDice(head=head, smooth=smooth)(logits, label), expected)


def test_absent_classes_are_worth_inventing() -> None:
    """A class that is in neither map scores 1; one confident voxel of it halves that, by hand."""
    logits = torch.full((1, 2, 2, 2), 50.0)
    logits[:, 1] = -50.0
    label = torch.zeros(1, 1, 2, 2)
    assert SoftDice()(logits, label).item() == pytest.approx(0.0, abs=1e-6)
    logits[0, :, 0, 0] = torch.tensor([-50.0, 50.0])
    assert SoftDice()(logits, label).item() == pytest.approx(1 - 1 / 2)


@pytest.mark.parametrize(("channels", "head"), HEADS)
def test_cross_entropy_by_hand(channels: int, head: Head) -> None:
    logits, label = draw(channels, head)
    if head == "softmax" and channels > 1:
        chosen = torch.log_softmax(logits, 1).gather(1, label)
    else:
        p = torch.sigmoid(logits)
        chosen = torch.log(torch.where(label == 1, p, 1 - p))
    torch.testing.assert_close(CrossEntropy(head=head)(logits, label), -chosen.flatten(1).mean(1))


def test_dice_ce_is_the_published_loss() -> None:
    logits, label = draw(4, "softmax")
    published = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-6)
    expected = torch.stack([published(logits[i : i + 1], label[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(DiceCE()(logits, label), expected)


@pytest.mark.parametrize("objective", [SoftDice(), CrossEntropy(), DiceCE()])
def test_confident_logits_and_half_precision_stay_finite(objective: SoftDice) -> None:
    logits, label = draw(4, "softmax")
    for extreme in (1e4 * logits.float(), logits.half(), logits.bfloat16()):
        leaf = extreme.clone().requires_grad_()
        value = objective(leaf, label)
        assert value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("objective", [SoftDice(), CrossEntropy(), DiceCE()])
def test_larger_is_worse_for_the_model(objective: SoftDice) -> None:
    logits, label = draw(4, "softmax")
    right = torch.nn.functional.one_hot(label[:, 0], 4).movedim(-1, 1) * 20.0
    assert (objective(right, label) < objective(logits, label)).all()
    assert (objective(logits, label) < objective(-right, label)).all()


def test_predictions() -> None:
    logits = torch.tensor([[[[2.0, -1.0]], [[1.0, 3.0]]]])
    assert predict(logits, "softmax").tolist() == [[[[0, 1]]]]
    assert predict(logits, "sigmoid").tolist() == [[[[1, 0]], [[1, 1]]]]
    assert predict(logits[:, :1], "softmax").tolist() == [[[[1, 0]]]]


def test_labels_that_do_not_fit() -> None:
    logits, label = draw(4, "softmax")
    with pytest.raises(ValueError, match="expected a label of shape"):
        SoftDice(head="sigmoid")(logits, label)
    with pytest.raises(ValueError, match=r"label values in 0\.\.3"):
        SoftDice()(logits, label + 1)
    assert math.isfinite(SoftDice()(logits, label).sum().item())


def test_a_label_that_is_changed_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks ask about the same label in every step: its values are read, and the device waited for, once."""
    looks = []
    monkeypatch.setattr(torch.Tensor, "item", lambda self, item=torch.Tensor.item: looks.append(1) or item(self))
    logits, label = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long)
    for _ in range(5):
        check_label(logits, label, "softmax")
    assert len(looks) == 2
    label[0, 0, 0, 0] = 3
    with pytest.raises(ValueError, match=r"expected label values in 0\.\.2"):
        check_label(logits, label, "softmax")
    with torch.inference_mode():
        other = torch.zeros(1, 1, 4, 4)
        check_label(logits, other, "softmax")
        other += 7
        with pytest.raises(ValueError, match=r"got 7\.\.7"):
            check_label(logits, other, "softmax")
