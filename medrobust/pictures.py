"""A picture of what an attack did to one case. PNG bytes out; no window, no global state."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from medrobust.drawing import COLOURS, INK, PAPER, figure_of, png

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
    ``class_names`` with the background first; what the reference labels -1 is shown as background. Colour images
    ``(3, H, W)`` are shown as such, their difference is the mean over the channels; of other channels the first one is
    shown. ``spacing`` in mm gives the slice its true proportions and scale bar.
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
    figure = figure_of(9.6, 2 * 3.1 * min(max(ratio, 0.4), 2.0) + 1.0 + 0.25 * legend_rows)
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
        masked = np.ma.masked_less_equal(classes, 0)
        place.imshow(masked, cmap=colours, vmin=0.5, vmax=max(len(class_names), 2) - 0.5, alpha=0.6, **view)
        _outline(place, np.maximum(label, 0))

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
    return png(figure)


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
