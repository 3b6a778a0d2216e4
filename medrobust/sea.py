"""SEA, the segmentation ensemble attack (Croce et al., ECCV 2024, 2306.12941): several APGD, the worst for each case.

=========== ==================================================================== ==================================
preset      members                                                              what it is for
=========== ==================================================================== ==================================
``sea``     by budget, of MCE-Dice, soft Dice, JS, MCE, CosPGD                   medicine: judged by Dice
``sea-v1``  MCE, SegPGD, JS, masked spherical                                    the first publication, by accuracy
``sea-v2``  MCE balanced, MCE, JS                                                the ECCV publication, by accuracy
=========== ==================================================================== ==================================

The published presets keep the public code's quirks (:class:`medrobust.attacks.apgd.APGD`, ``as_published``) but not its
faults: v1's fourth member never ran, because its tracking loss had been deleted; here it tracks the unmasked form, as
the paper says.

An ensemble is evaluated as a list of conditions; its worst case is read from the records
(:mod:`medrobust.ensembles`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medrobust.attacks.apgd import APGD
from medrobust.attacks.base import Attack, Model, frozen
from medrobust.attacks.objectives import CrossEntropy, Head, SoftDice
from medrobust.attacks.scores import VoxelError
from medrobust.attacks.threat import Eps
from medrobust.attacks.voxel_losses import (
    BalancedMaskedCE,
    CosPGDLoss,
    JensenShannon,
    MaskedCE,
    MaskedSpherical,
    MCEDice,
    SegPGDLoss,
)
from medrobust.budgets import PRESETS

__all__ = ["BUDGETS", "PRESETS", "gradient_seconds", "gradients", "members", "seconds"]

BUDGETS: dict[str, tuple[int, int, bool]] = {"fast": (2, 40, False), "standard": (3, 100, True), "full": (5, 300, True)}
"""Members of ``sea``, their steps, and whether the radius shrinks in three stages.

Below 100 steps nearly every step of a stage is a checkpoint, so ``fast`` keeps one radius.
"""


def members(
    preset: str = "sea",
    *,
    eps: Eps = 8 / 255,
    budget: str = "standard",
    head: Head = "softmax",
    weights: tuple[float, ...] | None = None,
) -> dict[str, Attack]:
    """The attacks of an ensemble by the names that records call them.

    Args:
        preset: see above.
        eps: radius of the Linf ball.
        budget: of ``sea``: ``fast``, ``standard`` or ``full``; the published ones always take 300 steps a member.
        head: how the model's channels are read.
        weights: of the classes, for ``sea-v2``'s balanced loss; ``None`` is the case's own balance. The published
            numbers are inverse pixel counts of the training set.

    Raises:
        ValueError: unknown preset or budget, or ``sea-v1`` for sigmoid channels, where one of its losses is undefined.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {preset!r}")
    if budget not in BUDGETS:
        raise ValueError(f"expected a budget among {', '.join(BUDGETS)}, got {budget!r}")
    ce: dict[str, Any] = {"MCE": MaskedCE(head=head)}
    js: dict[str, Any] = {"JS": JensenShannon(head=head)}
    if preset == "sea":
        count, steps, progressive = BUDGETS[budget]
        losses = {
            "MCE-Dice": MCEDice(head=head),
            "Dice": SoftDice(head=head),
            **js,
            **ce,
            "CosPGD": CosPGDLoss(head=head),
        }
        chosen = dict(list(losses.items())[:count])
        base = APGD(eps=eps, steps=steps, progressive=progressive)
        return {f"SEA {name}": replace(base, objective=loss) for name, loss in chosen.items()}
    base = APGD(
        eps=eps,
        steps=300,
        progressive=True,
        track=CrossEntropy(head=head),
        criterion=VoxelError(head=head, of_all=True),
        as_published=True,
    )
    if preset == "sea-v1":
        if head == "sigmoid":
            raise ValueError(
                "expected a softmax head for sea-v1, got sigmoid channels: its spherical loss has no such form"
            )
        found = {**ce, "SegPGD": SegPGDLoss(head=head), **js}
        named = {f"SEA-v1 {name}": replace(base, objective=loss) for name, loss in found.items()}
        spherical = replace(base, objective=MaskedSpherical(), track=MaskedSpherical(masked=False))
        return {**named, "SEA-v1 spherical": spherical}
    found = {"MCE balanced": BalancedMaskedCE(head=head, weights=weights), **ce, **js}
    return {f"SEA-v2 {name}": replace(base, objective=loss) for name, loss in found.items()}


def gradients(attacks: Sequence[Attack]) -> int:
    """How often the attacks take the gradient of a case, all together."""
    return sum(int(getattr(attack, "steps", 1)) * int(getattr(attack, "restarts", 1)) for attack in attacks)


def seconds(attacks: Mapping[str, Attack], model: Model, image: Tensor, label: Tensor, cases: int) -> float:
    """An estimate of what the attacks will take: the time of one gradient, times their number.

    Args:
        image: (1, C, *S), a case of the usual size.
        label: (1, 1, *S).
        cases: how many.
    """
    one = gradient_seconds(next(iter(attacks.values())), model, image, label)
    return one * gradients(list(attacks.values())) * cases


def gradient_seconds(attack: Attack, model: Model, image: Tensor, label: Tensor) -> float:
    """What one gradient of the attack's objective takes; the first one, which warms up, is not counted."""
    one = 0.0
    with frozen(model), torch.enable_grad():
        for _ in range(2):
            start = time.perf_counter()
            _, gradient = attack.gradient(model, image, label)
            gradient.flatten()[0].item()  # waits for a device that computes on its own
            one = time.perf_counter() - start
    return one
