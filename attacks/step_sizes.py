"""How the length of a step changes on the way: the rules that iterated attacks share."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def share(schedule: Schedule, step: int, steps: int) -> float:
    """Step ``step`` of 0 .. ``steps`` - 1 as a share of the first: 1 at the start, toward 0 after the last."""
    if schedule == "constant":
        return 1.0
    passed = step / max(steps, 1)
    return 1 - passed if schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2


def check_schedule(schedule: str) -> None:
    """Refuse an unknown schedule.

    Raises:
        ValueError: it is none of ``SCHEDULES``.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"expected a schedule among {', '.join(SCHEDULES)}, got {schedule!r}")
