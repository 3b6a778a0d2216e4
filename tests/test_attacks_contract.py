"""What every attack keeps, whoever wrote it; and proof that these tests catch attacks that do not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from oracles import SmallNet, VoxelLinear, data
from torch import Tensor

from medrobust import attacks
from medrobust.attacks import SoftDice
from medrobust.attacks.base import Attack, Model
from medrobust.attacks.threat import IntensityRange, LinfBall, ThreatModel

QUICK: dict[str, Any] = {"steps": 4, "block_size": (4, 4, 4)}


def make(name: str, **settings: Any) -> Attack:
    """The attack with settings that are quick here, as far as it has them."""
    cls = attacks.load(name)
    known = {field.name for field in fields(cls)}
    quick = {**QUICK, **({"block_size": (4, 4)} if name == "vafa2d" else {}), **settings}
    return cls(**{key: value for key, value in quick.items() if key in known})


@pytest.fixture(params=attacks.names())
def attack(request: pytest.FixtureRequest) -> Attack:
    return make(request.param)


def check_legal(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data()
    image_adv = attack(model, image, label)
    assert image_adv.shape == image.shape
    assert not image_adv.requires_grad
    assert image_adv.min() >= 0
    assert image_adv.max() <= 1
    torch.testing.assert_close(attack.threat.project(image_adv, image), image_adv, rtol=0, atol=0)
    torch.testing.assert_close(attack.threat.project(image, image), image, rtol=0, atol=0)


def check_nothing_borrowed_is_kept(attack: Attack) -> None:
    model, (image, label) = SmallNet(), data()
    model.body[1].eval()  # a frozen norm layer must stay frozen, its neighbours must stay in training mode
    model.head.bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    clean, reference = image.clone(), label.clone()
    chance = torch.random.get_rng_state()

    def unchanged() -> None:
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == wanted
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(image, clean)
        assert torch.equal(label, reference)
        assert not image.requires_grad
        assert image.grad is None
        assert torch.equal(torch.random.get_rng_state(), chance)

    attack(model, image, label)
    unchanged()

    def fails(_module: Any, _inputs: Any) -> None:
        raise RuntimeError("the network fails")

    hook = model.head.register_forward_pre_hook(fails)
    with suppress(RuntimeError):  # noise never asks the network
        attack(model, image, label)
    hook.remove()
    unchanged()


def check_each_case_alone(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data(batch=3)
    together = attack(model, image, label, generator=torch.Generator().manual_seed(5))
    for case in range(3):
        one = slice(case, case + 1)
        alone = attack(model, image[one], label[one], generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(alone, together[one], rtol=0, atol=2e-6)


def check_second_call_equals_first(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data()
    assert torch.equal(attack(model, image, label), attack(model, image, label))
    first, second = (attack(model, image, label, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


CHECKS = [check_legal, check_nothing_borrowed_is_kept, check_each_case_alone, check_second_call_equals_first]


@pytest.mark.parametrize("check", CHECKS)
def test_contract(attack: Attack, check: Any) -> None:
    check(attack)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_dimension_and_channel_count(attack: Attack, spatial_dims: int, channels: int) -> None:
    if type(attack).__name__ == "VAFA" and spatial_dims == 2:
        attack = replace(attack, block_size=(4, 4))
    model, (image, label) = SmallNet(spatial_dims, channels).eval(), data(spatial_dims, channels=channels)
    image_adv = attack(model, image, label)
    assert image_adv.shape == image.shape
    assert torch.isfinite(image_adv).all()


def test_under_no_grad_and_inference_mode(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data()
    expected = attack(model, image, label)
    with torch.no_grad():
        assert torch.equal(attack(model, image, label), expected)
    with torch.inference_mode():
        assert torch.equal(attack(model, image.clone(), label.clone()), expected)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "vafa"])
def test_a_region_made_in_inference_mode(name: str) -> None:
    attack, model, (image, label) = make(name), SmallNet().eval(), data()
    expected = attack(model, image, label, region=REGIONS[0])
    with torch.inference_mode():
        assert torch.equal(attack(model, image.clone(), label.clone(), region=REGIONS[0].clone()), expected)


def test_metadata_is_stripped(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data()
    image_adv = attack(model, MetaTensor(image), MetaTensor(label))
    assert type(image_adv) is Tensor
    assert torch.equal(image_adv, attack(model, image, label))


def test_in_bfloat16_autocast(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_adv = attack(model, image, label)
    assert image_adv.dtype == torch.float32
    assert torch.equal(attack.threat.project(image_adv, image), image_adv)


def test_double_precision_is_kept(attack: Attack) -> None:
    model, (image, label) = SmallNet().eval().double(), data()
    assert attack(model, image.double(), label).dtype == torch.float64


def test_label_free_attacks_the_prediction(attack: Attack) -> None:
    model, (image, _) = SmallNet().eval(), data()
    with torch.no_grad():
        pred = model(image).argmax(1, keepdim=True)
    assert torch.equal(attack(model, image), attack(model, image, pred))


def test_repr_is_complete_and_stable(attack: Attack) -> None:
    text = repr(attack)
    assert "0x" not in text
    assert "None" not in text
    assert all(f"{field.name}=" in text for field in fields(attack))
    assert repr(replace(attack)) == text
    objectives = ("SoftDice", "DiceCE", "CrossEntropy", "HardDice", "SegPGDLoss", "CosPGDLoss")
    names = {name: getattr(attacks, name) for name in objectives}
    assert repr(eval(text, {**names, type(attack).__name__: type(attack)})) == text


@pytest.mark.parametrize("name", [name for name in attacks.names() if hasattr(attacks.load(name), "eps")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_budget_gives_the_clean_image(name: str, norm: str) -> None:
    model, (image, label) = SmallNet().eval(), data()
    torch.testing.assert_close(make(name, eps=0.0, norm=norm)(model, image, label), image, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vafa", "vafa2d"])
def test_tiny_quanta_give_the_clean_image(name: str) -> None:
    model, (image, label) = SmallNet().eval(), data()
    torch.testing.assert_close(make(name, q_max=1e-4)(model, image, label), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["SoftDice", "CrossEntropy", "DiceCE"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_reaches_the_worst_image_of_a_voxel_linear_model(name: str, objective: str) -> None:
    image, label = data(classes=2)
    eps = 8 / 255
    attack = make(name, eps=eps, steps=10, objective=getattr(attacks, objective)())
    expected = VoxelLinear.worst(image, label, eps)
    torch.testing.assert_close(attack(VoxelLinear(), image, label), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_targeted_goes_the_other_way(name: str) -> None:
    image, label = data(classes=2)
    attack = make(name, steps=10, targeted=True)
    expected = VoxelLinear.worst(image, 1 - label, 8 / 255)
    torch.testing.assert_close(attack(VoxelLinear(), image, label), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in attacks.names() if not attacks.load(name).blind])
def test_beats_noise_of_the_same_budget(name: str) -> None:
    """Stronger than every one of 20 draws with the very same norm, which is measured, not assumed."""
    model, (image, label) = SmallNet().eval(), data()
    attack = make(name, steps=10, ssim_weight=0.0)
    image_adv = attack(model, image, label)
    objective = SoftDice()
    linf = getattr(attack, "norm", "") == "linf"
    for case in range(2):
        one = slice(case, case + 1)
        budget = 8 / 255 if linf else (image_adv - image)[one].norm().item()
        noise = attacks.load("random_noise")(eps=budget, norm="linf" if linf else "l2")
        draws = [
            objective(model(noise(model, image[one], generator=torch.Generator().manual_seed(seed))), label[one])
            for seed in range(20)
        ]
        assert objective(model(image_adv[one]), label[one]) > max(draws)


REGIONS = [
    torch.arange(9).view(1, 1, 9, 1, 1).expand(1, 1, 9, 10, 11) < 4,
    (torch.arange(9).view(1, 1, 9, 1, 1) < torch.tensor([3, 6]).view(2, 1, 1, 1, 1)).expand(2, 1, 9, 10, 11).long(),
]


@pytest.mark.parametrize("region", REGIONS)
def test_outside_a_region_nothing_changes(attack: Attack, region: Tensor) -> None:
    model, (image, label) = SmallNet().eval(), data()
    image_adv = attack(model, image, label, region=region)
    outside = (region == 0).expand_as(image)
    assert torch.equal(image_adv[outside], image[outside])
    assert type(attack).__name__ == "Universal" or not torch.equal(image_adv, image)
    torch.testing.assert_close(attack.threat.project(image_adv, image), image_adv, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_a_region_is_used_to_the_full(name: str) -> None:
    """Inside, the worst image of a voxel-linear model; outside, the clean one."""
    image, label = data(classes=2)
    region = REGIONS[0].expand_as(image)
    expected = torch.where(region, VoxelLinear.worst(image, label, 8 / 255), image)
    got = make(name, steps=10)(VoxelLinear(), image, label, region=region)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (torch.ones(2, 1, 9, 10, 12), "expected a region"),
        (torch.ones(3, 1, 9, 10, 11), "expected a region"),
        (torch.full((2, 1, 9, 10, 11), 2.0), "region of 0 and 1"),
        (torch.zeros(2, 1, 9, 10, 11), "got an empty one"),
    ],
)
def test_a_region_that_fits_nothing_is_refused(region: Tensor, message: str) -> None:
    image, label = data()
    with pytest.raises(ValueError, match=message):
        make("fgsm")(SmallNet().eval(), image, label, region=region)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "random_noise", "apgd", "segpgd", "cospgd"])
def test_radii_of_channels_and_cases(name: str) -> None:
    """A voxel-linear model sends every voxel to its own bound."""
    image, label = data(channels=2, classes=2)
    rows = ((0.01, 0.03), (0.02, 0.0))
    image_adv = make(name, eps=rows, steps=10)(VoxelLinear(), image, label)
    largest = (image_adv - image).abs().amax((2, 3, 4))
    torch.testing.assert_close(largest, torch.tensor(rows), rtol=0, atol=1e-6)
    per_channel = make(name, eps=(0.01, 0.03), steps=10)(VoxelLinear(), image, label)
    torch.testing.assert_close(per_channel[:1], image_adv[:1], rtol=0, atol=1e-6)


def test_radii_of_cases_in_an_l2_ball() -> None:
    model, (image, label) = SmallNet().eval(), data()
    rows = ((0.2,), (0.5,))
    for name in ("fgsm", "pgd", "random_noise"):
        norms = (make(name, eps=rows, norm="l2")(model, image, label) - image).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor([0.2, 0.5]), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="one eps for all channels"):
        make("pgd", eps=(0.1, 0.2), norm="l2")
    with pytest.raises(ValueError, match="expected eps for images"):
        make("pgd", eps=((0.1,), (0.2,), (0.3,)))(model, image, label)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "mifgsm", "apgd", "segpgd", "cospgd", "square", "universal"])
def test_lists_of_configurations_are_tuples(name: str) -> None:
    attack = make(name, eps=[[0.01], [0.02]])
    assert attack == make(name, eps=((0.01,), (0.02,)))
    assert "eps=((0.01,), (0.02,))" in repr(attack)
    assert hash(attack) == hash(make(name, eps=((0.01,), (0.02,))))
    if hasattr(attack, "step_size"):
        assert replace(attack, step_size=[0.1, 0.2]).setting("step_size") == (0.1, 0.2)


BAD_INPUT = [
    (lambda image, label: (image * 2000 - 1000, label), ValueError, r"intensities in \[0, 1\], got \["),
    (lambda image, label: (image.log() * 0 / 0, label), ValueError, "finite intensities"),
    (lambda image, label: ((image * 255).byte(), label), TypeError, "floating point image"),
    (lambda image, label: (image[0, 0], label[0, 0]), ValueError, r"\(B, C, H, W\) or \(B, C, H, W, D\)"),
    (lambda image, label: (image, label[..., :-1]), ValueError, "on the grid of the image"),
    (lambda image, label: (image, label[:1]), ValueError, "on the grid of the image"),
    (lambda image, label: (image, label + 0.5), ValueError, "whole-numbered labels"),
    (lambda image, label: (image, label + 7), ValueError, r"label values in 0\.\.2"),
    (lambda image, label: (image, label.expand(-1, 2, -1, -1, -1)), ValueError, "expected a label of shape"),
]


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD_INPUT)
def test_wrong_input_is_refused_kindly(spoil: Any, kind: type[Exception], message: str) -> None:
    image, label = spoil(*data())
    with pytest.raises(kind, match=message):
        make("fgsm")(SmallNet().eval(), image, label)


def test_unknown_attack_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"expected an attack among apgd, bim, .*got 'deepfool'"):
        attacks.load("deepfool")


# Attacks with the faults that published code has. The contract must catch each of them.


@dataclass(frozen=True, kw_only=True, repr=False)
class _Faulty(Attack):
    @property
    def threat(self) -> ThreatModel:
        return LinfBall(8 / 255)


@dataclass(frozen=True, kw_only=True, repr=False)
class KeepsState(_Faulty):
    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        calls = self.__dict__.setdefault("calls", [])
        calls.append(1)
        return image + len(calls) / 255


@dataclass(frozen=True, kw_only=True, repr=False)
class NormalisesOverTheBatch(_Faulty):
    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        _, gradient = self.gradient(model, image, label)
        return image + gradient / gradient.norm() * 0.1


@dataclass(frozen=True, kw_only=True, repr=False)
class UsesGlobalChance(_Faulty):
    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        return image + 0.01 * torch.randn_like(image)


@dataclass(frozen=True, kw_only=True, repr=False)
class ChangesItsInputModel(_Faulty):
    def perturb(self, model: Any, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        model.body[1].running_mean += 1
        return image


@dataclass(frozen=True, kw_only=True, repr=False)
class LiesAboutItsThreat(_Faulty):
    """Leaves the ball it names: caught because the base class projects and the law looks at the projection."""

    @property
    def threat(self) -> ThreatModel:
        return _Leaky()

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        return image + 1


@dataclass(frozen=True)
class _Leaky(IntensityRange):
    def project(self, image_adv: Tensor, image: Tensor) -> Tensor:
        return 0.5 * (image_adv + image)


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (KeepsState, check_second_call_equals_first),
        (KeepsState, check_each_case_alone),
        (NormalisesOverTheBatch, check_each_case_alone),
        (UsesGlobalChance, check_second_call_equals_first),
        (UsesGlobalChance, check_nothing_borrowed_is_kept),
        (ChangesItsInputModel, check_nothing_borrowed_is_kept),
        (LiesAboutItsThreat, check_legal),
    ],
)
def test_faulty_attacks_are_caught(faulty: Any, check: Any) -> None:
    with pytest.raises(AssertionError):
        check(faulty())
