"""Which rule for the length of a step makes the strongest attack: for every attack, budget and network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import subjects
import torch
from cells import Cells

from medrobust.attacks import BIM, MIFGSM, PGD, SA2, VAFA, CosPGD, SegPGD, SoftDice
from medrobust.attacks.base import Attack
from medrobust.attacks.step_sizes import Schedule
from medrobust.attacks.voxel_losses import CosPGDLoss, SegPGDLoss

RULES: dict[str, tuple[float | str, Schedule]] = {
    "2.5 eps / steps": ("2.5 / steps", "constant"),
    "eps / steps": ("1 / steps", "constant"),
    "eps / 4": (0.25, "constant"),
    "linear from eps / 2": (0.5, "linear"),
    "linear from eps": (1.0, "linear"),
    "linear from 2 eps": (2.0, "linear"),
    "cosine from eps": (1.0, "cosine"),
    "cosine from 2 eps": (2.0, "cosine"),
}
ONLY = {"eps / steps": "MIFGSM", "linear from eps / 2": "VAFA"}
"""Rules that are asked about with one attack only: what was published, or its default before."""
STEPS = (20, 10, 40, 100)
ATTACKS = ("PGD", "CosPGD", "SegPGD", "MIFGSM", "SA2", "VAFA", "BIM")
NORMS = ("linf", "l2")
SEED = 0

Key = tuple[str, str, str, int, str]
"""Network, attack, norm, steps, rule."""


def table(cells: Cells, subject_names: list[str], *, everything: bool = False) -> dict[Key, float]:
    """Mean Dice left, by network, attack, norm, steps and rule; the quickest and most telling cells first.

    Args:
        everything: the whole grid, which takes hours, instead of :func:`_quick`.
    """
    found = {}
    for steps, attack, norm in _order():
        for name in subject_names:
            if not (everything or _quick(name, attack, norm, steps)):
                continue
            for rule in RULES:
                if rule in ONLY and attack != ONLY[rule]:
                    continue
                key = {"subject": name, "attack": attack, "norm": norm, "steps": steps, "rule": rule, "seed": SEED}
                value = cells(key, partial(_dice, name, attack, norm, steps, rule))
                if value is not None:
                    found[name, attack, norm, steps, rule] = value
    return found


def _quick(name: str, attack: str, norm: str, steps: int) -> bool:
    """10 and 20 steps everywhere; 40 on the toys; else PGD in Linf balls, and on the toys MIFGSM and CosPGD."""
    toy = name.startswith("toy")
    if steps <= 20 or (steps == 40 and toy):
        return True
    return norm == "linf" and (attack == "PGD" or (toy and attack in ("MIFGSM", "CosPGD")))


def _order() -> Iterator[tuple[int, str, str]]:
    for steps in STEPS:
        for norm in NORMS:
            for attack in ATTACKS:
                if norm == "linf" or attack not in ("SA2", "VAFA"):
                    yield steps, attack, norm


def _dice(name: str, attack: str, norm: str, steps: int, rule: str) -> float:
    subject = subjects.load(name)
    made = make(subject, attack, norm, steps, rule)
    image_adv = made(subject.model, subject.image, subject.label, generator=torch.Generator().manual_seed(SEED))
    return round(subject.dice(image_adv).mean().item(), 4)


def make(subject: subjects.Subject, attack: str, norm: str, steps: int, rule: str) -> Attack:
    """The attack with a rule's steps; the unit is rho for SA2, and for VAFA q_max / 2, what a coefficient may move."""
    size, schedule = RULES[rule]
    share = size if isinstance(size, float) else float(size.partition(" / ")[0]) / steps
    soft: dict[str, Any] = {"objective": SoftDice(head=subject.head), "steps": steps, "schedule": schedule}
    if attack == "SA2":
        return SA2(
            rho=0.2, step_size=0.2 * share, block_size=(*subject.block[:2], 16)[: max(2, len(subject.block))], **soft
        )
    if attack == "VAFA":
        q_max = 2 * 255 * subject.eps
        return VAFA(q_max=q_max, step_size=q_max / 2 * share, block_size=subject.block, ssim_weight=0.0, **soft)
    eps = subject.eps if norm == "linf" else subject.eps_l2
    losses = {"CosPGD": CosPGDLoss(head=subject.head), "SegPGD": SegPGDLoss(head=subject.head)}
    cls: Any = {"PGD": PGD, "BIM": BIM, "SegPGD": SegPGD, "CosPGD": CosPGD, "MIFGSM": MIFGSM}[attack]
    return cls(
        eps=eps, norm=norm, step_size=eps * share, **{**soft, "objective": losses.get(attack, soft["objective"])}
    )
