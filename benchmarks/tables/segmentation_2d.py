"""docs/segmentation-2d.md: three trainings of a small UPerNet. What is not shipped is trained here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common import arguments, label, markdown, mean, measured, publish, publish_metrics, three, trained

from medrobust.ensembles import ensembles
from medrobust.records import CLEAN, Record

BLOCKS = ("segmentation_2d", "segmentation_2d.structures")
BUNDLE = "ct_slices_upernet"
PGD, SEA = "pgd eps=4/255 steps=20", "sea eps=4/255 budget=fast"
STRUCTURES = ("liver", "aorta", "bones", "back muscles")
EPOCHS = {"clean": 24, "adversarial, from chance": 24, "adversarial, from a robust backbone": 16}

Found = Mapping[str, Mapping[str, list[Record]]]
"""Records by training and attack."""


def main() -> None:
    asked = arguments(__doc__)
    weights = ("model.pt", from_chance(quick=asked.quick), "robust.pt")
    found = {
        name: {attack: measured(BUNDLE, attack, weights=given, quick=asked.quick) for attack in (PGD, SEA)}
        for name, given in zip(EPOCHS, weights, strict=True)
    }
    publish({BLOCKS[0]: table(found), BLOCKS[1]: structures(found)}, write=asked.write)
    clean, *_, robust = (found[name][PGD] for name in EPOCHS)
    key = "mean_dice_ct_b_every_4th_slice"
    metrics = {
        key: mean(clean, CLEAN),
        f"{key}_robust": mean(robust, CLEAN),
        f"{key}_robust_pgd_4_255": mean(robust, label(PGD)),
    }
    publish_metrics(BUNDLE, metrics, write=asked.write)


def from_chance(*, quick: bool) -> Path:
    """Adversarial training from chance, by the bundle's own overlay."""
    return trained(
        BUNDLE, ["train.yaml", "train_adversarial.yaml"], gives="model.pt", quick=quick, cpu_precision="bf16"
    )


def table(found: Found) -> str:
    """A row a training."""
    rows = []
    for name, records in found.items():
        (sea,) = ensembles(records[SEA])
        values = [mean(records[PGD], one) for one in (CLEAN, "noise 4/255", label(PGD))]
        values.append(sum(sea.dice.values()) / len(sea.dice))
        rows.append([name, str(EPOCHS[name]), *map(three, values)])
    return markdown(("training", "epochs", "clean", "noise 4/255", "PGD-20", "SEA fast"), rows)


def structures(found: Found) -> str:
    """Dice clean and under PGD of each structure."""

    def cell(records: list[Record], structure: str) -> str:
        return ", ".join(f"{mean(records, name, structure=structure):.2f}" for name in (CLEAN, label(PGD)))

    rows = [[name, *(cell(records[PGD], one) for one in STRUCTURES)] for name, records in found.items()]
    return markdown(("training", *STRUCTURES), rows)


if __name__ == "__main__":
    main()
