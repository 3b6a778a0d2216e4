"""docs/attacks.md: the smallest eps on the shipped 3-D networks, one window of CT B."""

from __future__ import annotations

from typing import Any

from common import arguments, markdown, publish, sentence, three
from strength import of_benchmarks

from medrobust.attacks import APGD
from medrobust.minimum_eps import MinimumEps

BLOCKS = ("minimum_eps",)
NETWORKS = {"UNETR": "clean training", "UNETR, VAFT": "VAFT"}


def main() -> None:
    asked = arguments(__doc__)
    subjects: Any = of_benchmarks("subjects")
    quick = bool(asked.quick)
    search = MinimumEps(attack=APGD(steps=1 if quick else 10), below=0.5, rounds=5, walk=1 if quick else 50)
    rows = []
    for network, training in NETWORKS.items():
        one = subjects.load(network)
        eps = search(one.model, one.image, one.label).eps.item()
        rows.append([training, three(one.dice(one.image).item()), f"{255 * eps:.2f}/255"])
    words = sentence(
        """The smallest eps found for the shipped 3-D networks on one window of CT B (`MinimumEps(attack=APGD(steps=10),
        rounds=5, walk=50)`):"""
    )
    table = markdown(("training", "clean Dice", "eps for a Dice below 0.5"), rows)
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


if __name__ == "__main__":
    main()
