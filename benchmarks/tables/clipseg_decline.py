"""ct_slices_clipseg's README: adapters under attack over eps, and the base under another structure's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import (
    BUNDLES,
    arguments,
    label,
    markdown,
    mean,
    measured,
    publish,
    publish_metrics,
    sentence,
    three,
)

from medrobust.records import CLEAN, Record
from medrobust.statistics import is_foreground, is_missed

BLOCKS = ("clipseg_decline", "clipseg_decline.base", "clipseg_decline.words")
BUNDLE = "ct_slices_clipseg"
SHIPPED = {"adapters": "adapters_mr.safetensors", "PGD-trained adapters": "adapters_mr_adversarial.safetensors"}
ATTACKS = [f"{name} eps={eps}/255" for name in ("fgsm", "pgd steps=10") for eps in (1, 2, 4, 8)]
PROMPTS = {"synonym": "synonym", "typo": "typing error", "wrong": "another structure", "p0": "none"}
STRUCTURES = ("liver", "back muscles", "bones", "aorta")

Found = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by adapters and attack."""


def main() -> None:
    asked = arguments(__doc__)
    overlay = [BUNDLES / BUNDLE / "configs" / "adapters.yaml"]
    found = {
        name: {attack: measured(BUNDLE, attack, weights=file, quick=asked.quick, overlay=overlay) for attack in ATTACKS}
        for name, file in SHIPPED.items()
    }
    asking = ",".join(PROMPTS)
    prompted = measured(BUNDLE, weights=SHIPPED["adapters"], quick=asked.quick, overlay=overlay, prompts=asking)
    base = measured(BUNDLE, quick=asked.quick, prompts="wrong")
    blocks = {BLOCKS[0]: table(found, prompted), BLOCKS[1]: of_base(base), BLOCKS[2]: words(found)}
    publish(blocks, write=asked.write)
    publish_metrics(BUNDLE, {"mean_dice_ct_b": mean(base, CLEAN), **metrics(found)}, write=asked.write)


def table(found: Found, prompted: Sequence[Record]) -> str:
    """A row a condition."""
    names = {CLEAN: "clean", "noise 8/255": "noise 8/255"}
    rows = [[name, *(three(mean(one[ATTACKS[-1]], key)) for one in found.values())] for key, name in names.items()]
    for attack in ATTACKS:
        size = attack.rpartition("=")[2]
        name = f"PGD {size}, 10 steps" if attack.startswith("pgd") else f"FGSM {size}"
        rows.append([name, *(three(mean(one[attack], label(attack))) for one in found.values())])
    empty = [""] * (len(found) - 1)
    for key, name in PROMPTS.items():
        rows.append([f"prompt: {name}", three(mean(prompted, f"prompt {key}", protocol="")), *empty])
    return markdown(("", *found), rows)


def of_base(records: Sequence[Record]) -> str:
    """Dice of each structure when it is asked for, and when another one is; a case is named after its structure."""

    def cell(condition: str, structure: str) -> str:
        ending = f"_{structure.replace(' ', '-')}"
        own = [record for record in records if record.case.endswith(ending)]
        return three(mean(own, condition, protocol="")) if own else ""

    rows = {"own name": CLEAN, "another structure's name": "prompt wrong"}
    return markdown(
        ("Dice", *STRUCTURES), [[name, *(cell(key, one) for one in STRUCTURES)] for name, key in rows.items()]
    )


def words(found: Found) -> str:
    """How many structures each of the adapters misses on clean images."""
    counts = []
    for name, by_attack in found.items():
        rows = [r for r in by_attack[ATTACKS[0]] if (r.condition, r.metric) == (CLEAN, "dice") and is_foreground(r)]
        counts.append(f"{sum(map(is_missed, rows))} of {len(rows)} by the {name}")
    return sentence(f"Structures missed on clean images: {', '.join(counts)}.")


def metrics(found: Found) -> dict[str, float]:
    """What the bundle's metadata say."""
    numbers = {}
    for name, key in zip(SHIPPED, ("mean_dice_mr_d_adapters", "mean_dice_mr_d_adapters_adversarial"), strict=True):
        attack = "pgd steps=10 eps=4/255"
        numbers[key] = mean(found[name][attack], CLEAN)
        numbers[f"{key}_pgd_4_255"] = mean(found[name][attack], label(attack))
    return numbers


if __name__ == "__main__":
    main()
