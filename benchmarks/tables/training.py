"""docs/training.md: clean training beside VAFT under all attacks; also what ct_organs_unetr says of VAFA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common import arguments, label, markdown, mean, measured, publish, publish_metrics, sentence, three

from medrobust.records import CLEAN, Record

BLOCKS = ("training", "training.structures", "training.vafa", "training.bundle")
BUNDLE = "ct_organs_unetr"
WEIGHTS = {"clean training": "model.pt", "VAFT": "vaft.pt"}
NOISE = "noise 8/255"
PGD = "pgd eps=8/255"
VAFA = "vafa q_max=20 block_size=32,32,16"
ATTACKS = (
    "gaussian_noise std=8/255",
    "fgsm eps=8/255",
    "bim eps=8/255",
    "mifgsm eps=8/255",
    PGD,
    "segpgd eps=8/255",
    "cospgd eps=8/255",
    "apgd eps=8/255 steps=20",
    "sa2 block_size=16,16,16",
    "vafa2d q_max=20",
    VAFA,
)
STRUCTURES = ("liver", "aorta", "bones", "back muscles")

Found = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by weights and attack."""


def main() -> None:
    asked = arguments(__doc__)
    # By attack, then by weights: a run that is stopped leaves whole rows.
    by_attack = {
        attack: {name: measured(BUNDLE, attack, weights=file, quick=asked.quick) for name, file in WEIGHTS.items()}
        for attack in ATTACKS
    }
    found = {name: {attack: by_attack[attack][name] for attack in ATTACKS} for name in WEIGHTS}
    blocks = {
        BLOCKS[0]: table(found),
        BLOCKS[1]: structures(found),
        BLOCKS[2]: under_vafa(found),
        BLOCKS[3]: bundle(found),
    }
    publish(blocks, write=asked.write)
    clean, vafa = by_name(found, CLEAN), by_name(found, VAFA)
    metrics = {
        "mean_dice_ct_b": clean[0],
        "mean_dice_ct_b_vafa": vafa[0],
        "mean_dice_ct_b_vaft": clean[1],
        "mean_dice_ct_b_vaft_vafa": vafa[1],
    }
    publish_metrics(BUNDLE, metrics, write=asked.write)


def by_name(found: Found, attack: str, structure: str = "") -> list[float]:
    """Dice of each training under an attack, or clean, or under noise."""
    if attack in (CLEAN, NOISE):
        return [mean(records[PGD], attack, structure=structure) for records in found.values()]
    return [mean(records[attack], label(attack), structure=structure) for records in found.values()]


def table(found: Found) -> str:
    """A row an attack."""
    names = {CLEAN: "clean", ATTACKS[0]: f"`{ATTACKS[0]}`", NOISE: "`random_noise eps=8/255`, the control"}
    names |= {attack: f"`{attack}`" for attack in ATTACKS[1:]}
    return markdown(("", *found), [[name, *map(three, by_name(found, attack))] for attack, name in names.items()])


def structures(found: Found) -> str:
    """What each structure keeps, clean and under VAFA."""
    head = ["", *(f"{name}, {state}" for name in found for state in ("clean", "under VAFA"))]
    rows = []
    for structure in STRUCTURES:
        clean, vafa = by_name(found, CLEAN, structure), by_name(found, VAFA, structure)
        rows.append([structure, *(three(value) for pair in zip(clean, vafa, strict=True) for value in pair)])
    return markdown(head, rows)


def under_vafa(found: Found) -> str:
    """What VAFT gains, and how far a voxel moves."""
    plain, hardened = by_name(found, VAFA)
    moved = [rms(found, attack) for attack in (PGD, VAFA)]
    return sentence(
        f"""Under VAFA, VAFT keeps {hardened:.3f} where clean training keeps {plain:.3f}, a gain of
        {hardened - plain:.3f}. PGD moves a voxel of the hardened network's image by {moved[0]:.1f}/255 in root mean
        square, VAFA by {moved[1]:.1f}/255."""
    )


def rms(found: Found, attack: str) -> float:
    """How far the attack moves a voxel of the hardened network's image, in 1/255."""
    return float(255 * 10 ** (-mean(found["VAFT"][attack], label(attack), "psnr") / 20))


def bundle(found: Found) -> str:
    """The sentence in the bundle's README."""
    clean, vafa = by_name(found, CLEAN), by_name(found, VAFA)
    return sentence(
        f"""Dice of `vaft.pt` on CT B is {clean[1]:.3f} clean and {vafa[1]:.3f} under VAFA (`q_max` 20, 20 steps, blocks
        of 32 x 32 x 16), where `model.pt` has {clean[0]:.3f} and {vafa[0]:.3f}."""
    )


if __name__ == "__main__":
    main()
