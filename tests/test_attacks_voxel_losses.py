"""The voxel objectives against closed forms that were derived from the publications by somebody else (sea_oracle)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import sea_oracle as oracle
import torch
from torch import Tensor

from medrobust.attacks.objectives import CrossEntropy, DiceCE, SoftDice
from medrobust.attacks.scores import HardDice, VoxelError
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

WEIGHTS = {1: (0.2, 0.8), 2: (0.3, 0.7), 4: (0.1, 0.2, 0.3, 0.4)}

PAIRS: dict[str, tuple[Callable[[int], Any], Callable[[int], Any], tuple[int, ...]]] = {
    "ce": (lambda k: CrossEntropy(), lambda k: oracle.ce, (1, 2, 4)),
    "masked ce": (lambda k: MaskedCE(), lambda k: oracle.mask_ce, (1, 2, 4)),
    "balanced": (
        lambda k: BalancedMaskedCE(weights=WEIGHTS[k]),
        lambda k: partial(oracle.mask_ce_bal, weights=np.array(WEIGHTS[k])),
        (1, 2, 4),
    ),
    "js": (lambda k: JensenShannon(), lambda k: oracle.js, (1, 2, 4)),
    "segpgd": (lambda k: SegPGDLoss(wrong=0.3), lambda k: partial(oracle.segpgd, lam=0.3), (1, 2, 4)),
    "cospgd": (lambda k: CosPGDLoss(), lambda k: oracle.cospgd, (1, 2, 4)),
    "spherical": (lambda k: MaskedSpherical(), lambda k: oracle.spherical, (2, 4)),
    "spherical of all": (
        lambda k: MaskedSpherical(masked=False),
        lambda k: partial(oracle.spherical, masked=False),
        (2, 4),
    ),
    "margin": (lambda k: MaskedMargin(tau=0.7), lambda k: partial(oracle.mask_margin, tau=0.7), (1,)),
    "mce-dice": (lambda k: MCEDice(), lambda k: oracle.mce_dice, (1, 2, 4)),
}
CASES = [(name, channels) for name, (_, _, heads) in PAIRS.items() for channels in heads]


def case(channels: int, ignored: bool = True, spatial: int = 2) -> tuple[Tensor, Tensor]:
    """Logits (3, K, *S) and labels that a prediction gets partly right; some voxels have no say."""
    generator = torch.Generator().manual_seed(channels)
    size = (5, 6, 4)[:spatial]
    logits = 3 * torch.randn(3, channels, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, max(channels, 2), (3, 1, *size), generator=generator)
    if ignored:
        label[torch.rand(label.shape, generator=generator) < 0.2] = -1
    return logits, label


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize(("name", "channels"), CASES)
def test_value_and_gradient_are_the_derived_ones(name: str, channels: int, spatial: int) -> None:
    ours, theirs, _ = PAIRS[name]
    logits, label = case(channels, spatial=spatial)
    logits.requires_grad_()
    value = ours(channels)(logits, label)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    expected, slope = theirs(channels)(logits.detach().numpy(), label.numpy())
    # The published mean is over all voxels, ours over those that have a say.
    share = (label >= 0).double().flatten(1).mean(1)
    torch.testing.assert_close(value * share, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    wide = share.view(-1, *[1] * (spatial + 1))
    torch.testing.assert_close(gradient * wide, torch.from_numpy(slope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "channels"), [(n, k) for n, k in CASES if k == 1])
def test_a_sigmoid_is_the_two_classes_it_stands_for(name: str, channels: int) -> None:
    ours, _, _ = PAIRS[name]
    objective = ours(1)
    if isinstance(objective, MaskedMargin):
        pytest.skip("its margin is that of the logit itself")
    logits, label = case(1)
    both = torch.cat([torch.zeros_like(logits), logits], 1)
    if name != "mce-dice":  # Dice counts both heads' foreground alike, but the softmax form also knows classes
        torch.testing.assert_close(objective(both, label), objective(logits, label), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(MCEDice()(both, label), MCEDice()(logits, label), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), SoftDice(), DiceCE(), *(ours(4) for ours, _, _ in PAIRS.values())]
)
def test_voxels_without_a_say_change_nothing(objective: Any) -> None:
    logits, label = case(4)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    other = torch.where(label >= 0, logits, 50 * noise)
    torch.testing.assert_close(objective(other, label), objective(logits, label), rtol=1e-12, atol=1e-14)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(logits, label).sum(), logits)
    assert (gradient.masked_select((label < 0).expand_as(gradient)) == 0).all()
    whole = case(4, ignored=False)[1].masked_fill(label < 0, -1)
    assert torch.equal(objective(logits, whole), objective(logits, label))


@pytest.mark.parametrize("objective", [ours(4) for ours, _, _ in PAIRS.values()])
def test_cases_do_not_mix(objective: Any) -> None:
    logits, label = case(4)
    alone = torch.cat([objective(logits[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(objective(logits, label), alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "channels"), CASES)
def test_extreme_logits_give_numbers(name: str, channels: int, dtype: torch.dtype) -> None:
    """The Jensen-Shannon divergence by way of all classes is NaN here."""
    logits, label = case(channels)
    logits = (logits * 3000).to(dtype).requires_grad_()
    value = PAIRS[name][0](channels)(logits, label)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_balance_is_the_case_s_own_by_default() -> None:
    logits, label = case(4)
    counts = torch.stack([(label == k).flatten(1).sum(1) for k in range(4)], 1).double()
    weights = (1 / counts) / (1 / counts).sum(1, keepdim=True)
    expected = torch.cat(
        [BalancedMaskedCE(weights=tuple(weights[i].tolist()))(logits[i : i + 1], label[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(BalancedMaskedCE()(logits, label), expected, rtol=1e-12, atol=1e-14)


def test_segpgd_moves_its_weight_as_published() -> None:
    """lambda(t) = (t - 1) / 2T for t = 1..T."""
    assert [SegPGDLoss().at(step, 5).wrong for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_targeted_mask_looks_at_what_is_not_there_yet() -> None:
    logits, label = case(4, ignored=False)
    right = logits.argmax(1, keepdim=True) == label
    voxels = -torch.log_softmax(logits, 1).gather(1, label)
    expected = torch.where(right, 0, voxels).flatten(1).mean(1)
    torch.testing.assert_close(replace(MaskedCE(), targeted=True)(logits, label), expected)


def test_mce_dice_weighs_a_voxel_by_what_its_flip_costs() -> None:
    """Brute force: flip each right voxel of a binary case and see what Dice loses."""
    logits, label = case(1, ignored=False)
    logits, label = logits[:1], label[:1]
    pred = (logits > 0).long()

    def dice(p: Tensor) -> float:
        return 2 * (p * label).sum().item() / (p.sum() + label.sum()).item()

    size = (pred.sum() + label.sum()).item()
    weights = torch.autograd.grad(MCEDice()(logits.requires_grad_(), label).sum(), logits)[0].abs() * label.numel()
    slope = torch.autograd.grad(MaskedCE()(logits, label).sum(), logits)[0].abs() * label.numel()
    for index in (pred == label).nonzero():
        flipped = pred.clone()
        flipped[tuple(index)] = 1 - flipped[tuple(index)]
        lost = dice(pred) - dice(flipped)
        # The weight is the loss up to the change of the denominator by the flip itself.
        change = size / (size + (1 if flipped[tuple(index)] else -1))
        assert (weights[tuple(index)] / slope[tuple(index)]).item() * change == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_mce_dice_knows_what_the_first_false_voxel_costs(channels: int) -> None:
    """Nothing is labelled or seen: a false voxel takes a whole class's Dice, shared among the voxels with a say."""
    logits, label = torch.zeros(1, channels, 4, 5, dtype=torch.float64), torch.zeros(1, 1, 4, 5, dtype=torch.long)
    logits[:, 0] = 2 if channels > 1 else -2
    label[..., 0] = -1
    torch.testing.assert_close(MCEDice()(logits, label), MaskedCE()(logits, label) / 16)


def test_apgd_with_mce_dice_finds_false_positives_where_nothing_is() -> None:
    from oracles import VoxelLinear

    from medrobust.attacks import APGD

    image, label = torch.full((1, 1, 6, 6), 0.45), torch.zeros(1, 1, 6, 6, dtype=torch.long)
    attack = APGD(eps=0.1, steps=20, objective=MCEDice(), random_start=False)
    assert HardDice()(VoxelLinear()(image), label) == 0
    assert HardDice()(VoxelLinear()(attack(VoxelLinear(), image, label)), label) == 1


def test_a_targeted_mce_dice_shares_a_class_among_the_voxels_that_shall_lose_it() -> None:
    logits, label = torch.zeros(1, 3, 4, 5, dtype=torch.float64), torch.zeros(1, 1, 4, 5, dtype=torch.long)
    logits[:, 0], logits[:, 2, 0] = 1, 4  # five voxels of class 2, to be erased
    targeted = replace(MCEDice(), targeted=True)
    masked = replace(MaskedCE(), targeted=True)
    torch.testing.assert_close(targeted(logits, label), masked(logits, label) / 5)


def test_hard_dice_is_the_dice_that_is_reported() -> None:
    from medrobust.metrics.dice import dice

    for channels in (1, 4):
        logits, label = case(channels, ignored=False)
        label[0] = 0
        pred = (logits > 0).long() if channels == 1 else logits.argmax(1, keepdim=True)
        reported = dice(pred, label, max(channels, 2))[:, 1:].mean(1)
        torch.testing.assert_close(1 - HardDice()(logits, label), reported.double(), rtol=1e-6, atol=1e-7)


def test_voxel_error_counts_what_has_a_say() -> None:
    logits, label = case(4)
    valid = label >= 0
    wrong = ((logits.argmax(1, keepdim=True) != label) & valid).flatten(1).sum(1)
    torch.testing.assert_close(VoxelError()(logits, label), wrong / valid.flatten(1).sum(1).double())
    torch.testing.assert_close(VoxelError(of_all=True)(logits, label), wrong.double() / label[0].numel())


def test_scores_leave_ignored_voxels_out() -> None:
    logits, label = case(4)
    other = torch.where(label >= 0, logits, -logits)
    assert torch.equal(HardDice()(logits, label), HardDice()(other, label))
    assert torch.equal(VoxelError()(logits, label), VoxelError()(other, label))


def test_settings_that_make_no_sense() -> None:
    logits, label = case(1)
    with pytest.raises(ValueError, match="use MaskedMargin"):
        MaskedSpherical()(logits, label)
    with pytest.raises(ValueError, match="expected 2 class weights, got 4"):
        BalancedMaskedCE(weights=WEIGHTS[4])(logits, label)
    with pytest.raises(ValueError, match=r"expected label values in 0\.\.1"):
        MaskedCE()(logits, label - 1)
