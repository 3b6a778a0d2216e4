"""What can be wrong with a training, found before it starts or at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.transforms import LoadImage

from medrobust.attacks.base import Attack
from medrobust.data import splits
from medrobust.handlers import where
from medrobust.schedules import attacks_of
from medrobust.training.logs import losses


def check(
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    *,
    num_classes: int | None = None,
    attack: Any = None,
    roi_size: Sequence[int] | None = None,
    by: str = "patient",
    label_key: str = "label",
    keys: Sequence[str] = ("image", "label"),
) -> None:
    """Refuse a training that would fail late or mean nothing.

    Args:
        training, validation: data lists; files must exist and no patient may be in both.
        num_classes: also read every label and compare its classes with 0..num_classes-1.
        attack: an attack to train on; it must take at least one step and its blocks must fit into ``roi_size``.
        roi_size: spatial size of a training patch.
        by, label_key, keys: of a case: what tells patients apart, its label, all that are files.

    Raises:
        FileNotFoundError, ValueError: with everything that is wrong of one kind.
    """
    for one in attacks_of(attack):
        check_attack(one, roi_size)
    splits.check(training, validation, by=by, keys=keys)
    if num_classes is not None:
        check_labels([*training, *validation], num_classes, label_key)


def check_attack(attack: Attack, roi_size: Sequence[int] | None = None) -> None:
    """Refuse an attack that does nothing, or whose blocks are larger than the patch."""
    if getattr(attack, "steps", 1) < 1:
        raise ValueError(f"expected an attack of at least one step to train on, got steps=0 in {attack!r}")
    block = getattr(attack, "block_size", None)
    if block and roi_size and any(b > s for b, s in zip(block, roi_size, strict=False)):
        raise ValueError(
            f"expected blocks within the training patch {tuple(roi_size)}, got block_size={tuple(block)}: "
            "choose smaller blocks or a larger patch"
        )


def check_labels(cases: Sequence[Mapping[str, Any]], num_classes: int, label_key: str = "label") -> None:
    """Read every label and refuse classes that the network has no channel for."""
    reader = LoadImage(image_only=True, dtype=None)
    wrong = []
    for case in cases:
        if label_key not in case:
            continue
        values = np.unique(np.asarray(reader(case[label_key])))
        if values.min() < 0 or values.max() >= num_classes or not np.equal(values, np.round(values)).all():
            wrong.append(f"{Path(str(case[label_key])).name} ({values.min():g} to {values.max():g})")
    if wrong:
        raise ValueError(
            f"expected whole-numbered labels in 0..{num_classes - 1}, got {len(wrong)} labels with others: "
            f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )


class StopOnNaN:
    """Stop with the case's name when the loss is not finite, before the weights are touched, on every process."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        finite = torch.isfinite(engine.state.output["loss"].detach()).all().float()
        here = bool(finite)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            terms = "one on another process that is not" if here else losses(engine.state.output)
            raise ValueError(
                f"expected a finite loss, got {terms} {where(engine)}: look at this case's intensities and labels, or "
                "lower the learning rate"
            )
