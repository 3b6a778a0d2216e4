"""PGD and APGD on one 2-D segmentation network: medrobust, torchattacks, Foolbox and ART against bare gradients.

Foolbox and ART attack classifiers and refuse label maps; torchattacks' APGD does too. They get the network behind a
head of two logits, (margin, cross-entropy of the case): their loss rises with the cross-entropy, so the sign of the
gradient is the same for all. That one step gives equal images is checked first; after many, rounding has its say.

    .venv/bin/pip install --no-deps -r benchmarks/peers.txt
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/peers.py
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from medrobust.attacks import APGD, PGD, CrossEntropy

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

EPS, STEP_SIZE, STEPS, REPEATS = 8 / 255, 1 / 255, 20, 7
BATCH, CLASSES, SIZE = 4, 5, 128

Run = Callable[[Tensor, Tensor], Tensor]


class Pair(nn.Module):
    """(B, C, H, W) -> (B, 2): a constant, and the cross-entropy of each case with its label map."""

    def __init__(self, network: nn.Module, label: Tensor, margin: float = 0.0) -> None:
        super().__init__()
        self.network, self.label, self.margin = network, label, margin
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        loss = F.cross_entropy(self.network(image), self.label[:, 0], reduction="none").mean((1, 2))
        return torch.stack([torch.full_like(loss, self.margin), loss], 1)


def floor(network: nn.Module, steps: int) -> Run:
    """The network's own forward and input gradient, and nothing else."""

    def run(image: Tensor, label: Tensor) -> Tensor:
        image_adv = image
        for _ in range(steps):
            image_adv = image_adv.detach().requires_grad_()
            loss = F.cross_entropy(network(image_adv), label[:, 0])
            (gradient,) = torch.autograd.grad(loss, image_adv)
            image_adv = (image_adv + STEP_SIZE * gradient.sign()).clamp(image - EPS, image + EPS).clamp(0, 1)
        return image_adv.detach()

    return run


def pgd(network: nn.Module, label: Tensor, steps: int) -> dict[str, Run]:
    import foolbox
    import numpy as np
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    ours = PGD(
        eps=EPS,
        steps=steps,
        step_size=STEP_SIZE,
        random_start=False,
        keep_best=False,
        objective=CrossEntropy(),
    )
    theirs = torchattacks.PGD(network, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=False)
    pair = Pair(network, label)
    fool = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=False)
    fool_model = foolbox.PyTorchModel(pair, bounds=(0, 1), device="cpu")
    classifier = PyTorchClassifier(
        pair, nn.CrossEntropyLoss(), (1, SIZE, SIZE), 2, clip_values=(0.0, 1.0), device_type="cpu"
    )
    art = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP_SIZE, max_iter=steps, num_random_init=0, batch_size=BATCH, verbose=False
    )
    first = torch.zeros(BATCH, dtype=torch.long)
    one_hot = np.eye(2, dtype=np.float32)[first.numpy()]
    return {
        "bare gradients": floor(network, steps),
        "medrobust PGD": lambda image, label: ours(network, image, label),
        "torchattacks PGD": lambda image, label: theirs(image, label[:, 0]),
        "Foolbox LinfPGD": lambda image, _: fool.run(fool_model, image, first, epsilon=EPS),
        "ART PGD": lambda image, _: torch.from_numpy(art.generate(image.numpy(), y=one_hot)),
    }


def apgd(network: nn.Module, label: Tensor) -> dict[str, Run]:
    import torchattacks

    ours = APGD(eps=EPS, steps=STEPS, objective=CrossEntropy(), criterion=CrossEntropy())
    sea = APGD(eps=EPS, steps=STEPS, objective=CrossEntropy())
    # Of images that are wrong already it would make nothing.
    theirs = torchattacks.APGD(Pair(network, label, margin=10.0), eps=EPS, steps=STEPS, n_restarts=1)
    first = torch.zeros(BATCH, dtype=torch.long)
    return {
        "bare gradients": floor(network, STEPS),
        "medrobust APGD": lambda image, label: ours(network, image, label),
        "medrobust APGD, best by Dice": lambda image, label: sea(network, image, label),
        "torchattacks APGD": lambda image, _: theirs(image, first),
    }


def measure(runs: dict[str, Run], image: Tensor, label: Tensor, calls: list[int]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    forwards = {}
    for repeat in range(REPEATS + 1):  # interleaved, so that a busy machine slows all; the first is to warm up
        for name, run in runs.items():
            calls.clear()
            start = time.perf_counter()
            run(image, label)
            took = time.perf_counter() - start
            forwards[name] = len(calls)
            if repeat:
                seconds[name].append(took / STEPS)
    best = {name: min(times) for name, times in seconds.items()}  # what other work on the machine delays least
    for name, time_ in best.items():
        ratio = time_ / best["bare gradients"]
        print(f"{name:<30} {1000 * time_:7.1f} ms a step  {ratio:5.2f} x bare gradients  {forwards[name]} forwards")


def main() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, CLASSES, (16, 32, 64, 128), (2, 2, 2), num_res_units=2).eval()
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator)
    label = torch.randint(0, CLASSES, (BATCH, 1, SIZE, SIZE), generator=generator)
    once = pgd(network, label, steps=1)
    wanted = once["bare gradients"](image, label)
    for name, run in once.items():
        apart = (run(image, label) - wanted).abs() > 1e-6
        print(f"{name:<30} one step: {apart.double().mean().item():.4%} of pixels differ from bare gradients")
    measure(pgd(network, label, STEPS), image, label, calls)
    measure(apgd(network, label), image, label, calls)


if __name__ == "__main__":
    main()
