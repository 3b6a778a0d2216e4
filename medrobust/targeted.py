"""What targeted attacks are measured by: records of one case.

Beside the usual metrics against the true label, a condition with a goal records

======================== ======================================================================================
``goal``                 for each structure the goal is about, 1; 0 and the reason as status where it is impossible
``reached``              share of the voxels to be changed that took the class the attacker wants
``reached_before``       the same of the clean prediction: what the model's own mistakes give for free
``dice_to_target``       Dice of each of these structures to the map the attacker wants to see
``dice_to_target_before`` the same of the clean prediction
======================== ======================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from medrobust.metrics.dice import dice
from medrobust.records import Record


def impossible(shared: Mapping[str, Any], concerned: Mapping[str, int], why: str) -> list[Record]:
    """The records of a case that lacks what the goal needs."""
    status = f"impossible: {why}"
    return [Record(**shared, metric="goal", class_name=name, value=0.0, status=status) for name in concerned]


def wanted(target: Tensor, label: Tensor, pred: Tensor, classes: Collection[int]) -> Tensor:
    """What an attack goes toward: the goal's structures as the goal has them, all else as the model sees it already.

    The true label elsewhere would be help: an attack toward it repairs what the model gets wrong.

    Args:
        target: the goal's map, (B, 1, *S), made from ``label``.
        pred: the model's clean prediction.
        classes: the goal's structures.
    """
    known = torch.tensor(sorted(classes), device=target.device)
    concerned = torch.isin(target, known) | torch.isin(pred, known) | (target != label)
    return torch.where(concerned, target, pred)


def success(
    shared: Mapping[str, Any],
    concerned: Mapping[str, int],
    label: Tensor,
    target: Tensor,
    pred: Tensor,
    pred_adv: Tensor,
) -> list[Record]:
    """How far the prediction went toward the target; class maps (1, 1, *S)."""
    asked = target != label
    found = [Record(**shared, metric="goal", class_name=name, value=1.0) for name in concerned]
    classes = max(*(int(one.max()) for one in (label, target, pred, pred_adv)), *concerned.values()) + 1
    for suffix, one in (("", pred_adv), ("_before", pred)):
        reached = (one == target)[asked].float().mean().item()
        found.append(Record(**shared, metric=f"reached{suffix}", value=reached))
        overlap = dice(one, target, classes)[0]
        found += [
            Record(**shared, metric=f"dice_to_target{suffix}", class_name=name, value=float(overlap[k]))
            for name, k in concerned.items()
        ]
    return found
