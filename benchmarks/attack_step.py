"""One PGD step on UNETR: gradients of the image only, against gradients of everything."""

from __future__ import annotations

import statistics
import time

import torch
from monai.networks.nets import UNETR

from medrobust.attacks import PGD, DiceCE
from medrobust.attacks.base import frozen

REPEATS = 3
EPS, STEP = 8 / 255, 1 / 255


def published_step(network: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> None:
    """``loss.backward()``: the gradients of all parameters are computed and thrown away."""
    adversarial = image.clone().requires_grad_()
    DiceCE()(network(adversarial), label).sum().backward()
    assert adversarial.grad is not None
    (adversarial + STEP * adversarial.grad.sign()).clamp(0, 1)


def our_step(network: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> None:
    attack = PGD(eps=EPS, steps=1, step_size=STEP, random_start=False, keep_best=False, objective=DiceCE())
    attack(network, image, label)


def main() -> None:
    network = UNETR(1, 14, (64, 64, 64), feature_size=16, hidden_size=768, mlp_dim=3072, num_heads=12).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 64, 64, 64, generator=generator)
    label = torch.randint(0, 14, (1, 1, 64, 64, 64), generator=generator)
    seconds: dict[str, list[float]] = {"published": [], "ours": []}
    with frozen(network):
        our_step(network, image, label)  # warm up
    for _ in range(REPEATS):  # interleaved, so that a busy machine slows both
        for name, step in (("published", published_step), ("ours", our_step)):
            start = time.perf_counter()
            step(network, image, label)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<10} {value:6.2f} s  {value / medians['published']:5.2f} x published")


if __name__ == "__main__":
    main()
