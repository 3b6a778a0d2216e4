"""Charts of a report: Dice by class, and Dice against the attacker's budget. PNG bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MultipleLocator

from medrobust.drawing import INK, MARKERS, PAPER, POINTS, figure_of, png, quiet


def dice_by_class(dice: Mapping[str, Mapping[str, float]], *, title: str = "") -> bytes:
    """Mean Dice of each class under each condition, as a PNG; ``dice[condition][class]``, conditions in order.

    One line a class, sorted by what the worst condition leaves of it; the line spans from best to worst.
    """
    classes = sorted(
        {name: None for values in dice.values() for name in values},
        key=lambda name: min(values[name] for values in dice.values() if name in values),
    )
    figure = figure_of(7.2, 1.0 + 0.3 * len(classes) + 0.2 * ((len(dice) + 2) // 3))
    axes = figure.add_subplot()
    for row, name in enumerate(classes):
        span = [values[name] for values in dice.values() if name in values]
        axes.plot([min(span), max(span)], [row, row], color="#cfd6dd", linewidth=3, solid_capstyle="round", zorder=1)
    for number, (condition, values) in enumerate(dice.items()):
        rows = [row for row, name in enumerate(classes) if name in values]
        axes.plot(
            [values[classes[row]] for row in rows],
            rows,
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=7,
            color=POINTS[number % len(POINTS)],
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            label=condition,
        )
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(-0.6, len(classes) - 0.4)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    quiet(axes, grid="x", across="mean Dice over cases")
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=10)
    return png(figure, legend=3)


def decline_curves(curves: Sequence[Any], clean: float) -> bytes:
    """Mean Dice against the attacker's budget, as a PNG; ``curves`` of :func:`medrobust.decline.decline`.

    All curves begin at the clean Dice. They take each case's worst within the budget, as ``Point.within`` has it;
    controls are dashed.
    """
    figure = figure_of(7.2, 3.8)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        axes.plot(
            [0, *(point.size for point in curve.points)],
            [clean, *(point.within for point in curve.points)],
            linestyle="--" if curve.control else "-",
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            color=POINTS[number % len(POINTS)],
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            label=curve.name,
        )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    units = ", ".join(dict.fromkeys(curve.unit for curve in curves))
    quiet(axes, across=f"budget, {units}", up="mean Dice over cases")
    return png(figure, legend=3)
