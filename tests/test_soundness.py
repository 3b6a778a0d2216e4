"""The checklist: each check speaks up on what was built to fail it, and honest models hear nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from oracles import SmallNet, VoxelLinear, data
from torch import Tensor, nn

from medrobust import soundness
from medrobust.attacks import APGD, PGD, VAFA, CrossEntropy, HardDice, RandomNoise
from medrobust.attacks.base import Attack, Model
from medrobust.attacks.threat import LinfBall, ThreatModel
from medrobust.inferers import bind
from medrobust.soundness import MEANING, Case, Finding, checklist, noise, warnings

EPS = 8 / 255
CONTRAST = 0.2
"""Of the images: so low that EPS matters to them."""
ATTACK = PGD(eps=EPS, steps=12)


class Net(nn.Module):
    """Two small convolutions; trained, it finds what is bright in an image of low contrast."""

    def __init__(self, spatial_dims: int = 2, classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.first, self.head = conv(1, 8, 3, padding=1), conv(8, classes, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(0.5 + (image - 0.5) / CONTRAST)))


def trained(spatial_dims: int = 2, classes: int = 2, seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    """A network after some steps of Adam, and the two cases that it learned."""
    image, label = data(spatial_dims, side=20 if spatial_dims == 2 else 10, classes=2)
    image = 0.5 + CONTRAST * (image - 0.5)
    net = Net(spatial_dims, classes, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    target = label[:, 0] if classes == 2 else label.float()
    loss = nn.CrossEntropyLoss() if classes == 2 else nn.BCEWithLogitsLoss()
    for _ in range(80):
        optimizer.zero_grad()
        loss(net(image), target).backward()
        optimizer.step()
    return net, image, label


@pytest.fixture(scope="module")
def flat() -> tuple[Net, Tensor, Tensor]:
    return trained(2)


def failed(model: Model, image: Tensor, label: Tensor | None, **settings: object) -> set[str]:
    found = checklist(model, image, label, **{"attack": ATTACK, **settings})
    assert len(warnings(found)) == sum(not finding.ok for finding in found)
    return {finding.check for finding in found if not finding.ok}


def case(model: Model, image: Tensor, label: Tensor, attack: PGD = ATTACK) -> Case:
    return Case(model=model, image=image, label=label, attack=attack)


@pytest.mark.parametrize("attack", [ATTACK, replace(ATTACK, norm="l2", eps=1.0), APGD(eps=EPS, steps=20)], ids=repr)
def test_a_trained_network_is_silent(flat: tuple[Net, Tensor, Tensor], attack: PGD) -> None:
    net, image, label = flat
    found = checklist(net, image, label, attack=attack, surrogate=trained(seed=1)[0], quick=attack != ATTACK)
    assert warnings(found) == []
    assert {finding.check for finding in found} == set(MEANING)


@pytest.mark.parametrize(("spatial_dims", "classes"), [(3, 2), (2, 1), (3, 1)])
def test_other_honest_networks_are_silent(spatial_dims: int, classes: int) -> None:
    net, image, label = trained(spatial_dims, classes)
    generator = torch.Generator().manual_seed(5)
    assert warnings(checklist(net.train(), image, label, attack=ATTACK, generator=generator)) == []


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_network_with_batch_norm_and_dropout_is_silent_and_left_as_it_was(spatial_dims: int) -> None:
    # This seed segments neither nothing nor everything.
    net = SmallNet(spatial_dims, classes=2, seed=3 if spatial_dims == 2 else 0).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image, _ = data(spatial_dims)
    assert warnings(checklist(net, image, attack=ATTACK)) == []
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_single_case_and_a_bound_network_are_silent(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    assert failed(bind(net), image[:1], label[:1]) == set()


@pytest.mark.parametrize("attack", [ATTACK, replace(ATTACK, norm="l2", eps=1.0)], ids=repr)
@pytest.mark.parametrize("cases", [1, 2])
def test_a_region_is_silent_and_nothing_changes_outside(
    flat: tuple[Net, Tensor, Tensor], attack: PGD, cases: int
) -> None:
    net, image, label = flat[0], flat[1][:cases], flat[2][:cases]
    region = torch.zeros_like(label[:1], dtype=torch.bool)
    region[..., 2:18, 2:18] = True
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not seen and x.shape == image.shape:
                seen.append(x)
            if x.shape == image.shape:
                seen[1:] = [torch.maximum(seen[1], (x - image).abs()) if seen[1:] else (x - image).abs()]
            return net(x)

    assert warnings(checklist(Watched(), image, label, attack=attack, region=region, quick=False)) == []
    outside = ~region.expand_as(image)
    assert seen[1].detach()[~outside].max() > 0.01
    assert torch.equal(seen[1].detach()[outside], torch.zeros(int(outside.sum())))


def test_noise_has_the_norm_of_the_attack_inside_the_region() -> None:
    image, label = data(classes=2)
    region = torch.zeros_like(label[:1], dtype=torch.bool)
    region[..., :4, :] = True
    attack = PGD(eps=3.0, norm="l2", steps=4)
    noisy = RandomNoise(eps=3.0, norm="l2")(VoxelLinear(), image, label, region=region)
    assert (noisy - image).flatten(1).norm(dim=1).tolist() == pytest.approx([3.0, 3.0], rel=1e-4)
    case = Case(model=VoxelLinear(), image=image, label=label, attack=attack, region=region.expand_as(image))
    dice = 1 - HardDice()(VoxelLinear()(noisy), label)
    assert noise(case).value == pytest.approx((dice - case.dice(case.image_adv)).min().item(), abs=1e-6)


def test_a_gradient_that_ends_at_the_region_is_missed_there_only(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    region = torch.zeros_like(label[:1], dtype=torch.bool)
    region[..., :10, :] = True

    def model(x: Tensor) -> Tensor:
        return net(torch.where(region, x.detach(), x))

    assert "gradient" not in failed(model, image, label)
    assert "gradient" in failed(model, image, label, region=region)


def test_the_slope_of_a_linear_model_is_exact() -> None:
    image, label = data(2, classes=2)
    found = soundness.slope(case(VoxelLinear().double(), image.double(), label))
    assert found.ok
    assert found.value < 1e-3


class Rounded(nn.Module):
    """Reads the image in few levels; ``through`` passes the gradient on as if it did not."""

    def __init__(self, net: nn.Module, levels: int, *, through: bool = False) -> None:
        super().__init__()
        self.net, self.levels, self.through = net, levels, through

    def forward(self, image: Tensor) -> Tensor:
        read = (image * self.levels).round() / self.levels
        return self.net(image + (read - image).detach() if self.through else read)


def test_rounded_input(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    names = failed(Rounded(net, 128), image, label)
    assert {"gradient", "slope", "noise", "black box"} <= names
    found = soundness.gradient(case(Rounded(net, 128), image, label))
    assert found.value == 1
    assert "none at all in 2 of 2 cases" in found.text


def test_straight_through_rounding_of_an_image_that_lies_on_the_levels(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    image = (image * 100).round() / 100
    through = case(Rounded(net, 100, through=True), image, label)
    assert soundness.gradient(through).ok
    found = soundness.slope(through)
    assert not found.ok
    assert found.value == pytest.approx(1)


def test_saturated_logits(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    names = failed(lambda x: 1e4 * net(x), image, label)
    assert "gradient" in names


def test_saturation_that_cross_entropy_hides(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, _ = flat
    attack = replace(ATTACK, objective=CrossEntropy())
    assert "gradient" in failed(lambda x: 1e4 * net(x), image, None, attack=attack)


class ActiveDropout(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.dropout(image, 0.3, training=True)


def test_a_layer_that_draws_is_named(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    found = soundness.repeat(case(nn.Sequential(net.first, nn.Sequential(ActiveDropout()), net.head), image, label))
    assert not found.ok
    assert found.text.endswith("the first to differ is layer '1.0', a ActiveDropout")
    lone = soundness.repeat(case(ActiveDropout(), image.expand(-1, 2, -1, -1), label))
    assert lone.text.endswith("the first to differ is the model itself, a ActiveDropout")


def test_noise_on_the_input_of_any_callable(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    generator = torch.Generator().manual_seed(0)
    assert "repeat" in failed(lambda x: net(x + 0.05 * torch.randn(x.shape, generator=generator)), image, label)


def cut(net: nn.Module, kind: str) -> Callable[[Tensor], Tensor]:
    def model(x: Tensor) -> Tensor:
        if kind == "detach":
            return net(x.detach())
        with torch.no_grad():
            return net(x)

    return model


@pytest.mark.parametrize("kind", ["detach", "no_grad"])
def test_a_cut_graph_ends_the_list(flat: tuple[Net, Tensor, Tensor], kind: str) -> None:
    net, image, label = flat
    for parameter_grad in (True, False):
        frozen = net.requires_grad_(parameter_grad)
        found = checklist(cut(frozen, kind), image, label, attack=ATTACK)
        assert [finding.ok for finding in found] == [False, True]
        assert math.isnan(found[0].value)
        assert "autograd" in found[0].text
    net.requires_grad_(True)


def test_a_detached_part_bends_the_slope() -> None:
    image, label = data(2, classes=2)
    model = VoxelLinear()
    # The model darkens with the detached copy twice as fast as its gradient says that it brightens.
    found = soundness.slope(case(lambda x: model(0.5 + (x - 0.5) - 2 * (x - 0.5).detach()), image, label))
    assert not found.ok
    assert found.value == pytest.approx(2, abs=0.05)


def test_infinite_logits(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    found = soundness.gradient(case(lambda x: net(x) * math.inf, image, label))
    assert not found.ok
    assert "not finite" in found.text


def test_batch_norm_in_training_mode_behind_a_callable() -> None:
    net = SmallNet(2, classes=2).train()
    net.body[3].eval()
    image, label = data(2, classes=2)
    wrapped = case(lambda x: net(x), image, label)
    assert not soundness.batch(wrapped).ok
    assert not soundness.batch(case(lambda x: net(x), image[:1], label[:1])).ok
    assert soundness.batch(case(net, image, label)).ok


@pytest.mark.parametrize("start", [False, True])
def test_one_tiny_step_is_weak(flat: tuple[Net, Tensor, Tensor], start: bool) -> None:
    net, image, label = flat
    names = failed(net, image, label, attack=PGD(eps=EPS, steps=1, step_size=EPS / 100, random_start=start))
    assert {"noise", "budget", "black box"} <= names


@dataclass(frozen=True, kw_only=True, repr=False)
class Waning(PGD):
    """Gives back what it found as the steps go on: all of it at ``at``."""

    at: int = 12

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        found = super().perturb(model, image, label, generator)
        return image + (found - image) * (1 - self.steps / self.at)


def test_an_attack_that_loses_what_it_had(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    weaker = soundness.steps(case(net, image, label, Waning(eps=EPS, steps=10)))
    assert not weaker.ok
    assert weaker.value > 0.1
    nothing = soundness.steps(case(net, image, label, Waning(eps=EPS, steps=12, at=12)))
    assert "in 2 of 2 cases no higher objective" in nothing.text


def test_steps_that_are_too_few_show_when_doubled(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    short = case(net, image, label, PGD(eps=EPS, steps=4, step_size=EPS / 8, random_start=False))
    assert soundness.steps(short).ok
    assert not soundness.steps(short, thorough=True).ok


@cache
def curved(cases: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Six smooth convolutions that learned some cases by heart: a gradient holds for a short way only.

    Trained in double precision, so that every machine's rounding ends at the same weights.
    """
    image, label = data(2, batch=cases, side=24, classes=2)
    image = 0.5 + CONTRAST * (image - 0.5)
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()]
    body = nn.Sequential(*layers, nn.Conv2d(16, 2, 1))

    class Curved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, image: Tensor) -> Tensor:
            return self.body((image - 0.5) / CONTRAST)

    net = Curved().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image.double()), label[:, 0]).backward()
        optimizer.step()
    return net.float(), image, label


@pytest.mark.parametrize(("norm", "eps", "cases"), [("linf", EPS, 2), ("l2", 0.35, 4)])
def test_the_old_step_rule_is_noticed_and_the_default_is_not(norm: str, eps: float, cases: int) -> None:
    """Constant steps of 2.5 eps / steps: more steps do not help, for each gets shorter."""
    net, image, label = curved(cases)
    old = PGD(eps=eps, norm=norm, steps=20, step_size=2.5 * eps / 20)
    found = soundness.equal_gradients(case(net, image, label, old))
    assert not found.ok
    assert found.value > 0.03
    assert "four times the step" in found.text
    assert "equal gradients" in failed(net, image, label, attack=old)
    for attack in (replace(old, step_size=None), APGD(eps=eps, norm=norm, steps=20)):
        assert "equal gradients" not in failed(net, image, label, attack=attack)


def test_an_objective_that_is_weaker_than_soft_dice_is_noticed(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat

    @dataclass(frozen=True)
    class Brighter:
        """Climbs one channel whatever the label says."""

        head: str = "softmax"

        def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
            return logits[:, 1].flatten(1).mean(1)

    found = soundness.equal_gradients(case(net, image, label, replace(ATTACK, objective=Brighter())))
    assert not found.ok
    assert "with APGD on soft Dice" in found.text


def test_twice_the_steps_are_as_long_as_the_steps_asked_about(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    asked: list[PGD] = []

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Own(PGD):
        """A rule of its own: the more steps, the shorter each."""

        def defaults(self) -> dict[str, object]:
            return {**super().defaults(), "step_size": 2.5 * EPS / self.steps, "schedule": "constant"}

        def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
            asked.append(self)
            return super().perturb(model, image, label, generator)

    soundness.steps(case(net, image, label, Own(eps=EPS, steps=8)), thorough=True)
    assert sorted({attack.steps for attack in asked}) == [2, 8, 16]
    assert {attack.setting("step_size") for attack in asked} == {2.5 * EPS / 8}


@dataclass(frozen=True, kw_only=True, repr=False)
class Unsaid(Attack):
    """An attack of a user, whose step size of None is nobody's business but its own."""

    eps: float = EPS
    norm: str = "linf"
    steps: int = 12
    step_size: float | None = None

    @property
    def threat(self) -> ThreatModel:
        return LinfBall(self.eps)

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        return PGD(eps=self.eps, steps=self.steps).perturb(model, image, label, generator)


def test_an_attack_that_does_not_say_its_step_size(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    assert warnings(checklist(net, image, label, attack=Unsaid())) == []


@dataclass(frozen=True, kw_only=True, repr=False)
class Lottery(PGD):
    """Does its work only under some seeds."""

    def perturb(self, model: Model, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        found = super().perturb(model, image, label, generator)
        return found if generator.initial_seed() % 3 == 0 else image


def test_chance_that_decides(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    found = soundness.restarts(case(net, image, label, Lottery(eps=EPS, steps=12)))
    worst = case(net, image, label)
    assert not found.ok
    assert found.value == pytest.approx((worst.dice(image) - worst.dice(worst.image_adv)).max().item())


def test_a_surrogate_that_does_better(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    masked = case(Rounded(net, 128), image, label)
    assert not soundness.transfer(masked, surrogate=net).ok
    assert soundness.transfer(case(net, image, label), surrogate=net).value == 0


def test_what_single_precision_loses() -> None:
    image, label = data(2, classes=2)
    plain = VoxelLinear().double()

    def fussy(x: Tensor) -> Tensor:
        """Denies everything about images that single precision holds exactly."""
        return plain(x) * (1 if (x != x.float().double()).any() else -1)

    found = soundness.stored(case(fussy, image.double() + 1e-12, label))
    assert not found.ok
    assert soundness.stored(case(plain, image.double(), label)).value < 0.01


def test_nothing_to_break(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    found = soundness.clean(case(lambda x: -net(x), image, label))
    assert not found.ok
    assert found.value < 0.1


def test_voxels_without_a_say_do_not_count_as_flat(flat: tuple[Net, Tensor, Tensor]) -> None:
    net, image, label = flat
    masked = label.clone()
    masked[:, :, 3:] = -1
    assert "100.0% of the logits" not in soundness.gradient(case(net, image, masked)).text


def test_warnings_say_what_it_means() -> None:
    bad = Finding(check="noise", ok=False, text="Dice 0.5 and 0.5", value=0.0)
    assert warnings([bad, replace(bad, ok=True)]) == [f"noise: Dice 0.5 and 0.5. {MEANING['noise']}"]


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (VAFA(), TypeError, "attack with eps, norm and steps"),
        (replace(ATTACK, targeted=True), ValueError, "untargeted"),
        (replace(ATTACK, eps=0.0), ValueError, "eps > 0"),
        (replace(ATTACK, eps=((0.1,), (0.2,))), ValueError, "same for all cases"),
    ],
    ids=["VAFA", "targeted", "zero", "rows"],
)
def test_what_it_cannot_ask_about(
    flat: tuple[Net, Tensor, Tensor], attack: PGD, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        checklist(*flat, attack=attack)
