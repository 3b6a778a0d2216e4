"""Make one perturbation that fools a model on all images of a kind; :class:`medrobust.attacks.Universal` applies it.

Stochastic ascent of the mean objective over cases (Shafahi et al., AAAI 2020, 1811.11304): the sign of the mean
gradient of a few cases, a step, the ball's projection. An earlier form solves a small attack in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medrobust.atomic import replacing
from medrobust.attacks.base import Model, frozen
from medrobust.attacks.objectives import Objective, SoftDice
from medrobust.attacks.universal import resized
from medrobust.bundle import Bundle
from medrobust.inferers import bind


@dataclass(frozen=True)
class Case:
    """What one image contributes: its model (bound to its prompt, if any), image (1, C, *S) and label (1, 1, *S)."""

    model: Model
    image: Tensor
    label: Tensor


def read(bundle: Bundle, cases: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Cases of a bundle, preprocessed as for its evaluation, each with the model bound to its own prompt.

    Raises:
        ValueError: a case has no label.
    """
    found = []
    for paths in cases:
        data = bundle.preprocessing(dict(paths))
        if "label" not in data:
            raise ValueError(f"expected a label for {Path(str(paths['image'])).name}, got none")
        given = {key: data[key][None].to(bundle.device) for key in bundle.arguments}
        image, label = (data[key].as_subclass(Tensor)[None].to(bundle.device) for key in ("image", "label"))
        found.append(Case(bind(bundle.network, bundle.inferer, **given), image.float(), label.long()))
    return found


def fit(
    cases: Sequence[Case],
    size: Sequence[int],
    *,
    eps: float,
    epochs: int = 10,
    batch: int = 4,
    step_size: float | None = None,
    objective: Objective | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] = lambda epoch, score: None,
) -> Tensor:
    """The perturbation (C, *size) of the highest mean objective over the cases, among those after each epoch.

    Args:
        cases: what it is made from. Evaluate it on others.
        size: its spatial size; images of other sizes get it resized.
        eps: largest change of a voxel, intensities in [0, 1].
        epochs: passes over the cases, in an order drawn anew.
        batch: cases whose gradients are averaged before a step.
        step_size: of the first epoch, shrinking linearly to a tenth; ``None`` is ``eps``.
        objective: what is maximised; ``None`` is the soft Dice.
        generator: source of chance; ``None`` is a fresh one with seed 0.
        progress: called after each epoch with its number and the mean objective.

    Raises:
        ValueError: no cases, or settings out of range.
    """
    if not cases or not eps > 0 or epochs < 1 or batch < 1:
        raise ValueError(
            "expected cases, eps above 0, epochs and batch of at least 1, got "
            f"{len(cases)} cases, {eps}, {epochs} and {batch}"
        )
    objective = objective or SoftDice()
    generator = generator or torch.Generator().manual_seed(0)
    channels = cases[0].image.shape[1]
    delta = torch.zeros(1, channels, *size)
    best, best_score = delta.clone(), -torch.inf
    if step_size is None:
        step_size = eps
    for epoch in range(epochs):
        step = step_size * (1 - 0.9 * epoch / max(epochs - 1, 1))
        order = torch.randperm(len(cases), generator=generator).tolist()
        for start in range(0, len(order), batch):
            gradient = sum(_gradient(cases[number], delta, objective) for number in order[start : start + batch])
            delta = (delta + step * torch.as_tensor(gradient).sign()).clamp(-eps, eps)
        score = mean_score(cases, delta, objective)
        progress(epoch, score)
        if score > best_score:
            best, best_score = delta.clone(), score
    return best[0]


def mean_score(cases: Sequence[Case], delta: Tensor, objective: Objective) -> float:
    """The mean objective over cases with ``delta`` (1, C, *s) added."""
    total = 0.0
    for case in cases:
        with frozen(case.model), torch.no_grad():
            total += objective(case.model(_added(case.image, delta)), case.label).item()
    return total / len(cases)


def save(delta: Tensor, path: str | Path, *, eps: float) -> None:
    """Write a perturbation (C, *s) and its budget, whole or not at all."""
    with replacing(path) as partial:
        torch.save({"delta": delta.detach().cpu(), "eps": float(eps)}, partial)


def _gradient(case: Case, delta: Tensor, objective: Objective) -> Tensor:
    with frozen(case.model), torch.enable_grad():
        variable = delta.clone().requires_grad_()
        score = objective(case.model(_added(case.image, variable)), case.label).sum()
        (gradient,) = torch.autograd.grad(score, variable)
    return gradient


def _added(image: Tensor, delta: Tensor) -> Tensor:
    return (image + resized(delta.to(image), image)).clamp(0, 1)
