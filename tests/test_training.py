"""Adversarial training by handlers: the gradients are those of a step written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor, ThreadDataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.losses import DiceCELoss
from oracles import SmallNet, data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medrobust.attacks import PGD, VAFA, VAFA2D, Attack, CrossEntropy, GaussianNoise
from medrobust.handlers import CraftAdversarial, RobustEvaluation
from medrobust.losses import FrequencyConsistencyLoss, KLConsistencyLoss
from medrobust.schedules import Mix, WarmUp
from medrobust.training import AdversarialForward, ClipGradient, FreeAdversarial, LossTerm, StopOnNaN

ATTACK = PGD(eps=8 / 255, steps=3, objective=CrossEntropy())
LOSS = DiceCELoss(to_onehot_y=True, softmax=True)


def small_net(seed: int = 0) -> SmallNet:
    """Batch norm, no dropout: chance in a forward pass would hide a difference."""
    network = SmallNet(seed=seed)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def batches(count: int = 2, batch: int = 2) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        image, label = data(batch=batch, side=6, seed=seed + 1)
        found.append({"image": image, "label": label})
    return found


def trainer(network: nn.Module, loader: Any, handlers: list[Any], **settings: Any) -> SupervisedTrainer:
    settings = {"max_epochs": 1, **settings}
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(network.parameters(), lr=0.1)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=settings.pop("loss", LOSS),
        train_handlers=handlers,
        **{"decollate": False, **settings},
    )


def crafted(attack: Attack, network: nn.Module, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
    """What the handler's seed gives in this iteration."""
    generator = torch.Generator().manual_seed(100_003 * iteration)
    return attack(network, batch["image"], batch["label"], generator=generator)


def assert_same(network: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers."""
    own = other.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


Step = Callable[[nn.Module, dict[str, torch.Tensor], int], torch.Tensor]
frequency, divergence = FrequencyConsistencyLoss((3, 3, 3)), KLConsistencyLoss()
VAFA_STEP = VAFA(steps=2, block_size=(3, 3, 4), ssim_weight=0)


def adversarial_only(network: nn.Module, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
    return LOSS(network(crafted(ATTACK, network, batch, iteration)), batch["label"])


def vaft(network: nn.Module, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
    image_adv = crafted(VAFA_STEP, network, batch, iteration)
    pred, pred_adv = network(batch["image"]), network(image_adv)
    return LOSS(pred, batch["label"]) + LOSS(pred_adv, batch["label"]) + 0.5 * frequency(pred, pred_adv)


def trades(network: nn.Module, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100_003 * iteration)
    image_adv = ATTACK(network, batch["image"], None, generator=generator)
    pred, pred_adv = network(batch["image"]), network(image_adv)
    return LOSS(pred, batch["label"]) + 6 * divergence(pred, pred_adv)


def noise(network: nn.Module, batch: dict[str, torch.Tensor], iteration: int) -> torch.Tensor:
    return LOSS(network(crafted(GaussianNoise(std=0.1), network, batch, iteration)), batch["label"])


def vaft_handlers(attack: Any = VAFA_STEP) -> list[Any]:
    return [
        CraftAdversarial(attack, to="image_adv"),
        AdversarialForward(),
        LossTerm(LOSS),
        LossTerm(frequency, of=("pred", "pred_adv"), weight=0.5, name="loss_fr"),
    ]


REGIMES: dict[str, tuple[list[Any], Step]] = {
    "adversarial only": ([CraftAdversarial(ATTACK)], adversarial_only),
    "VAFT": (vaft_handlers(), vaft),
    "TRADES": (
        [
            CraftAdversarial(ATTACK, to="image_adv", label_free=True),
            AdversarialForward(),
            LossTerm(divergence, of=("pred", "pred_adv"), weight=6, name="loss_kl"),
        ],
        trades,
    ),
    "noise": ([CraftAdversarial(GaussianNoise(std=0.1))], noise),
}


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_steps_equal_those_written_by_hand(name: str, accumulation_steps: int) -> None:
    """Parameters and batch-norm statistics after an epoch: so no gradient and no statistic of the crafting leaks in."""
    handlers, step = REGIMES[name]
    network, by_hand = small_net(), small_net()
    loader = batches(4)
    trainer(network, loader, handlers, accumulation_steps=accumulation_steps).run()

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    by_hand.train()
    for i, batch in enumerate(loader):
        loss = step(by_hand, batch, i + 1) / accumulation_steps
        by_hand.train()
        loss.backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(network, by_hand)
    assert any((new != old).any() for new, old in zip(network.parameters(), small_net().parameters(), strict=True))


def test_a_vaft_step_on_slices_equals_the_one_written_by_hand() -> None:
    """Images (B, C, H, W), two-dimensional tables and a two-dimensional transform of the logits."""
    attack, term = VAFA2D(steps=2, block_size=(4, 4)), FrequencyConsistencyLoss((4, 4), reduction="relative")
    networks = [SmallNet(spatial_dims=2, channels=2) for _ in range(2)]
    for network in networks:
        network.body[3].p = 0.0
    image, label = data(2, channels=2, side=8)
    batch = {"image": image, "label": label}
    handlers = [
        CraftAdversarial(attack, to="image_adv"),
        AdversarialForward(),
        LossTerm(LOSS),
        LossTerm(term, of=("pred", "pred_adv"), name="loss_fr"),
    ]
    trainer(networks[0], [batch], handlers).run()
    image_adv = crafted(attack, networks[1], batch, 1)
    networks[1].train()
    pred, pred_adv = networks[1](image), networks[1](image_adv)
    (LOSS(pred, label) + LOSS(pred_adv, label) + term(pred, pred_adv)).backward()
    torch.optim.SGD(networks[1].parameters(), lr=0.1).step()
    assert_same(networks[0], networks[1])


def test_a_crafting_that_leaks_would_be_seen() -> None:
    """An attack that back-propagates into the parameters, as published training code does: the steps differ."""

    class Leaking(CraftAdversarial):
        def __call__(self, engine: Any) -> None:
            super().__call__(engine)
            LOSS(engine.network(engine.state.batch["image"]), engine.state.batch["label"]).backward()

    network, clean = small_net(), small_net()
    for net, handler in ((network, Leaking(ATTACK)), (clean, CraftAdversarial(ATTACK))):
        trainer(net, batches(2), [handler], accumulation_steps=2).run()
    with pytest.raises(AssertionError):
        assert_same(network, clean)


def test_terms_are_kept_for_the_log() -> None:
    engine = trainer(small_net(), batches(1), vaft_handlers())
    engine.run()
    out = engine.state.output
    total = out["loss_clean"] + out["loss_adv"] + 0.5 * out["loss_fr"]
    torch.testing.assert_close(out["loss"].detach(), total)
    assert out["loss_fr"] > 0
    assert not out["loss_adv"].requires_grad


def test_a_scaled_loss_gives_the_same_step_and_clipping_sees_the_true_gradient() -> None:
    plain, scaled = small_net(), small_net()
    trainer(plain, batches(2), [*vaft_handlers(), ClipGradient(0.05)]).run()
    engine = trainer(scaled, batches(2), [*vaft_handlers(), ClipGradient(0.05)])

    @engine.on(Events.STARTED)
    def scale() -> None:
        engine.amp, engine.amp_kwargs = True, {"enabled": False}
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[assignment]

    engine.run()
    assert_same(scaled, plain)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_clipping_bounds_the_step(accumulation_steps: int) -> None:
    """One step of size 1 moves the parameters by the clipped norm; accumulated gradients are clipped once."""
    network = small_net()
    before = torch.cat([p.detach().flatten() for p in network.parameters()]).clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    trainer(
        network,
        batches(accumulation_steps),
        [ClipGradient(0.01)],
        optimizer=optimizer,
        accumulation_steps=accumulation_steps,
    ).run()
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_in_bfloat16_autocast() -> None:
    """Forward passes and crafting in low precision: the step points where the exact one does."""

    class Autocast(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.network(x)

    def moved(network: nn.Module, craft: str | None) -> torch.Tensor:
        before = torch.cat([p.detach().flatten() for p in network.parameters()]).clone()
        handlers = vaft_handlers()
        handlers[0] = CraftAdversarial(VAFA_STEP, to="image_adv", autocast=craft)
        trainer(network, batches(1), handlers).run()
        return torch.cat([p.detach().flatten() for p in network.parameters()]) - before

    exact, low = moved(small_net(), None), moved(Autocast(small_net()), "bfloat16")
    assert torch.cosine_similarity(exact, low, dim=0) > 0.99
    assert not torch.equal(exact, low)


def test_warm_up_follows_the_epochs_and_mix_draws_per_iteration() -> None:
    seen: list[float] = []

    def note(engine: Any) -> None:
        batch = engine.state.batch
        seen.append(((batch["image"] - batch["image_clean"]).abs().max() * 255).item())

    warm = WarmUp(attack=PGD(eps=8 / 255, steps=1), epochs=2, start=0.25)
    engine = trainer(small_net(), batches(2), [CraftAdversarial(warm)], max_epochs=3)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run()
    assert seen == pytest.approx([2, 3.5, 5, 6.5, 8, 8], rel=1e-3)

    seen.clear()
    mix = Mix(attacks=[PGD(eps=2 / 255, steps=1), PGD(eps=6 / 255, steps=1)])
    engine = trainer(small_net(), batches(2), [CraftAdversarial(mix)], max_epochs=10)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run()
    assert {round(value) for value in seen} == {2, 6}


def test_a_validator_s_warm_up_follows_its_trainer_s_epochs() -> None:
    seen: list[float] = []

    def schedule(epoch: float, generator: torch.Generator) -> Attack:
        seen.append(epoch)
        return ATTACK

    engine = SupervisedEvaluator(
        torch.device("cpu"), batches(2), small_net(), val_handlers=[RobustEvaluation(schedule)], decollate=False
    )
    engine.run(global_epoch=7)
    engine.run(global_epoch=8)
    assert seen == [6, 6.5, 7, 7.5]


def test_free_training_equals_its_algorithm() -> None:
    """Shafahi et al., Algorithm 1, with four replays of every batch."""
    network, by_hand = small_net(), small_net()
    items = [{key: value[0] for key, value in batch.items()} for batch in batches(3, batch=1)]
    eps, replays = 8 / 255, 4
    loader = ThreadDataLoader(Dataset(items), batch_size=1, repeats=replays, num_workers=0)
    trainer(network, loader, [FreeAdversarial(eps=eps)], epoch_length=len(items) * replays).run()

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    by_hand.train()
    delta = torch.zeros_like(items[0]["image"][None])
    for item in items:
        image, label = item["image"][None], item["label"][None]
        for _ in range(replays):
            perturbed = (image + delta).clamp(image - eps, image + eps).clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            LOSS(by_hand(perturbed), label).backward()
            optimizer.step()
            delta = (perturbed.detach() + eps * perturbed.grad.sign()).clamp(image - eps, image + eps).clamp(
                0, 1
            ) - image
    assert_same(network, by_hand)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: LossTerm(LOSS, of=("pred",)), ValueError, "expected two keys"),
        (lambda: LossTerm(LOSS, name="adv"), ValueError, "starts with 'loss'"),
        (lambda: ClipGradient(0), ValueError, "expected max_norm > 0"),
        (lambda: FreeAdversarial(eps=0), ValueError, "expected eps > 0"),
        (lambda: trainer(small_net(), batches(1), [AdversarialForward()]).run(), KeyError, "attach CraftAdversarial"),
        (lambda: trainer(small_net(), batches(1), [LossTerm(LOSS)]).run(), KeyError, "attach AdversarialForward"),
    ],
)
def test_wrong_compositions_are_refused(wrong: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wrong()


def one_rank(rank: int, folder: str) -> None:
    """A VAFT step of one of two processes, each with half of a batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    network = without_batch_norm()
    wrapped = DistributedDataParallel(network)
    (batch,) = batches(1, batch=2)
    half = {key: value[rank : rank + 1] for key, value in batch.items()}
    trainer(wrapped, [half, half], vaft_handlers(VAFA_STEP)).run()
    torch.save(network.state_dict(), f"{folder}/rank{rank}.pt")
    # With batch norm the two differ from one process, but not from each other.
    normed = small_net()
    trainer(DistributedDataParallel(normed), [half, half], vaft_handlers(VAFA_STEP)).run()
    torch.save(dict(normed.named_parameters()), f"{folder}/normed{rank}.pt")
    # A loss that is not finite on one process stops both before a weight moves.
    (half["image"] if rank else half["label"])[:] = float("nan") if rank else 0
    stopped = small_net()
    try:
        trainer(DistributedDataParallel(stopped), [half], [StopOnNaN()]).run()
    except ValueError as error:
        torch.save({"parameters": dict(stopped.named_parameters()), "error": str(error)}, f"{folder}/nan{rank}.pt")
    dist.destroy_process_group()


def without_batch_norm() -> nn.Module:
    """Statistics over a batch would differ between one process and two by their nature."""
    network = small_net()
    network.body[1] = nn.Identity()
    return network


def test_two_ranks_equal_one_rank_of_twice_the_batch(tmp_path: Path) -> None:
    mp.start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = without_batch_norm()
    (batch,) = batches(1, batch=2)
    trainer(alone, [batch, batch], vaft_handlers(VAFA_STEP)).run()
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-6)
    normed, stopped = ([torch.load(tmp_path / f"{file}{rank}.pt") for rank in range(2)] for file in ("normed", "nan"))
    assert all(torch.equal(value, normed[1][name]) for name, value in normed[0].items())
    for rank in range(2):
        assert "expected a finite loss" in stopped[rank]["error"]
        for name, value in small_net().named_parameters():
            assert torch.equal(stopped[rank]["parameters"][name], value)


def test_terms_survive_decollation_of_images_with_metadata() -> None:
    items = [
        {key: MetaTensor(value[0], meta={"filename_or_obj": f"{i}.nii"}) for key, value in batch.items()}
        for i, batch in enumerate(batches(2, batch=1))
    ]
    engine = trainer(small_net(), DataLoader(Dataset(items), batch_size=2), vaft_handlers(), decollate=True)
    engine.run()
    assert len(engine.state.output) == 2
    for i, out in enumerate(engine.state.output):
        assert out["loss"] == pytest.approx(out["loss_clean"] + out["loss_adv"] + 0.5 * out["loss_fr"], rel=1e-5)
        assert out["image"].meta["filename_or_obj"] == f"{i}.nii"
        assert out["pred_adv"].shape == out["pred"].shape
