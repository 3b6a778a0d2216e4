"""The smallest eps against a model whose answer is known, and its laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import SmallNet, VoxelLinear, data

from medrobust.attacks import (
    APGD,
    FGSM,
    PGD,
    CrossEntropy,
    GaussianNoise,
    HardDice,
    MissedForeground,
    SoftDice,
    Universal,
)
from medrobust.minimum_eps import MinimumEps
from medrobust.universal import save


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Two cases that a voxel-linear model gets right; the foreground is 0.03 and 0.07 above the threshold of 1/2."""
    label = torch.zeros(2, 1, 6, 6)
    label[:, :, 2:5, 1:5] = 1
    above = torch.tensor([0.03, 0.07]).view(2, 1, 1, 1)
    return torch.where(label == 1, 0.5 + above, 0.2), label.long()


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=5), APGD(steps=8)])
def test_finds_the_distance_to_the_threshold(attack: Any) -> None:
    """All foreground voxels flip at once when eps passes their distance."""
    image, label = scene()
    found = MinimumEps(attack=attack, most=0.2, rounds=8)(VoxelLinear(), image, label)
    torch.testing.assert_close(found.eps, torch.tensor([0.03, 0.07]), rtol=0, atol=0.2 / 2**8 + 1e-3)
    assert (found.eps >= torch.tensor([0.03, 0.07])).all()
    assert (found.score < 0.5).all()


def test_scales_a_perturbation_that_was_saved(tmp_path: Path) -> None:
    """One that darkens every voxel alike, made for 0.02: foreground flips where it reaches its distance."""
    image, label = scene()
    save(torch.full((1, 6, 6), -0.02), tmp_path / "u.pt", eps=0.02)
    attack = Universal(file=str(tmp_path / "u.pt"))
    found = MinimumEps(attack=attack, most=0.2, rounds=8)(VoxelLinear(), image, label)
    torch.testing.assert_close(found.eps, torch.tensor([0.03, 0.07]), rtol=0, atol=0.2 / 2**8 + 1e-3)
    assert (found.score < 0.5).all()


def test_in_an_l2_ball_the_cheapest_half_of_the_voxels_flips() -> None:
    """Dice falls below 1/2 when more than two thirds of 12 equal voxels flip: 9 of them at 0.03 each."""
    image, label = scene()
    found = MinimumEps(attack=PGD(norm="l2", steps=20), most=1.0, rounds=8)(VoxelLinear(), image, label)
    least = torch.tensor([0.03, 0.07]) * 9**0.5
    assert (found.eps >= least).all()
    # Plain ascent moves all 12 alike.
    assert (found.eps <= 1.05 * torch.tensor([0.03, 0.07]) * 12**0.5).all()


def test_what_is_reported_is_what_the_image_does() -> None:
    model, (image, label) = SmallNet().eval(), data()
    label = model(image).argmax(1, keepdim=True)
    found = MinimumEps(attack=PGD(steps=10), below=0.6, most=0.3, rounds=5)(model, image, label)
    assert torch.isfinite(found.eps).all()
    size = (found.image_adv - image).flatten(1).abs().amax(1)
    torch.testing.assert_close(size, found.eps)
    torch.testing.assert_close(1 - HardDice()(model(found.image_adv), label), found.score)
    assert (found.score < 0.6).all()
    # A ball a little smaller than half of it is not enough for the same attack.
    from dataclasses import replace

    rows = tuple((float(eps) / 2,) for eps in found.eps)
    weaker = replace(PGD(steps=10), eps=rows)(model, image, label)
    assert (1 - HardDice()(model(weaker), label) >= 0.6).all()
    assert 1 <= found.attacks <= 6


def test_cases_that_are_broken_or_cannot_be() -> None:
    image, label = scene()
    wrong = 1 - label
    found = MinimumEps(attack=FGSM(), most=0.05)(VoxelLinear(), image, torch.stack([wrong[0], label[1]]))
    assert found.eps.tolist() == [0.0, float("inf")]
    assert torch.equal(found.image_adv, image)
    assert found.attacks == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": GaussianNoise()}, "with an eps"),
        ({"attack": PGD(targeted=True)}, "untargeted"),
        ({"attack": PGD(), "below": 0.0}, r"below in \(0, 1\]"),
        ({"attack": PGD(), "rounds": 0}, "at least 1 round"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinimumEps(**settings)


def test_by_recall_the_tenth_voxel_of_twelve_decides() -> None:
    """Below 0.2 of 12 voxels are 2: ten have flipped, and the farthest of the ten nearest says when."""
    label = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    label[:, :, 2:5, 1:5] = 1
    image = torch.full((1, 1, 6, 6), 0.2)
    image[:, :, 2:5, 1:5] = 0.5 + torch.arange(1, 13).view(3, 4) / 200
    search = MinimumEps(attack=PGD(steps=10), below=0.2, most=0.2, rounds=10, criterion=MissedForeground())
    found = search(VoxelLinear(), image, label)
    assert found.eps.item() == pytest.approx(10 / 200, abs=1e-3)
    assert found.score.item() == pytest.approx(2 / 12)


def test_each_structure_has_an_eps_of_its_own() -> None:
    """A voxel of class k flips when it is darkened by its distance to k / 4 - 1/8; 3 of 4 voxels halve a Dice of 1."""
    label = torch.zeros(1, 1, 4, 8, dtype=torch.long)
    label[..., :2, :4], label[..., 2:, 4:] = 1, 2
    steps = torch.tensor([0.0, 0.02, 0.06])
    image = (label / 4).float() - 0.125 * (label > 0) + steps[label]

    def model(x: torch.Tensor) -> torch.Tensor:
        """Background below 1/8, class 1 below 3/8, class 2 above."""
        return torch.cat([0.125 - x, 0.2 * torch.ones_like(x) - 0.4 * (x - 0.25).abs() - 0.15, x - 0.375], 1)

    assert (model(image).argmax(1, keepdim=True) == label).all()
    search = MinimumEps(attack=PGD(steps=10), most=0.3, rounds=10)
    one, two = (search.of_structure(k)(model, image, label).eps.item() for k in (1, 2))
    assert one == pytest.approx(0.02, abs=2e-3)
    assert two == pytest.approx(0.06, abs=2e-3)
    assert search(model, image, label).eps.item() >= min(one, two)
    assert search.of_structure(1).criterion == HardDice(classes=(1,))
    assert search.of_structure(1).attack.objective == SoftDice(classes=(1,))
    with pytest.raises(ValueError, match="expected an attack on soft Dice"):
        MinimumEps(attack=PGD(objective=CrossEntropy())).of_structure(1)
