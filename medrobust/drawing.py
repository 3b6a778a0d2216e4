"""How our pictures look: colours, figures without a window, and axes with nothing on them that says nothing."""

from __future__ import annotations

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's seven first, told apart by every common kind of colour vision; then Tol's muted ones. With more than
# seven classes in a slice neighbours are told apart by place and legend as well.
COLOURS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
    *("#882255", "#44AA99", "#DDCC77", "#332288", "#AA4499", "#999933", "#88CCEE"),
)
MARKERS = "oDsv^<>Xp*"
INK, PAPER = "#1b2733", "#ffffff"
POINTS = (INK, *(colour for colour in COLOURS if colour != "#F0E442"))  # yellow is lost on white paper


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Axes, *, grid: Literal["both", "x"] = "both", across: str = "", up: str = "") -> None:
    """Axes without a frame and ticks, on a pale grid, with what is measured across and up."""
    axes.grid(axis=grid, color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)


def png(figure: Figure, legend: int = 0) -> bytes:
    """The picture; a legend of so many columns below it, 0 for none."""
    if legend:
        figure.legend(loc="outside lower center", ncols=legend, frameon=False, labelcolor=INK)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
