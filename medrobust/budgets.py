"""What an attacker may do, read from the ``repr`` of an attack, which is what records keep."""

import math
import re
from collections.abc import Iterable

PRESETS = ("sea", "sea-v1", "sea-v2")
"""Ensembles of :mod:`medrobust.sea`: the conditions of their members begin with one of these words."""


def budget(attacks: Iterable[str]) -> str:
    """What the attacker may do, read from the ``repr`` of attacks, as in "L∞ 8/255, 20 steps" or "q_max 20".

    Several budgets of one kind, such as noise matched to each case or an eps a channel, give a range.
    """
    found = [_parse(attack) for attack in attacks if attack]
    if not found:
        return ""
    kinds = {(kind, unit, rest) for kind, unit, _, rest in found}
    if len(kinds) > 1:
        return "mixed, see provenance"
    ((kind, unit, rest),) = kinds
    low, high = (f"{pick(size for _, _, sizes, _ in found for size in sizes):.3g}" for pick in (min, max))
    size = "" if low == "nan" else f" {low}{unit}" if low == high else f" {low} to {high}{unit}"
    return ", ".join(part for part in (f"{kind}{size}", rest) if part)


def parse(attack: str) -> tuple[str, str, float, str]:
    """Kind, unit, size and steps, as in ``("L∞", "/255", 8.0, "20 steps")``; a size of NaN where none is known.

    Of an eps for each channel or case, the size is the largest.
    """
    kind, unit, sizes, steps = _parse(attack)
    return kind, unit, max(sizes), steps


def _parse(attack: str) -> tuple[str, str, list[float], str]:
    if "MinimumEps(" in attack:  # its attack's own eps is not what was used
        return "", "", [math.nan], ""

    def setting(name: str) -> str | None:
        match = re.search(rf"\b{name}='?([^,()']+|\([^=]*\))(?=[,')])", attack)
        return match and match[1]

    count = setting("steps")
    steps = "" if count is None else "1 step" if count == "1" else f"{count} steps"
    norm = {"linf": "L∞", "l2": "L2"}.get(setting("norm") or "linf", "eps")
    for name, kind, unit, factor in (
        ("eps", norm, "/255" if norm == "L∞" else "", 255 if norm == "L∞" else 1),
        ("std", "std", "/255", 255),
        ("q_max", "q_max", "", 1),
    ):
        try:
            sizes = [float(size) * factor for size in re.split(r"[(), ]+", (setting(name) or "").strip("(), "))]
        except ValueError:
            continue
        return kind, unit, sizes, steps
    return "", "", [math.nan], steps
