"""Consistency losses against SciPy, torch and their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from scipy.fft import dctn

from medrobust.losses import DoubleSigmoidDiceCE, FrequencyConsistencyLoss, KLConsistencyLoss, LossObjective


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def l1_of_dct(clean: torch.Tensor, adversarial: torch.Tensor, block: tuple[int, ...]) -> tuple[float, float]:
    """Sums of |D(clean) - D(adversarial)| and |D(clean)|, block by block in SciPy."""
    distance = norm = 0.0
    size = clean.shape[2:]
    for b in range(clean.shape[0]):
        for k in range(clean.shape[1]):
            for corner in np.ndindex(*(s // e for s, e in zip(size, block, strict=True))):
                at = tuple(slice(c * e, (c + 1) * e) for c, e in zip(corner, block, strict=True))
                one, other = (dctn(x[b, k][at].numpy(), norm="ortho") for x in (clean, adversarial))
                distance += np.abs(one - other).sum()
                norm += np.abs(one).sum()
    return distance, norm


@pytest.mark.parametrize(
    ("shape", "block"), [((2, 3, 8, 12), (4, 4)), ((1, 2, 8, 4, 8), (4, 2, 8)), ((2, 2, 5, 7, 3), None)]
)
def test_frequency_consistency_is_the_l1_distance_of_block_dcts(
    shape: tuple[int, ...], block: tuple[int, ...] | None
) -> None:
    clean, adversarial = logits(*shape), logits(*shape, seed=1)
    distance, norm = l1_of_dct(clean, adversarial, block or shape[2:])
    for reduction, expected in (("sum", distance), ("mean", distance / clean.numel()), ("relative", distance / norm)):
        loss = FrequencyConsistencyLoss(block, reduction=reduction)
        assert loss(clean, adversarial).item() == pytest.approx(expected, rel=1e-10)
        assert loss(clean, clean).item() == 0


def test_the_relative_form_has_no_scale_and_is_not_symmetric() -> None:
    clean, adversarial = logits(1, 2, 6, 6, 6), 0.7 * logits(1, 2, 6, 6, 6, seed=1)
    loss = FrequencyConsistencyLoss(reduction="relative")
    assert loss(5 * clean, 5 * adversarial).item() == pytest.approx(loss(clean, adversarial).item())
    assert loss(adversarial, clean).item() != pytest.approx(loss(clean, adversarial).item(), rel=1e-2)


@pytest.mark.parametrize("loss", [FrequencyConsistencyLoss((4, 4)), FrequencyConsistencyLoss(reduction="relative")])
def test_both_arguments_get_exact_gradients(loss: FrequencyConsistencyLoss) -> None:
    clean, adversarial = logits(1, 2, 4, 4).requires_grad_(), logits(1, 2, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (clean, adversarial))


def test_a_uniform_shift_costs_its_constant_coefficient() -> None:
    """An orthonormal transform puts a shift of 1 into one coefficient of sqrt(n) per block."""
    clean = logits(1, 1, 8, 8, 8)
    value = FrequencyConsistencyLoss((4, 4, 4), reduction="sum")(clean, clean + 1)
    assert value.item() == pytest.approx(8 * 64**0.5)


@pytest.mark.parametrize("loss", [FrequencyConsistencyLoss(), KLConsistencyLoss()])
def test_losses_run_in_single_precision_under_autocast_and_drop_metadata(loss: torch.nn.Module) -> None:
    clean, adversarial = logits(1, 3, 6, 6).bfloat16(), logits(1, 3, 6, 6, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(MetaTensor(clean), adversarial)
    assert value.dtype == torch.float32
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, loss(clean.float(), adversarial.float()))


def test_kl_consistency_equals_torch() -> None:
    clean, adversarial = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    p, q = F.log_softmax(clean, 1), F.log_softmax(adversarial, 1)
    expected = F.kl_div(q, p, log_target=True, reduction="sum") / (2 * 4 * 5)
    torch.testing.assert_close(KLConsistencyLoss()(clean, adversarial), expected)


@pytest.mark.parametrize(("channels", "head"), [(1, "softmax"), (3, "sigmoid")])
def test_kl_consistency_of_sigmoids_is_that_of_bernoullis(channels: int, head: str) -> None:
    clean, adversarial = logits(2, channels, 4, 5), logits(2, channels, 4, 5, seed=1)
    p, q = torch.sigmoid(clean), torch.sigmoid(adversarial)
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    torch.testing.assert_close(KLConsistencyLoss(head)(clean, adversarial), expected)


@pytest.mark.parametrize("loss", [FrequencyConsistencyLoss(), KLConsistencyLoss()])
def test_shapes_must_agree(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        loss(logits(1, 2, 4, 4), logits(1, 2, 4, 5))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a reduction among"):
        FrequencyConsistencyLoss(reduction="none")


def test_double_sigmoid_is_the_published_formula() -> None:
    """p = sigmoid(logits); 1.5 (1 - soft Dice) + the cross-entropy of p as if it were a logit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 5, 6, generator=generator)
    label = (torch.rand(2, 1, 5, 6, generator=generator) > 0.6).float()
    p = torch.sigmoid(logits.double())
    overlap, total = (p * label).sum((1, 2, 3)), (p + label).sum((1, 2, 3))
    dice = (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()
    ce = (torch.log1p(torch.exp(p)) - p * label).mean()
    assert DoubleSigmoidDiceCE()(logits, label).item() == pytest.approx((1.5 * dice + ce).item(), abs=1e-5)


def test_double_sigmoid_has_the_floor_that_it_is_known_for() -> None:
    sure = torch.full((1, 1, 4, 4), 40.0)
    assert DoubleSigmoidDiceCE()(sure, torch.ones(1, 1, 4, 4)).item() == pytest.approx(0.313262, abs=1e-4)
    nothing = DoubleSigmoidDiceCE(lambda_dice=0)(-sure, torch.zeros(1, 1, 4, 4))
    assert nothing.item() == pytest.approx(0.693147, abs=1e-4)


def test_a_loss_as_an_objective_is_that_of_each_case_alone() -> None:
    loss = DoubleSigmoidDiceCE()
    objective = LossObjective(loss=loss, name="DoubleSigmoidDiceCE()", head="sigmoid")
    scores = logits(3, 1, 6, 6)
    label = (logits(3, 1, 6, 6, seed=1) > 0).long()
    value = objective(scores, label)
    for case in range(3):
        p = scores[case].sigmoid()
        t = label[case].double()
        overlap = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
        twice = F.binary_cross_entropy(p.sigmoid(), t)
        assert value[case].item() == pytest.approx(1.5 * (1 - overlap.item()) + twice.item())
    assert repr(objective) == "LossObjective(name='DoubleSigmoidDiceCE()', head='sigmoid')"
    with pytest.raises(ValueError, match="expected a label of shape"):
        objective(scores, label[:, :, :5])
