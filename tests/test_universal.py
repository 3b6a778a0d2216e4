"""One perturbation for all images: closed form on a linear model, and the attack that applies it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import SmallNet, data
from torch import Tensor

from medrobust.attacks import CrossEntropy, RandomNoise, Universal
from medrobust.universal import Case, fit, mean_score, save


class Weighted(torch.nn.Module):
    """One logit for the whole image, linear in it: sum of weight * image, the same at every pixel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, image: Tensor) -> Tensor:
        return (self.weight * image).sum((1, 2, 3), keepdim=True).expand(-1, 1, *image.shape[2:])


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def test_on_a_linear_model_it_is_the_sign_of_the_weights(weight: Tensor) -> None:
    """All labels are 1, so the worst common change lowers the logit: -eps * sign(weight), for images away from 0, 1."""
    images = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    cases = [Case(Weighted(weight), image[None], torch.ones(1, 1, 6, 6)) for image in images]
    delta = fit(cases, (6, 6), eps=0.1, epochs=4, objective=CrossEntropy())
    assert torch.allclose(delta, -0.1 * weight[0].sign(), atol=1e-6)


def test_cases_that_pull_apart_are_averaged(weight: Tensor) -> None:
    """Two cases of weight w and one of -w, all in one batch: the majority decides."""
    image, label = torch.full((1, 1, 6, 6), 0.5), torch.ones(1, 1, 6, 6)
    signs = (1.0, 1.0, -1.0)
    cases = [Case(Weighted(sign * weight * 0.01), image, label) for sign in signs]
    delta = fit(cases, (6, 6), eps=0.1, epochs=3, batch=3, step_size=0.1, objective=CrossEntropy())
    assert torch.allclose(delta, -0.1 * weight[0].sign(), atol=1e-6)


def test_it_beats_noise_on_images_it_has_not_seen() -> None:
    model = SmallNet(2).eval()
    pairs = [data(2, batch=1, seed=seed) for seed in range(12)]
    cases = [Case(model, image, label) for image, label in pairs]
    objective = CrossEntropy()
    size = tuple(pairs[0][0].shape[2:])
    delta = fit(cases[:8], size, eps=0.05, epochs=8, objective=objective)
    assert delta.abs().max() <= 0.05 + 1e-7
    noise = torch.cat(
        [RandomNoise(eps=0.05)(model, c.image, c.label, generator=torch.Generator().manual_seed(3)) for c in cases[8:]]
    )
    noisy = torch.stack([objective(model(n[None]), c.label) for n, c in zip(noise, cases[8:], strict=True)]).mean()
    clean = mean_score(cases[8:], torch.zeros_like(delta)[None], objective)
    assert mean_score(cases[8:], delta[None], objective) - clean > 2 * abs(noisy.item() - clean)


def test_it_repeats_and_tells_its_progress(weight: Tensor) -> None:
    image, label = torch.full((1, 1, 6, 6), 0.5), torch.ones(1, 1, 6, 6)
    cases = [Case(Weighted(weight * number), image, label) for number in (0.1, -0.2, 0.3)]
    told: list[int] = []
    first = fit(cases, (3, 3), eps=0.1, epochs=3, batch=1, progress=lambda epoch, score: told.append(epoch))
    assert told == [0, 1, 2]
    assert torch.equal(first, fit(cases, (3, 3), eps=0.1, epochs=3, batch=1))
    assert torch.equal(first, fit(cases, (3, 3), eps=0.1, epochs=3, batch=1, step_size=0.1)), "steps begin with eps"
    with pytest.raises(ValueError, match="expected cases, eps above 0"):
        fit([], (3, 3), eps=0.1)


def test_the_attack_adds_what_was_saved(tmp_path: Path) -> None:
    delta = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    save(delta, tmp_path / "u.pt", eps=0.1)
    image = torch.full((2, 1, 4, 4), 0.5)
    attack = Universal(file=str(tmp_path / "u.pt"), eps=0.1)
    assert torch.allclose(attack(lambda x: x, image, torch.zeros(2, 1, 4, 4)), image + delta, atol=1e-7)
    half = Universal(file=str(tmp_path / "u.pt"), eps=0.05)
    assert torch.allclose(half(lambda x: x, image, torch.zeros(2, 1, 4, 4)), image + delta / 2, atol=1e-7)
    large = attack(lambda x: x, torch.full((1, 1, 9, 7), 0.5), torch.zeros(1, 1, 9, 7))
    assert (large - 0.5).abs().max() <= 0.1
    assert "u.pt sha256:" in repr(attack)
    assert str(tmp_path) not in repr(attack)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    file, image = tmp_path / "u.pt", torch.full((1, 1, 4, 4), 0.5)
    for change in (0.1, -0.1, 0.05):
        save(torch.full((1, 4, 4), change), file, eps=0.1)
        attack = Universal(file=str(file), eps=0.1)
        assert torch.allclose(attack(lambda x: x, image, torch.zeros(1, 1, 4, 4)), image + change, atol=1e-7)


def test_each_case_and_channel_has_a_radius_of_its_own(tmp_path: Path) -> None:
    save(torch.full((2, 4, 4), 0.1), tmp_path / "u.pt", eps=0.1)
    rows = ((0.1, 0.05), (0.2, 0.0))
    image = torch.full((2, 2, 4, 4), 0.5)
    image_adv = Universal(file=str(tmp_path / "u.pt"), eps=rows)(lambda x: x, image, torch.zeros(2, 1, 4, 4))
    assert torch.allclose((image_adv - image)[..., 0, 0], torch.tensor(rows), atol=1e-7)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got no such file"):
        Universal(file=str(tmp_path / "none.pt"))
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="written by medrobust"):
        Universal(file=str(tmp_path / "other.pt"))
    save(torch.zeros(3, 4, 4), tmp_path / "u.pt", eps=0.1)
    with pytest.raises(ValueError, match=r"for images \(1, 4, 4\), got one of shape \(3, 4, 4\)"):
        Universal(file=str(tmp_path / "u.pt"))(lambda x: x, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
