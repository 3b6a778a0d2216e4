"""Every other default, one setting changed at a time: what each attack leaves of Dice at equal cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import subjects
import torch
from cells import Cells

from medrobust.attacks import APGD, MIFGSM, PGD, SA2, VAFA, CosPGD, CrossEntropy, DiceCE, HardDice, SoftDice, Square
from medrobust.attacks.base import Attack
from medrobust.attacks.voxel_losses import CosPGDLoss, JensenShannon, MaskedCE, MCEDice

SEED = 0
STEPS = 20
QUERIES = 200


def variants(subject: subjects.Subject) -> Iterator[tuple[str, str, Attack]]:
    """Attack, what differs from its defaults, and the attack itself; the default comes first."""
    head: Any = subject.head
    soft = SoftDice(head=head)
    settings: dict[str, Any] = {"eps": subject.eps, "steps": STEPS, "objective": soft}
    volumetric = subject.image.ndim == 5

    pgd = PGD(**settings)
    yield "PGD", "default", pgd
    yield "PGD", "random_start=False", replace(pgd, random_start=False)
    yield "PGD", "keep_best=False", replace(pgd, keep_best=False)
    yield "PGD", "steps=10 restarts=2", replace(pgd, steps=STEPS // 2, restarts=2)
    for loss in (CrossEntropy, DiceCE, MCEDice, MaskedCE, JensenShannon, CosPGDLoss):
        yield "PGD", f"objective={loss.__name__}", replace(pgd, objective=loss(head=head))
    background = SoftDice(head=head, include_background=True)
    yield "PGD", "objective=SoftDice with background", replace(pgd, objective=background)

    apgd = APGD(**settings)
    yield "APGD", "default", apgd
    yield "APGD", "random_start=False", replace(apgd, random_start=False)
    yield "APGD", "progressive", replace(apgd, progressive=True)
    yield "APGD", "criterion=SoftDice", replace(apgd, criterion=soft)

    cos = CosPGD(**{**settings, "objective": CosPGDLoss(head=head)})
    yield "CosPGD", "default", cos
    yield "CosPGD", "random_start=False", replace(cos, random_start=False)

    momentum = MIFGSM(**settings)
    yield "MIFGSM", "default", momentum
    for decay in (0.0, 0.5, 0.9):
        yield "MIFGSM", f"decay={decay:g}", replace(momentum, decay=decay)

    sa2 = SA2(rho=0.2, steps=STEPS, objective=soft)
    yield "SA2", "default", sa2
    yield "SA2", "random_start=False", replace(sa2, random_start=False)
    yield "SA2", "ssim_weight=1", replace(sa2, ssim_weight=1.0)
    for n in (8, 32):
        yield "SA2", f"block_size={n}", replace(sa2, block_size=(n, n, n))

    dims = 3 if volumetric else 2
    vafa = VAFA(q_max=2 * 255 * subject.eps, steps=STEPS, objective=soft, block_size=(32,) * dims)
    yield "VAFA", "default", vafa
    yield "VAFA", "ssim_weight=1", replace(vafa, ssim_weight=1.0)
    yield "VAFA", "q_init=q_max", replace(vafa, q_init=vafa.q_max)
    for n in (8, 16):
        yield "VAFA", f"block_size={n}", replace(vafa, block_size=(n,) * dims)

    square = Square(eps=subject.eps, queries=QUERIES, objective=soft)
    yield "Square", "default", square
    for p in (0.05, 0.2, 0.4):
        yield "Square", f"p_init={p:g}", replace(square, p_init=p)
    yield "Square", "objective=HardDice", replace(square, objective=HardDice(head=head))


def measure(cells: Cells, names: list[str]) -> dict[tuple[str, str], dict[str, float]]:
    """Mean Dice left, by attack and what differs, by network."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in names:
        subject = subjects.load(name)
        for attack, differs, made in variants(subject):
            key = {"subject": name, "attack": attack, "differs": differs, "seed": SEED, "settings": repr(made)}
            value = cells(key, partial(_dice, subject, made))
            if value is not None:
                found.setdefault((attack, differs), {})[name] = value
    return found


def _dice(subject: subjects.Subject, attack: Attack) -> float:
    generator = torch.Generator().manual_seed(SEED)
    image_adv = attack(subject.model, subject.image, subject.label, generator=generator)
    return round(subject.dice(image_adv).mean().item(), 4)
