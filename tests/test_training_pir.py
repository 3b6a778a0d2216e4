"""PIR-AT's parts: the second head's loss, and the public code's sum of gradients, against the same sums by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from medrobust.attacks import BIM, MIFGSM, PGD
from medrobust.attacks.objectives import CrossEntropy
from medrobust.attacks.voxel_losses import SegPGDLoss
from medrobust.networks.upernet import UPerNet, UPerNetClassifier
from medrobust.training import AuxiliaryLoss, CraftAdversarial, LeakingAdversarial, Progress

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "hidden_sizes": (4, 4, 8, 8), "hidden_size": 8, "drop_path_rate": 0.0}
BUILT: dict[str, Any] = {**SMALL, "in_channels": 1}
LOSS = CrossEntropy()
ATTACK = BIM(eps=4 / 255, steps=3, step_size=0.01, keep_best=False, objective=LOSS)


def upernet(**settings: Any) -> UPerNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UPerNet(3, **{**BUILT, **settings})


class Conv(nn.Conv2d):
    """No norm, no dropout: a case does not depend on the others."""

    def __init__(self) -> None:
        super().__init__(1, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(2)
        self.weight.data = torch.randn(self.weight.shape, generator=generator)
        self.bias.data.zero_()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 1, 40, 48, generator=generator)
    label = torch.randint(-1, 3, (2, 1, 40, 48), generator=generator)
    return {"image": image, "label": label.float()}


def trained(network: nn.Module, handlers: list[Any], **settings: Any) -> SupervisedTrainer:
    """One step of length 1 along the gradient, so the weights' change is the gradient."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    engine = SupervisedTrainer(
        torch.device("cpu"),
        1,
        [batch()],
        network,
        optimizer,
        LOSS,
        decollate=False,
        train_handlers=handlers,
        **settings,
    )
    engine.run()
    return engine


def by_hand(network: UPerNet, images: list[Tensor], label: Tensor, *, auxiliary: float = 0.0) -> dict[str, Tensor]:
    """Sum of the gradients at all images but the last in evaluation mode, and of the training loss at the last."""
    network.zero_grad()
    for image in images[:-1]:
        network.eval()
        LOSS(network(image), label).mean().backward()
    network.train()
    main, second = network.with_auxiliary(images[-1])
    (LOSS(main, label).mean() + auxiliary * LOSS(second, label).mean()).backward()
    return {key: value.grad for key, value in network.named_parameters() if value.grad is not None}


def steps(network: UPerNet, image: Tensor, label: Tensor) -> list[Tensor]:
    """The attack's images from the clean one on."""
    images, network = [image], network.eval()
    for _ in range(ATTACK.steps):
        x = images[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(LOSS(network(x), label).mean(), x)
        moved = images[-1] + 0.01 * gradient.sign()
        images.append(torch.min(torch.max(moved, image - 4 / 255), image + 4 / 255).clamp(0, 1))
    return images


def check(before: UPerNet, after: nn.Module, gradients: dict[str, Tensor]) -> None:
    start = dict(before.named_parameters())
    assert len(gradients) > 40
    for key, value in after.named_parameters():
        expected = gradients.get(key, torch.zeros_like(value))
        torch.testing.assert_close(start[key] - value.detach(), expected, rtol=1e-3, atol=1e-5)


def test_the_second_heads_loss_is_added_with_its_weight() -> None:
    network, data = upernet(), batch()
    gradients = by_hand(upernet_like := upernet(), [data["image"]], data["label"], auxiliary=0.4)
    engine = trained(network, [AuxiliaryLoss(LOSS, weight=0.4)])
    check(upernet_like, network, gradients)
    assert any(key.startswith("auxiliary_head") for key in gradients)
    main, second = upernet().train().with_auxiliary(data["image"])
    assert engine.state.output["loss_aux"].item() == pytest.approx(LOSS(second, data["label"]).mean().item(), rel=1e-4)
    total = LOSS(main, data["label"]).mean() + 0.4 * LOSS(second, data["label"]).mean()
    assert engine.state.output["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert not network.decode_head._forward_pre_hooks


def test_a_network_without_a_second_head_is_refused() -> None:
    with pytest.raises(ValueError, match="network with an auxiliary_head, got UPerNet without"):
        trained(upernet(auxiliary=False), [AuxiliaryLoss(LOSS)])


def test_the_hook_goes_when_a_training_breaks() -> None:
    network, handler = upernet(), AuxiliaryLoss(LOSS)

    class Broken:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine: Any) -> None:
            raise RuntimeError("on purpose")

    # Progress raises the error anew, so handlers after it never hear of it.
    for handlers in ([handler, Broken()], [Progress(), handler, Broken()]):
        with pytest.raises(RuntimeError, match="on purpose"):
            trained(network, handlers)
        assert not network.decode_head._forward_pre_hooks


def test_leaking_follows_the_sum_of_all_gradients_and_the_corrected_form_the_last_alone() -> None:
    data = batch()
    images = steps(upernet(), data["image"], data["label"])
    leaking, corrected = upernet(), upernet()
    left = trained(leaking, [LeakingAdversarial(ATTACK), AuxiliaryLoss(LOSS)])
    right = trained(corrected, [CraftAdversarial(ATTACK), AuxiliaryLoss(LOSS)])
    for engine in (left, right):
        torch.testing.assert_close(engine.state.batch["image"], images[-1], rtol=0, atol=1e-6)
        assert torch.equal(engine.state.batch["image_clean"], data["image"])
    assert (images[-1] - data["image"]).abs().max().item() == pytest.approx(4 / 255, abs=1e-6)
    check(upernet(), leaking, by_hand(upernet(), images, data["label"], auxiliary=0.4))
    check(upernet(), corrected, by_hand(upernet(), images[-1:], data["label"], auxiliary=0.4))
    assert leaking.training


def test_leaking_leaves_the_modes_of_modules_as_they_were() -> None:
    network = upernet()
    seen: list[list[bool]] = []

    def look(engine: Any) -> None:
        seen.append([module.training for module in network.modules()])

    handler = LeakingAdversarial(ATTACK)
    engine = trained(network, [])
    modes = [module.training for module in network.modules()]
    engine.state.batch = batch()
    handler.craft(engine)
    look(engine)
    assert seen == [modes]


@pytest.mark.parametrize(
    "attack",
    [
        replace(ATTACK, objective=SegPGDLoss()),
        replace(ATTACK, eps=((4 / 255,), (8 / 255,)), step_size=((0.01,), (0.02,))),
    ],
    ids=["an objective that changes", "eps by case"],
)
def test_leaking_and_the_corrected_form_see_the_same_images(attack: PGD) -> None:
    left = trained(upernet(), [LeakingAdversarial(attack)])
    right = trained(upernet(), [CraftAdversarial(attack)])
    assert (right.state.batch["image"] - batch()["image"]).abs().max() > 0.01
    torch.testing.assert_close(left.state.batch["image"], right.state.batch["image"], rtol=0, atol=1e-6)


def test_leaking_is_accumulated_as_the_loss_is() -> None:
    """Two halves accumulated make the step of the whole batch."""
    data = batch()
    halves = [{key: value[index : index + 1] for key, value in data.items()} for index in range(2)]
    weights = []
    for batches, accumulation in (([data], 1), (halves, 2)):
        network = Conv()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        # Means over the batch, so that cases count alike.
        loss = CrossEntropy()
        SupervisedTrainer(
            torch.device("cpu"),
            1,
            batches,
            network,
            optimizer,
            lambda logits, label, loss=loss: loss(logits, label).mean(),
            decollate=False,
            train_handlers=[LeakingAdversarial(ATTACK)],
            accumulation_steps=accumulation,
        ).run()
        weights.append(network.weight.detach() - Conv().weight.detach())
    assert weights[0].abs().max() > 0.01
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "attack",
    [PGD(keep_best=False), BIM(), BIM(norm="l2", keep_best=False), BIM(keep_best=False, targeted=True), MIFGSM()],
)
def test_leaking_takes_the_published_attack_alone(attack: PGD) -> None:
    with pytest.raises(ValueError, match="keep_best=False"):
        LeakingAdversarial(attack)


def test_a_classifier_answers_alike_at_all_pixels_and_hands_its_backbone_over() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = UPerNetClassifier(4, **BUILT).eval()
    image = batch()["image"]
    logits = classifier(image)
    assert logits.shape == (2, 4, 40, 48)
    assert torch.equal(logits, logits[:, :, :1, :1].expand_as(logits))
    pooled = classifier.features(image)[-1].mean((2, 3))
    torch.testing.assert_close(logits[:, :, 7, 5], nn.functional.linear(pooled, *classifier.decode_head.parameters()))

    network = upernet().eval()
    wrapped = {f"module.{name}": tensor for name, tensor in classifier.state_dict().items()}
    network.load_backbone(wrapped)
    for ours, theirs in zip(network.features(image), classifier.features(image), strict=True):
        torch.testing.assert_close(ours, theirs)
    wrapped["module.surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match="surprise, which has no place"):
        upernet().load_backbone(wrapped)
    with pytest.raises(ValueError, match="where the network has"):
        upernet(hidden_sizes=(4, 4, 8, 16)).load_backbone(classifier.state_dict())
