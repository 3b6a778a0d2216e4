"""Which few attacks make the strongest ensemble: many candidates of 100 gradients, and every case under each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import subjects
import torch
from cells import Cells

from medrobust.attacks import APGD, MIFGSM, PGD, CosPGD, CrossEntropy, SegPGD, SoftDice, Standard
from medrobust.attacks.base import Attack
from medrobust.attacks.voxel_losses import (
    BalancedMaskedCE,
    CosPGDLoss,
    JensenShannon,
    MaskedCE,
    MaskedMargin,
    MCEDice,
    SegPGDLoss,
)

SEED = 0
STANDARD = "Standard"
ENSEMBLE = ("APGD soft Dice", "APGD soft Dice, progressive", "APGD CosPGD")
"""Its members that take gradients, by the names of the candidates."""
GRADIENTS = 100
"""Of a candidate; the long ones, which only say how far one could get, take more."""
LOSSES: dict[str, Any] = {
    "soft Dice": SoftDice,
    "MCE-Dice": MCEDice,
    "MCE": MaskedCE,
    "JS": JensenShannon,
    "margin": MaskedMargin,
    "CosPGD": CosPGDLoss,
    "CE": CrossEntropy,
    "MCE balanced": BalancedMaskedCE,
}


def candidates(subject: subjects.Subject) -> dict[str, Attack]:
    """By name; 100 gradients each."""
    base = APGD(eps=subject.eps, steps=GRADIENTS)
    head = subject.head
    found: dict[str, Attack] = {
        f"APGD {name}": replace(base, objective=loss(head=head)) for name, loss in LOSSES.items()
    }
    for name in ("soft Dice", "MCE-Dice"):
        found[f"APGD {name}, progressive"] = replace(base, objective=LOSSES[name](head=head), progressive=True)
    settings: dict[str, Any] = {"eps": subject.eps, "steps": GRADIENTS}
    soft = SoftDice(head=head)
    found |= {
        "PGD": PGD(objective=soft, **settings),
        "PGD, 5 x 20": PGD(eps=subject.eps, steps=20, restarts=5, objective=soft),
        "CosPGD": CosPGD(objective=CosPGDLoss(head=head), **settings),
        "SegPGD": SegPGD(objective=SegPGDLoss(head=head), **settings),
        "MIFGSM": MIFGSM(objective=soft, **settings),
        "PGD MCE-Dice": PGD(objective=MCEDice(head=head), **settings),
        "APGD soft Dice, 2 x 50": replace(base, objective=soft, steps=50, restarts=2),
    }
    return found


def long(subject: subjects.Subject) -> dict[str, Attack]:
    """Attacks of 300 gradients: what a patient attacker reaches with one of them, and the ensemble."""
    base = APGD(eps=subject.eps, steps=300, progressive=True)
    head = subject.head
    return {
        "APGD soft Dice, progressive, 300": replace(base, objective=SoftDice(head=head)),
        STANDARD: Standard(eps=subject.eps, objective=SoftDice(head=head)),
    }


def measure(cells: Cells, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Dice of every case, by network and attack; the standard ensemble's members among them."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for makers in (long, candidates):
        for name in names:
            subject = subjects.load(name)
            for label, attack in makers(subject).items():
                settings = repr((attack, attack.members) if isinstance(attack, Standard) else attack)
                key = {"subject": name, "attack": label, "seed": SEED, "settings": settings}
                values = cells(key, partial(_dice, subject, attack))
                if values is not None:
                    found[name][label] = values
    return found


def text(found: dict[str, dict[str, list[float]]]) -> str:
    """The ensemble beside its members, the best single attack, and the worst of everything, as Markdown."""
    names = [name for name, by_attack in found.items() if STANDARD in by_attack]
    rows = {STANDARD: [found[name][STANDARD] for name in names]}
    singles = {name: _mean_of(found[name]) for name in names}
    for label in ENSEMBLE:
        rows[f"its member {label}"] = [found[name].get(label, []) for name in names]
    lines = [[label, *("" if not values else f"{_mean(values):.3f}" for values in row)] for label, row in rows.items()]
    best = [min((value, label) for label, value in singles[name].items() if label != STANDARD) for name in names]
    lines.append(["best other attack", *(f"{value:.3f} ({label})" for value, label in best)])
    worst = [_mean([min(values) for values in zip(*found[name].values(), strict=True)]) for name in names]
    count = max((len(found[name]) for name in names), default=0)
    lines.append([f"worst of all {count}, case by case", *(f"{value:.3f}" for value in worst)])
    table = [["Dice left", *names], ["---"] * (len(names) + 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_of(by_attack: dict[str, list[float]]) -> dict[str, float]:
    return {label: _mean(values) for label, values in by_attack.items()}


def _dice(subject: subjects.Subject, attack: Attack) -> list[float]:
    generator = torch.Generator().manual_seed(SEED)
    image_adv = attack(subject.model, subject.image, subject.label, generator=generator)
    return [round(value, 4) for value in subject.dice(image_adv).tolist()]
