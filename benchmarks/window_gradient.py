"""Peak memory and time of the input gradient: one window, a whole volume window by window, a whole volume by autograd.

Each measurement is a process of its own, because the peak of a process never falls. Memory is the growth of the peak
resident size over the point where network and volume are in memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR

from medrobust.attacks import SoftDice
from medrobust.attacks.base import frozen
from medrobust.inferers import bind


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mode: str, volume: int, window: int, small: bool) -> None:
    size = {"feature_size": 8, "hidden_size": 192, "mlp_dim": 768, "num_heads": 6} if small else {}
    network = UNETR(1, 14, (window,) * 3, **size)
    inferer = SlidingWindowInferer((window,) * 3, sw_batch_size=1, overlap=0.5, mode="gaussian")
    side = window if mode == "one window" else volume
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, side, side, side, generator=generator).requires_grad_()
    label = torch.randint(0, 14, (1, 1, side, side, side), generator=generator)
    with frozen(network):
        model = bind(network, inferer) if mode != "full autograd" else lambda x: inferer(x, network)
        before, start = peak_mib(), time.perf_counter()
        torch.autograd.grad(SoftDice()(model(image), label).sum(), image)
    print(f"{peak_mib() - before:.0f} {time.perf_counter() - start:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=int, default=128)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--small", action="store_true", help="a small UNETR, so that full autograd fits")
    parser.add_argument("--mode", help="measure this one only, in this process")
    options = parser.parse_args()
    if options.mode:
        measure(options.mode, options.volume, options.window, options.small)
        return
    modes = ["one window", "window by window"] + (["full autograd"] if options.small else [])
    first = 0.0
    for mode in modes:
        words = ["--mode", mode, "--volume", str(options.volume), "--window", str(options.window)]
        done = subprocess.run(
            [sys.executable, __file__, *words, *(["--small"] if options.small else [])],
            capture_output=True,
            text=True,
            check=True,
        )
        memory, seconds = map(float, done.stdout.split())
        first = first or memory
        print(f"{mode:<18} {memory:7.0f} MiB  {memory / first:5.2f} x one window  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
