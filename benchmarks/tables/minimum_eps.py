"""docs/attacks.md: the smallest eps on the shipped 3-D networks, one window of CT B, as a whole and by structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import arguments, markdown, publish, sentence
from strength import of_benchmarks

from medrobust.attacks import APGD, MissedForeground
from medrobust.minimum_eps import MinimumEps

BLOCKS = ("minimum_eps",)
STRUCTURES = ("liver", "aorta", "bones", "back muscles")
NETWORKS = {"UNETR": "clean training", "UNETR, VAFT": "VAFT"}


def main() -> None:
    asked = arguments(__doc__)
    subjects: Any = of_benchmarks("subjects")
    by_dice = MinimumEps(attack=APGD(steps=1 if asked.quick else 15), below=0.5, walk=1 if asked.quick else 100)
    searches = [
        by_dice,
        *(by_dice.of_structure(index + 1) for index in range(len(STRUCTURES))),
        replace(by_dice, below=0.1, criterion=MissedForeground()),
    ]
    rows = []
    for network, training in NETWORKS.items():
        one = subjects.load(network)
        found = [search(one.model, one.image, one.label).eps.item() for search in searches]
        rows.append([training, *(f"{255 * eps:.2f}" for eps in found)])
    table = markdown(("eps, /255", "all", *STRUCTURES, "all, by recall"), rows)
    words = sentence(
        """For the shipped 3-D networks on one window of CT B: the eps that brings mean Dice, or that of one structure,
        under 0.5, and the one that leaves less than a tenth of the foreground right (`apgd steps=15`; 0 where the clean
        image is under it)."""
    )
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


if __name__ == "__main__":
    main()
