"""What `MIFGSM`'s momentum is for: images made on one network and shown to another, by decay."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import subjects
import torch
from cells import Cells

from medrobust.attacks import MIFGSM, SoftDice

SEED = 0
STEPS = (10, 20)
DECAYS = (1.0, 0.9, 0.5, 0.0)
PAIRS = (("UNETR", "UNETR, VAFT"), ("UNETR, VAFT", "UNETR"), ("UPerNet", "UPerNet, PIR-AT"))
"""Networks with one and the same case: attacked, and then shown the result."""

Key = tuple[str, str, int, float]
"""Network attacked, network shown, steps, decay."""


def measure(cells: Cells, names: list[str]) -> dict[Key, float]:
    """Mean Dice that the second network keeps; the eps is the first one's."""
    found: dict[Key, float] = {}
    for source, target in PAIRS:
        if source not in names or target not in names:
            continue
        subject = subjects.load(source)
        head: Any = subject.head
        for steps in STEPS:
            for decay in DECAYS:
                attack = MIFGSM(eps=subject.eps, steps=steps, decay=decay, objective=SoftDice(head=head))
                key = {"subject": source, "shown": target, "seed": SEED, "settings": repr(attack)}
                value = cells(key, partial(_dice, subject, target, attack))
                if value is not None:
                    found[source, target, steps, decay] = value
    return found


def _dice(subject: subjects.Subject, target: str, attack: MIFGSM) -> float:
    generator = torch.Generator().manual_seed(SEED)
    image_adv = attack(subject.model, subject.image, subject.label, generator=generator)
    other = replace(subject, model=subjects.load(target).model)
    return round(other.dice(image_adv).mean().item(), 4)
