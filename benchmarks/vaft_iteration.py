"""One VAFT iteration against a clean one, its floor and the published way, on a UNETR as small as the shipped one.

The floor is ``steps + 2`` forward and backward passes: one for every step of the attack, one for the clean image, one
for the adversarial one. The baseline does what the published code does, written anew: gradients of all parameters
while crafting, blocks in Python loops, FFT transforms, the clean patch cut and transformed in every step, and a
consistency term whose patch is cut class by class.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch_dct
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR
from torch import Tensor
from vafa_step import corners, cut, published_render, similarity

from medrobust.attacks import VAFA
from medrobust.losses import FrequencyConsistencyLoss
from medrobust.training import AdversarialForward, CraftAdversarial, LossTerm

SIZE, BLOCK, BATCH, STEPS, ROUNDS = (80, 80, 16), 16, 2, 5, 5
LOSS = DiceCELoss(to_onehot_y=True, softmax=True)


def trainer(network: UNETR, batch: dict[str, Tensor], handlers: list[object]) -> SupervisedTrainer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    return SupervisedTrainer(
        torch.device("cpu"), 1, [batch], network, optimizer, LOSS, train_handlers=handlers, decollate=False
    )


def published(network: UNETR, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Crafting, two forward passes and an update, as the published code spends them."""
    image, label = batch["image"], batch["label"]
    network.eval()
    q = torch.full((BATCH, 1, len(corners(SIZE, BLOCK)), BLOCK, BLOCK, BLOCK), 20.0)
    for _ in range(STEPS):
        q = q.detach().requires_grad_()
        image_adv = published_render(image, q)
        image_adv = image_adv - image_adv.amin((2, 3), keepdim=True)
        image_adv = image_adv / image_adv.amax((2, 3), keepdim=True)
        score = LOSS(network(image_adv), label) - (1 - similarity(cut(image, BLOCK), cut(image_adv, BLOCK)))
        score.backward()
        q = (q + q.grad.sign()).clamp(5, 20)
    network.train()
    optimizer.zero_grad()
    logits, logits_adv = network(image), network(image_adv.detach())
    spectra = []
    for x in (logits, logits_adv):
        patches = x.new_zeros(x.shape)
        for b in range(x.shape[0]):
            for k in range(x.shape[1]):
                patches[b, k] = x[b, k]
        spectra.append(torch_dct.dct_3d(patches, norm="ortho"))
    distance = (spectra[0] - spectra[1]).abs().sum() / spectra[0].abs().sum()
    (LOSS(logits, label) + LOSS(logits_adv, label) + distance).backward()
    optimizer.step()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((BATCH, 1, *SIZE), generator=generator)
    batch = {"image": image, "label": (5 * image).long()}
    network = UNETR(1, 5, SIZE, feature_size=8, hidden_size=96, mlp_dim=384, num_heads=6)
    attack = VAFA(steps=STEPS, block_size=(BLOCK,) * 3, ssim_weight=1.0)
    vaft = [
        CraftAdversarial(attack, to="image_adv"),
        AdversarialForward(),
        LossTerm(LOSS),
        LossTerm(FrequencyConsistencyLoss(reduction="relative"), of=("pred", "pred_adv"), name="loss_fr"),
    ]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    ways: dict[str, Callable[[], object]] = {
        "clean": trainer(network, batch, []).run,
        "VAFT": trainer(network, batch, list(vaft)).run,
        "published": lambda: published(network, optimizer, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):  # in turns, so that a busy moment hits all of them
        for name, way in ways.items():
            times[name].append(seconds(way))
    clean, ours, theirs = (statistics.median(times[name][1:]) for name in ways)
    print(f"clean iteration {clean:.2f} s, VAFT with {STEPS} steps {ours:.2f} s, published way {theirs:.2f} s")
    print(
        f"VAFT is {ours / clean:.1f} clean iterations; the floor is {STEPS + 2}; the published way {theirs / clean:.1f}"
    )


if __name__ == "__main__":
    main()
