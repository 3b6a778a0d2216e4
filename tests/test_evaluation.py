"""Controls of attacks with an eps for each channel."""

from __future__ import annotations

import pytest
from oracles import VoxelLinear, data

from medrobust.attacks import PGD, RandomNoise
from medrobust.attacks.threat import Eps
from medrobust.evaluation import Evaluation, conditions

TWO = (4 / 255, 8 / 255)


@pytest.mark.parametrize(
    ("norm", "eps", "name"),
    [
        ("linf", 8 / 255, "noise 8/255"),
        ("linf", TWO, "noise 4/255,8/255"),
        ("linf", (TWO, TWO), "noise 4/255,8/255;4/255,8/255"),
        ("l2", 2.0, "noise L2 2"),
        ("l2", ((2.0,), (3.0,)), "noise L2 2;L2 3"),
    ],
)
def test_noise_is_called_by_its_size(norm: str, eps: Eps, name: str) -> None:
    _, noise, attack = conditions({"PGD": PGD(norm=norm, eps=eps)})
    assert (noise.name, noise.attack, attack.name) == (name, RandomNoise(norm=norm, eps=eps), "PGD")


def test_noise_has_the_eps_of_each_channel() -> None:
    image, label = data(2, batch=1, channels=2, classes=2)
    judge = Evaluation(network=VoxelLinear(), inferer=None, class_names=["background", "organ"])
    results = list(judge.case("a", image[0], label[0], conditions({"PGD": PGD(eps=TWO, steps=2)})))
    assert [result.condition.name for result in results] == ["clean", "noise 4/255,8/255", "PGD"]
    for result in results[1:]:
        sizes = (result.image_adv - result.image).abs().flatten(1).amax(1).tolist()
        assert sizes == pytest.approx(TWO, abs=1e-6)
