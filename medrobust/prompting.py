"""What a network reads beside the image, and attacks on all prompts of an image at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from medrobust.attacks.base import Attack

Arguments = Mapping[str, Tensor]
"""Keyword arguments of a network for one case, tensors without a batch dimension, such as ``input_ids`` (L,)."""


def _none_else(key: str) -> Arguments:
    raise ValueError(f"expected a case with prompts for the prompt {key!r}, got none")


def _none_at_all() -> Sequence[Arguments]:
    raise ValueError("expected a case with prompts to attack all of them, got none")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One case's arguments: its own, those under another of its prompts by key, and those of all its prompts."""

    own: Arguments = field(default_factory=dict)
    under: Callable[[str], Arguments] = _none_else
    each: Callable[[], Sequence[Arguments]] = _none_at_all


class AllPrompts(nn.Module):
    """One model a prompt as one model with a sigmoid channel a prompt: image (B, C, *S) -> logits (B, P, *S)."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([model(image) for model in self.models], 1)


def attack_all_prompts(
    attack: Attack,
    models: Sequence[nn.Module],
    image: Tensor,
    label: Tensor,
    *,
    region: Tensor | None = None,
    generator: torch.Generator,
) -> Tensor:
    """An adversarial image (B, C, *S) for whatever prompt comes: the mean objective over all of them is maximised.

    Args:
        models: one for each prompt, of a single sigmoid channel.
        label: (B, 1, *S) of 0 and 1, what every prompt asks for.
        region: as for any attack.

    Raises:
        ValueError: the objective, or what progress or the best image is judged by, cannot take a channel a prompt.
    """
    read: dict[str, Any] = {"objective": attack.setting("objective")}
    # What is left at None follows the objective.
    read |= {name: found for name in ("criterion", "track") if (found := getattr(attack, name, None)) is not None}
    try:
        together = replace(attack, **{name: replace(found, head="sigmoid") for name, found in read.items()})
    except TypeError as error:
        raise ValueError(
            f"expected an objective with a head to attack all prompts, got {read}: choose SoftDice, say"
        ) from error
    wanted = label.expand(-1, len(models), *label.shape[2:])
    return together(AllPrompts(models), image, wanted, region=region, generator=generator)
