"""Attacks that change while a model trains: any ``(epoch, generator) -> Attack`` can stand where an attack does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from medrobust.attacks.base import Attack

Schedule = Callable[[float, torch.Generator], Attack]
"""Epochs passed (a fraction within an epoch) and a source of chance -> this iteration's attack."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Grow an attack's strength linearly, then keep it.

    A setting that was given and does not follow, such as ``step_size``, stays as it is.

    Args:
        attack: at full strength.
        epochs: until full strength.
        setting: what grows, such as ``"eps"`` or ``"q_max"``; settings that follow from it follow here, too.
        start: share of the full value at the beginning.
    """

    attack: Attack
    epochs: float
    setting: str = "eps"
    start: float = 0.1

    def __post_init__(self) -> None:
        if not hasattr(self.attack, self.setting):
            raise ValueError(f"expected a setting of {self.attack!r}, got {self.setting!r}")
        if not isinstance(self.attack.setting(self.setting), float | int) or self.setting in ("steps", "restarts"):
            raise ValueError(f"expected a setting that can grow, got {self.setting} of {self.attack!r}")
        if self.epochs <= 0 or not 0 < self.start <= 1:
            raise ValueError(f"expected epochs > 0 and 0 < start <= 1, got {self.epochs} and {self.start}")
        self(0.0, torch.Generator())  # the weakest attack must be one

    def __call__(self, epoch: float, generator: torch.Generator) -> Attack:
        share = self.start + (1 - self.start) * min(1.0, epoch / self.epochs)
        changes = {self.setting: share * self.attack.setting(self.setting)}
        if self.setting == "step_size" and hasattr(self.attack, "schedule"):
            changes["schedule"] = self.attack.setting("schedule")  # a step size of one's own would be constant
        return replace(self.attack, **changes)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Draw one of several attacks for every iteration.

    Args:
        attacks: attacks or schedules.
        weights: their relative frequencies; ``None``: equal.
    """

    attacks: Sequence[Attack | Schedule]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if not self.attacks or (
            weights is not None and (len(weights) != len(self.attacks) or min(weights) < 0 or sum(weights) == 0)
        ):
            raise ValueError(f"expected one weight >= 0 per attack, got {self.attacks} and {weights}")

    def __call__(self, epoch: float, generator: torch.Generator) -> Attack:
        weights = torch.tensor(self.weights or [1.0] * len(self.attacks), dtype=torch.float64)
        drawn = torch.multinomial(weights, 1, generator=generator)
        return attack_of(self.attacks[int(drawn)], epoch, generator)


def attacks_of(attack: Attack | Schedule) -> list[Attack]:
    """Every attack that may be drawn, as far as a schedule tells (``attack`` or ``attacks``)."""
    if isinstance(attack, Attack):
        return [attack]
    inner = getattr(attack, "attacks", None) or [one for one in [getattr(attack, "attack", None)] if one is not None]
    return [found for one in inner for found in attacks_of(one)]


def attack_of(attack: Attack | Schedule, epoch: float, generator: torch.Generator) -> Attack:
    """This iteration's attack."""
    return attack if isinstance(attack, Attack) else attack(epoch, generator)
