"""Attacks on models that give one answer an image, and objectives for classes, captions and embeddings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medrobust import attacks
from medrobust.attacks import APGD, DLR, FGSM, PGD, CrossEntropy, Margin, RandomNoise, Shift, Similarity
from medrobust.zero_shot import for_classes

LOGITS = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.5], [0.0, 4.0, 1.0, 3.0, 2.0]])[..., None, None]
LABEL = torch.tensor([0, 2]).view(2, 1, 1, 1)


class Linear(nn.Module):
    """One answer an image: logits (B, K, 1, 1) from the pixels."""

    def __init__(self, classes: int = 4, pixels: int = 8 * 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((classes, pixels), generator=generator))

    def forward(self, image: Tensor) -> Tensor:
        return (image.flatten(1) @ self.weight.t())[..., None, None]


def pictures(count: int = 3) -> Tensor:
    """Away from 0 and 1, so that a ball is not cut."""
    return 0.3 + 0.4 * torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(1))


def labels(*values: int) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_margin_is_the_best_other_minus_the_own() -> None:
    assert Margin()(LOGITS, LABEL).tolist() == [-1.0, 3.0]


def test_dlr_divides_by_the_gap_to_the_third_and_does_not_see_the_scale() -> None:
    expected = torch.tensor([-1 / (3 - 1), 3 / (4 - 2)])
    torch.testing.assert_close(DLR()(LOGITS, LABEL), expected)
    torch.testing.assert_close(DLR()(100 * LOGITS + 7, LABEL), expected)
    targeted = torch.tensor([-1 / (3 - (1 + 0.5) / 2), 3 / (4 - (2 + 1) / 2)])
    torch.testing.assert_close(DLR(targeted=True)(LOGITS, LABEL), targeted)
    with pytest.raises(ValueError, match="at least 3 channels for DLR, got 2"):
        DLR()(LOGITS[:, :2], labels(0, 1))


def test_similarity_is_minus_the_own_logit_or_the_mean_over_all_own() -> None:
    assert Similarity()(LOGITS, LABEL).tolist() == [-3.0, -1.0]
    marked = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])[..., None, None]
    assert Similarity(head="sigmoid")(LOGITS, marked).tolist() == [-2.5, -2.0]


def test_shift_is_the_squared_length() -> None:
    assert Shift()(LOGITS, LABEL).tolist() == [9 + 1 + 4 + 1 + 0.25, 0 + 16 + 1 + 9 + 4]


@pytest.mark.parametrize("objective", [Margin(), DLR(), Similarity()], ids=repr)
def test_objectives_take_maps_too_and_pass_over_voxels_without_a_say(objective: Any) -> None:
    both = torch.cat([LOGITS[:1], LOGITS[1:], LOGITS[1:]], 3)
    label = torch.tensor([0, 2, -1]).view(1, 1, 1, 3)
    each = objective(LOGITS, LABEL)
    torch.testing.assert_close(objective(both, label), each.mean()[None])


def test_one_channel_has_no_other_answer() -> None:
    with pytest.raises(ValueError, match="expected two or more channels that compete for Margin"):
        Margin()(LOGITS[:, :1], labels(0, 0))


def test_fgsm_away_from_a_text_and_toward_one_is_exact() -> None:
    model, image = Linear(), pictures()
    eps = 0.05
    own, target = labels(0, 1, 2), labels(3, 3, 1)
    away = FGSM(eps=eps, objective=Similarity())(model, image, own)
    torch.testing.assert_close(away, image - eps * model.weight[[0, 1, 2]].sign().view_as(image))
    toward = FGSM(eps=eps, objective=Similarity(), targeted=True)(model, image, target)
    torch.testing.assert_close(toward, image + eps * model.weight[[3, 3, 1]].sign().view_as(image))


def test_pgd_on_two_classes_finds_the_worst_image() -> None:
    model, image = Linear(classes=2), pictures()
    difference = (model.weight[1] - model.weight[0]).sign().view(1, 1, 8, 8)
    worst = PGD(eps=0.05, steps=10, objective=Margin())(model, image, labels(0, 0, 0))
    torch.testing.assert_close(worst, image + 0.05 * difference.expand_as(image))
    direction = (model.weight[1] - model.weight[0]).view(1, 1, 8, 8)
    l2 = PGD(eps=0.3, norm="l2", steps=10, objective=Margin(), random_start=False)(model, image, labels(0, 0, 0))
    torch.testing.assert_close(l2 - image, (0.3 * direction / direction.norm()).expand_as(image), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in attacks.names() if name not in ("universal", "vafa", "sa2")])
def test_every_attack_on_images_works_on_a_classifier(name: str) -> None:
    cls = attacks.load(name)
    known = {field.name for field in fields(cls)}
    quick = {"steps": 6, "block_size": (4, 4), "eps": 0.1, "q_max": 60.0}
    attack = for_classes(cls(**{key: value for key, value in quick.items() if key in known}))
    model, image = Linear(), pictures()
    with torch.no_grad():
        label = model(image).argmax(1, keepdim=True)
    image_adv = attack(model, image, label)
    torch.testing.assert_close(attack.threat.project(image_adv, image), image_adv, rtol=0, atol=0)
    assert torch.equal(attack(model, image), image_adv)  # without a label, the prediction is attacked
    if not attack.blind:
        with torch.no_grad():
            before, after = (CrossEntropy()(model(x), label) for x in (image, image_adv))
        assert (after > before).all()


def test_an_attack_without_an_objective_gets_one_for_classes() -> None:
    assert for_classes(PGD()).objective == CrossEntropy()
    assert for_classes(PGD(objective=DLR())).objective == DLR()
    assert for_classes(APGD()).criterion == Margin()
    assert for_classes(APGD(criterion=CrossEntropy())).criterion == CrossEntropy()
    assert replace(for_classes(APGD()), eps=0.1).eps == 0.1


def test_a_label_is_a_map_or_one_answer_and_nothing_between() -> None:
    for size in ((2, 2), (1, 8), (4, 1)):
        with pytest.raises(ValueError, match="on the grid of the image"):
            FGSM()(Linear(), pictures(), torch.zeros((3, 1, *size), dtype=torch.long))
    segmentation = nn.Conv2d(1, 2, 1)
    with pytest.raises(ValueError, match="expected a label of shape"):
        FGSM()(segmentation, pictures(), labels(0, 1, 0))


def test_the_noise_has_the_norm_of_the_attack() -> None:
    image, label = pictures(), labels(0, 1, 2)
    for norm, eps in (("linf", 0.05), ("l2", 0.5)):
        deltas = [
            attack(Linear(), image, label) - image
            for attack in (FGSM(eps=eps, norm=norm, objective=CrossEntropy()), RandomNoise(eps=eps, norm=norm))
        ]
        sizes = [torch.linalg.vector_norm(d.flatten(1), torch.inf if norm == "linf" else 2, dim=1) for d in deltas]
        torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-4, atol=1e-6)
