"""docs/attacks.md: the smallest eps on the shipped 3-D networks, one window of CT B."""

from __future__ import annotations

from typing import Any

from common import arguments, markdown, publish, sentence, three
from strength import of_benchmarks

from medrobust.attacks import APGD
from medrobust.data.ct_organs import CLASSES
from medrobust.minimum_eps import MinimumEps

BLOCKS = ("minimum_eps",)
NETWORKS = {"UNETR": "clean training", "UNETR, VAFT": "VAFT"}


def main() -> None:
    asked = arguments(__doc__)
    subjects: Any = of_benchmarks("subjects")
    search = MinimumEps(attack=APGD(steps=10), rounds=3, walk=100)
    if asked.quick:
        search = MinimumEps(attack=APGD(steps=1), rounds=1, walk=1)
    rows = []
    for network, training in NETWORKS.items():
        one = subjects.load(network)
        searches = [search, *(search.of_structure(index) for index in range(1, len(CLASSES)))]
        rows.append([training, three(one.dice(one.image).item()), *(found(one, made) for made in searches)])
    words = sentence(
        """The smallest eps found, in 1/255, for the shipped 3-D networks on one window of CT B, for all structures
        together and for each alone (`MinimumEps(attack=APGD(steps=10), rounds=3, walk=100)`, Dice below 0.5; 0 is a
        structure whose clean Dice is that low):"""
    )
    table = markdown(("training", "clean Dice", "mean over structures", *CLASSES[1:]), rows)
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


def found(one: Any, search: MinimumEps) -> str:
    """In 1/255."""
    return f"{255 * search(one.model, one.image, one.label).eps.item():.2f}"


if __name__ == "__main__":
    main()
