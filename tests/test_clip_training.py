"""Losses and handlers of CLIP's fine-tunings against steps written by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from monai.engines import PrepareBatchDefault, PrepareBatchExtraInput, SupervisedTrainer
from test_clip_network import TINY, make, pictures, texts
from torch import Tensor
from torch.nn import functional as F

from medrobust.attacks import PGD, CrossEntropy, GaussianNoise, Shift
from medrobust.losses import ClassCrossEntropy, ContrastiveLoss, ShiftLoss
from medrobust.networks.clip_zero_shot import ZeroShotCLIP
from medrobust.training import CraftAdversarial
from medrobust.training.fare import KeepEmbedding

LABEL = torch.tensor([0, 1, 3]).view(3, 1, 1, 1)
EPS = 8 / 255


def test_contrastive_loss_is_clips_where_all_pairs_differ() -> None:
    network, ids = make(), texts(3)
    with torch.no_grad():
        logits = network(pictures(), ids)
        expected = network.clip(input_ids=ids, pixel_values=pictures(), return_loss=True)
        similarity = expected.logits_per_image
    loss = ContrastiveLoss()(similarity[..., None, None], torch.arange(3).view(3, 1, 1, 1))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loss, ContrastiveLoss()(logits, torch.tensor([0, 0, 1])))


def test_pairs_that_say_the_same_share_the_target() -> None:
    logits = torch.randn((4, 4), generator=torch.Generator().manual_seed(0))
    y = [0, 1, 0, 2]
    total = 0.0
    for table in (logits, logits.t()):
        for row in range(4):
            likes = [column for column in range(4) if y[column] == y[row]]
            total += sum(-float(table[row].log_softmax(0)[column]) for column in likes) / len(likes)
    loss = ContrastiveLoss()(logits[..., None, None], torch.tensor(y).view(4, 1, 1, 1))
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)
    with pytest.raises(ValueError, match="expected a square of logits"):
        ContrastiveLoss()(logits[:, :3], torch.tensor(y))


def batch() -> dict[str, Tensor]:
    return {"image": pictures(), "label": LABEL}


def train(network: ZeroShotCLIP, loss: Any, handlers: list[Any], prepare_batch: Any = None) -> ZeroShotCLIP:
    """Two iterations of MONAI's trainer by plain gradient descent."""
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch(), batch()],
        network=network,
        optimizer=torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1),
        loss_function=loss,
        prepare_batch=prepare_batch or PrepareBatchDefault(),
        train_handlers=handlers,
    ).run()
    return network


def by_hand(network: ZeroShotCLIP, loss: Any) -> ZeroShotCLIP:
    """The same; ``loss(network, generator)`` crafts and gives what is differentiated."""
    for iteration in (1, 2):
        wanted = [p for p in network.parameters() if p.requires_grad]
        value = loss(network, torch.Generator().manual_seed(100_003 * iteration))
        for parameter, gradient in zip(wanted, torch.autograd.grad(value, wanted), strict=True):
            parameter.data.sub_(0.1 * gradient)
    return network


def assert_same(one: ZeroShotCLIP, other: ZeroShotCLIP, start: ZeroShotCLIP) -> None:
    moved = 0.0
    for (name, a), b, before in zip(one.named_parameters(), other.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved += (a - before).detach().abs().sum().item()
    assert moved > 1e-2


@pytest.mark.parametrize("trainable", ["image", "projection"])
@pytest.mark.parametrize("attack", [PGD(eps=EPS, steps=2, objective=CrossEntropy()), GaussianNoise(std=EPS)])
def test_tecoa_and_noise_are_cross_entropy_against_fixed_texts(attack: Any, trainable: Any) -> None:
    def loss(network: ZeroShotCLIP, generator: torch.Generator) -> Tensor:
        image_adv = attack(network, pictures(), LABEL, generator=generator)
        return F.cross_entropy(network.class_logits(image_adv), LABEL.flatten())

    start = make(trainable=trainable)
    trained = train(deepcopy(start), ClassCrossEntropy(), [CraftAdversarial(attack)])
    assert_same(trained, by_hand(deepcopy(start), loss), start)


def test_fare_keeps_the_embedding_of_the_clean_image() -> None:
    attack = PGD(eps=EPS, steps=3, objective=Shift())
    start = make(trainable="image")
    with torch.no_grad():
        reference = start.embed(pictures())

    def loss(network: ZeroShotCLIP, generator: torch.Generator) -> Tensor:
        def shift(image: Tensor) -> Tensor:
            return (network.embed(image) - reference)[..., None, None]

        image_adv = attack(shift, pictures(), None, generator=generator)
        return (network.embed(image_adv) - reference).square().sum(1).mean()

    handlers = [KeepEmbedding(deepcopy(start)), CraftAdversarial(attack, label_free=True)]
    prepare_batch = PrepareBatchExtraInput(extra_keys={"reference": "reference"})
    trained = train(deepcopy(start), ShiftLoss(), handlers, prepare_batch)
    assert_same(trained, by_hand(deepcopy(start), loss), start)
    assert not any(parameter.requires_grad for parameter in handlers[0].original.parameters())


def test_what_is_frozen_stays_bit_for_bit() -> None:
    start = make(trainable="last", blocks=1)
    trained = train(deepcopy(start), ClassCrossEntropy(), [])
    changed = {
        name
        for (name, a), b in zip(trained.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed
    assert all(
        name.startswith(("clip.vision_model.encoder.layers.2.", "clip.vision_model.post", "clip.visual"))
        for name in changed
    )


def test_the_contrastive_step_reaches_both_towers() -> None:
    network = ZeroShotCLIP(TINY, texts(8).view(4, 2, 9), trainable="all")
    before = deepcopy(network)
    batches = [{**batch(), "input_ids": texts(3)}]
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=ContrastiveLoss(),
        prepare_batch=PrepareBatchExtraInput(extra_keys={"input_ids": "input_ids"}),
    ).run()
    changed = {
        name
        for (name, a), b in zip(network.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    for part in ("text_model.encoder", "vision_model.encoder", "logit_scale", "text_projection"):
        assert any(part in name for name in changed), part
