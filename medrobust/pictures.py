"""Pictures: what an attack did to one case, and Dice by organ. PNG bytes out; no window, no global state."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

# Okabe and Ito's seven first, told apart by every common kind of colour vision; then Tol's muted ones. With more than
# seven classes in a slice neighbours are told apart by place and legend as well.
COLOURS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
    *("#882255", "#44AA99", "#DDCC77", "#332288", "#AA4499", "#999933", "#88CCEE"),
)
MARKERS = "oDsv^<>Xp*"
INK, PAPER = "#1b2733", "#ffffff"
POINTS = (INK, *(colour for colour in COLOURS if colour != "#F0E442"))  # yellow is lost on white paper
CHANGE = LinearSegmentedColormap.from_list("change", ["#0072B2", PAPER, "#D55E00"])


def panel(
    image: Any,
    image_adv: Any,
    label: Any,
    pred: Any,
    pred_adv: Any,
    *,
    spacing: float | Sequence[float] = 1.0,
    class_names: Sequence[str],
    title: str = "",
    radiological: bool = True,
) -> bytes:
    """One case before and after the attack, as a PNG.

    All arrays or tensors are ``(1, H, W)`` or ``(1, H, W, D)``: images in [0, 1], the others class indices named by
    ``class_names`` with the background first. Colour images ``(3, H, W)`` are shown as such, their difference is the
    mean over the channels; of other channels the first one is shown. ``spacing`` in mm gives the slice its true
    proportions and scale bar.
    Of a volume, the axial slice (last axis) where most voxels changed their predicted class is shown.

    Above: clean image, adversarial image, and their difference magnified to full colour, the factor written. Below:
    reference, clean and adversarial prediction over the anatomy, the reference outlined in white in all three.

    ``radiological=True`` takes the axes as right, anterior, superior (MONAI's "RAS") and shows the patient's right on
    the left and anterior up. ``False`` shows rows and columns as they are stored.

    Raises ValueError for shapes that differ or for a class without a name.
    """
    arrays = [_plain(array) for array in (image, image_adv, label, pred, pred_adv)]
    colour = arrays[0].ndim == 3 and len(arrays[0]) == 3 and arrays[1].shape == arrays[0].shape
    pictures = [np.moveaxis(array, 0, -1) for array in arrays[:2]] if colour else []
    arrays[:2] = [array.mean(0, keepdims=True) if colour else array[:1] for array in arrays[:2]]
    shape = arrays[0].shape
    if len(shape) not in (3, 4) or shape[0] != 1 or any(array.shape != shape for array in arrays):
        raise ValueError(
            f"expected five arrays of one shape (1, H, W) or (1, H, W, D), got {[array.shape for array in arrays]}; "
            "pass one case and one channel"
        )
    highest = int(max(array.max() for array in arrays[2:]))
    if highest >= len(class_names):
        raise ValueError(f"expected a name for each class up to {highest}, got {len(class_names)}: {class_names!r}")
    pixel = _pixel(spacing, len(shape) - 1)

    index = None if len(shape) == 3 else _slice(*(array[0] for array in arrays[2:]))
    planes = [array[0] if index is None else array[0, :, :, index] for array in arrays]
    if radiological:
        planes, pixel = [plane.T[::-1, ::-1] for plane in planes], pixel[::-1]
        pictures = [picture.swapaxes(0, 1)[::-1, ::-1] for picture in pictures]
    title = title if index is None else f"{title}   slice {index}".strip()
    return _draw(planes, pictures or planes[:2], pixel, class_names, title, radiological)


def dice_by_class(dice: Mapping[str, Mapping[str, float]], *, title: str = "") -> bytes:
    """Mean Dice of each class under each condition, as a PNG; ``dice[condition][class]``, conditions in order.

    One line a class, sorted by what the worst condition leaves of it; the line spans from best to worst.
    """
    classes = sorted(
        {name: None for values in dice.values() for name in values},
        key=lambda name: min(values[name] for values in dice.values() if name in values),
    )
    figure = _figure(7.2, 1.0 + 0.3 * len(classes) + 0.2 * ((len(dice) + 2) // 3))
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
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("mean Dice over cases", color=INK)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    return _png(figure)


def decline_curves(curves: Sequence[Any], clean: float) -> bytes:
    """Mean Dice against the attacker's budget, as a PNG; ``curves`` of :func:`medrobust.decline.decline`.

    All curves begin at the clean Dice. They take each case's worst within the budget, as ``Point.within`` has it;
    controls are dashed.
    """
    figure = _figure(7.2, 3.8)
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
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"budget, {', '.join(dict.fromkeys(curve.unit for curve in curves))}", color=INK)
    axes.set_ylabel("mean Dice over cases", color=INK)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    return _png(figure)


def _draw(
    planes: list[np.ndarray],
    pictures: list[np.ndarray],
    pixel: tuple[float, float],
    class_names: Sequence[str],
    title: str,
    radiological: bool,
) -> bytes:
    image, image_adv, label, pred, pred_adv = planes
    rows, columns = image.shape
    ratio = rows * pixel[0] / (columns * pixel[1])
    shown = [k for k in range(1, len(class_names)) if any((classes == k).any() for classes in planes[2:])]
    legend_rows = -(-len(shown) // 5)
    figure = _figure(9.6, 2 * 3.1 * min(max(ratio, 0.4), 2.0) + 1.0 + 0.25 * legend_rows)
    axes = figure.subplots(2, 3)

    change = image_adv - image
    largest = float(np.abs(change).max())
    changed = float((pred != pred_adv).mean())
    scale = f"difference ×{1 / largest:.0f}, full colour ±{largest * 255:.1f}/255" if largest else "no difference"
    titles = ["clean image", "adversarial image", scale]
    titles += ["reference", "prediction, clean", f"prediction, adversarial: {changed:.1%} changed"]
    for place, text in zip(axes.flat, titles, strict=True):
        place.set_title(text, fontsize=9.5, color=INK, pad=4)
        place.set_axis_off()

    view: dict[str, Any] = {"aspect": pixel[0] / pixel[1], "interpolation": "nearest"}
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, **view}
    axes[0, 0].imshow(pictures[0], **grey)
    axes[0, 1].imshow(pictures[1], **grey)
    axes[0, 2].imshow(change, cmap=CHANGE, vmin=-(largest or 1), vmax=largest or 1, **view)
    colours = ListedColormap([COLOURS[(k - 1) % len(COLOURS)] for k in range(1, max(len(class_names), 2))])
    for place, base, classes in zip(axes[1], (pictures[0], *pictures), (label, pred, pred_adv), strict=True):
        place.imshow(base, **grey)
        masked = np.ma.masked_equal(classes, 0)
        place.imshow(masked, cmap=colours, vmin=0.5, vmax=max(len(class_names), 2) - 0.5, alpha=0.6, **view)
        _outline(place, label)

    _scale_bar(axes[0, 0], image.shape, pixel)
    if radiological:
        mark: dict[str, Any] = {"color": "#ffffff", "fontsize": 9, "transform": axes[0, 0].transAxes}
        axes[0, 0].text(0.02, 0.5, "R", va="center", ha="left", **mark)
        axes[0, 0].text(0.5, 0.98, "A", va="top", ha="center", **mark)
    if shown:
        patches = [Patch(color=COLOURS[(k - 1) % len(COLOURS)], label=class_names[k]) for k in shown]
        line = Line2D([], [], color="#b0b8c0", linewidth=1.2, label="outline of the reference")
        figure.legend(
            handles=[*patches, line], loc="outside lower center", ncols=5, frameon=False, fontsize=9, labelcolor=INK
        )
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return _png(figure)


def _outline(axes: Axes, label: np.ndarray) -> None:
    """The border of every reference class, along the edges of the pixels."""
    rows, columns = np.nonzero(label[1:] != label[:-1])
    axes.hlines(rows + 0.5, columns - 0.5, columns + 0.5, color=PAPER, linewidth=0.8)
    rows, columns = np.nonzero(label[:, 1:] != label[:, :-1])
    axes.vlines(columns + 0.5, rows - 0.5, rows + 0.5, color=PAPER, linewidth=0.8)


def _scale_bar(axes: Axes, shape: tuple[int, ...], pixel: tuple[float, float]) -> None:
    """A bar of a round length, at most a third of the width."""
    rows, columns = shape
    third = columns * pixel[1] / 3
    length = max((size for size in (1, 2, 5, 10, 20, 50, 100, 200) if size <= third), default=third)
    start, bottom = 0.04 * columns, 0.95 * rows
    axes.plot([start, start + length / pixel[1]], [bottom, bottom], color=PAPER, linewidth=2.5, solid_capstyle="butt")
    axes.text(start, bottom - 0.02 * rows, f"{length:g} mm", color=PAPER, fontsize=8, va="bottom", ha="left")


def _slice(label: np.ndarray, pred: np.ndarray, pred_adv: np.ndarray) -> int:
    """The slice with most changed voxels; of equals, the one showing most of the reference."""
    changed = (pred != pred_adv).sum((0, 1))
    anatomy = (label > 0).sum((0, 1))
    return max(range(label.shape[-1]), key=lambda k: (changed[k], anatomy[k], -abs(2 * k + 1 - label.shape[-1])))


def _pixel(spacing: float | Sequence[float], dims: int) -> tuple[float, float]:
    sizes = [float(spacing)] * dims if isinstance(spacing, (int, float)) else [float(size) for size in spacing]
    if len(sizes) != dims or not all(size > 0 for size in sizes):
        raise ValueError(f"expected spacing in mm as one positive number or {dims} of them, got {spacing!r}")
    return sizes[0], sizes[1]


def _plain(array: Any) -> np.ndarray:
    # Duck typed, so that drawing needs no torch: tensors on any device, MetaTensors and arrays alike.
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
