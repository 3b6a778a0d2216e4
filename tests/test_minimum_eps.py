"""The smallest eps against a model whose answer is known, and its laws."""

from __future__ import annotations

from dataclasses import replace
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
    RandomNoise,
    SoftDice,
    Square,
    Standard,
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


def test_a_black_box_search_takes_no_gradient() -> None:
    """Its eps is Square's own, also where the model has no gradient to give."""
    image, label = scene()

    def model(x: torch.Tensor) -> torch.Tensor:
        assert not x.requires_grad
        with torch.no_grad():
            return VoxelLinear()(x)

    search = MinimumEps(attack=Square(queries=20), most=0.2, rounds=6)
    assert search.gradients_of_walk == 0
    assert torch.isfinite(search(model, image, label).eps).all()
    assert MinimumEps(attack=PGD()).gradients_of_walk == 100
    assert MinimumEps(attack=RandomNoise()).gradients_of_walk == 0


def test_the_walk_only_improves_and_says_what_it_found() -> None:
    model, (image, label) = SmallNet(2).eval(), data(2, batch=3)
    label = model(image).argmax(1, keepdim=True)
    for norm, most in (("linf", 0.2), ("l2", 2.0)):
        search = MinimumEps(attack=PGD(steps=4, norm=norm), below=0.6, most=most, rounds=3)
        bisected = replace(search, walk=0)(model, image, label)
        found = search(model, image, label)
        assert (found.eps <= bisected.eps).all()
        assert (found.eps < bisected.eps).any()
        assert (found.eps <= most).all()
        delta = (found.image_adv - image).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        torch.testing.assert_close(found.eps, size)
        score = 1 - HardDice()(model(found.image_adv), label)
        torch.testing.assert_close(found.score, score.detach())
        assert (score < 0.6).all()


def test_a_case_does_not_depend_on_its_neighbours() -> None:
    model, (image, label) = SmallNet(2).eval(), data(2, batch=3)
    label = model(image).argmax(1, keepdim=True)
    search = MinimumEps(attack=PGD(steps=2), below=0.6, most=0.2, rounds=4, walk=10)
    together = search(model, image, label).eps
    for case in range(3):
        one = slice(case, case + 1)
        torch.testing.assert_close(search(model, image[one], label[one]).eps, together[one], rtol=0, atol=1e-5)


def test_who_goes_for_recall_touches_nothing_but_the_foreground() -> None:
    label = torch.tensor([0, 1, 2, -1]).view(1, 1, 1, 4)
    search = MinimumEps(attack=PGD(), criterion=MissedForeground())
    assert search._aim(label).flatten().tolist() == [-1, 1, 2, -1]
    assert search.of_structure(2)._aim(label).flatten().tolist() == [-1, -1, 2, -1]
    hot = torch.tensor([[0, 1], [1, 1]]).view(1, 2, 1, 2)
    channels = MinimumEps(attack=PGD(objective=SoftDice(head="sigmoid")), criterion=MissedForeground(head="sigmoid"))
    assert channels._aim(hot).flatten().tolist() == [-1, 1, 1, 1]
    assert channels.of_structure(1)._aim(hot).flatten().tolist() == [-1, -1, 1, 1]
    assert torch.equal(MinimumEps(attack=PGD())._aim(label), label)


@pytest.mark.parametrize(
    "attack", [APGD(criterion=HardDice()), APGD(track=CrossEntropy()), PGD(objective=CrossEntropy())]
)
def test_an_attack_that_looks_at_all_structures_cannot_aim_at_one(attack: Any) -> None:
    with pytest.raises(ValueError, match="expected an attack on soft Dice"):
        MinimumEps(attack=attack).of_structure(1)


def test_an_attack_on_one_structure_chooses_its_image_by_it() -> None:
    one = MinimumEps(attack=APGD()).of_structure(2).attack
    assert one.setting("criterion") == HardDice(classes=(2,))
    members = MinimumEps(attack=Standard()).of_structure(2).attack.members
    assert [member.setting("criterion") for member in members[:3]] == [HardDice(classes=(2,))] * 3
