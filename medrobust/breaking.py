"""Smallest eps at which cases break, as a report shows them: quantiles over cases, and how many break within an eps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from medrobust.drawing import POINTS, figure_of, png, quiet
from medrobust.records import ABSENT, Record

METRICS = ("minimum_eps", "dice_at_minimum_eps", "recall_at_minimum_eps")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def breaking(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One entry a search in the records of one model: text for its line in a table, and sorted sizes for the picture.

    A case that nothing up to the largest eps tried breaks counts as infinitely far, so that quantiles stay what they
    are: the size that this share of cases does not survive.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.metric == "minimum_eps" and record.status != ABSENT:
            found.setdefault((record.condition, record.attack), []).append(record)
    return [_entry(condition, attack, rows) for (condition, attack), rows in found.items()]


def shares(searches: Sequence[dict[str, Any]]) -> bytes:
    """The share of cases that break within an eps, one step curve a search, as a PNG. All in one unit."""
    figure = figure_of(7.2, 3.6)
    axes = figure.add_subplot()
    most = max(search["most"] for search in searches)
    for number, search in enumerate(searches):
        finite = [size for size in search["sizes"] if math.isfinite(size)]
        steps = np.arange(len(finite) + 1) / len(search["sizes"])
        axes.step(
            [0, *finite, search["most"]],
            [*steps, steps[-1]],
            where="post",
            color=POINTS[number % len(POINTS)],
            linestyle=("-", "--", ":", "-.")[number % 4],
            linewidth=2,
            label=f"{search['name']}, {search['below']}",
        )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, most)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    quiet(axes, across=f"eps, {searches[0]['unit']}", up="cases broken")
    return png(figure, legend=2)


def _entry(condition: str, attack: str, rows: Sequence[Record]) -> dict[str, Any]:
    linf = "norm='l2'" not in attack
    factor = 255 if linf else 1
    sizes = sorted(row.value * factor for row in rows)
    most = float(_setting(attack, "most")) * factor

    def size(value: float) -> str:
        return f"{value:.3g}{'/255' if linf else ''}" if math.isfinite(value) else f"more than {most:.3g}"

    # A quantile that is one of the values, so that infinity can be one.
    places = [max(math.ceil(share * len(sizes)), 1) - 1 for share in QUANTILES]
    return {
        "name": condition.removeprefix("minimum eps, "),
        "below": f"{_judge(attack)} below {_setting(attack, 'below')}",
        "unit": "L∞, /255" if linf else "L2",
        "cases": len(sizes),
        "already": sum(value == 0 for value in sizes),
        "never": sum(not math.isfinite(value) for value in sizes),
        "quantiles": [size(sizes[place]) for place in places],
        "most": most,
        "sizes": sizes,
    }


def _judge(attack: str) -> str:
    """Whose criterion comes after that of its attack."""
    return "recall" if attack.rpartition("criterion=")[2].startswith("MissedForeground(") else "Dice"


def _setting(attack: str, name: str) -> str:
    """Of the search, whose settings come after those of its attack."""
    found = re.findall(rf"\b{name}=([^,()]+)", attack)
    if not found:
        raise ValueError(f"expected {name} in the description of a search for a smallest eps, got {attack!r}")
    return str(found[-1])
