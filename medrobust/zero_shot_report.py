"""Table and curves of zero-shot accuracy over the size of the attack, from records alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medrobust.records import CLEAN, Record

WORST = "worst of all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one condition.

    Attributes:
        attack: the condition's name without its size, such as ``PGD``.
        eps: in 1/255; 0 for clean images.
        top1, top5: share of images, in [0, 1].
    """

    model: str
    attack: str
    eps: float
    images: int
    top1: float
    top5: float


def summary(records: Iterable[Record]) -> list[Row]:
    """A row a model and condition, in the order of the records, and after each eps the worst rank of each image.

    The worst of all counts an image as right only where it is right under every attack of that size and without any.
    """
    ranks: dict[str, dict[tuple[str, float], dict[str, float]]] = {}
    for record in records:
        if record.metric == "rank":
            model = record.model.partition(" sha256:")[0]
            ranks.setdefault(model, {}).setdefault(_condition(record.condition), {})[record.case] = record.value
    rows = []
    for model, by_condition in ranks.items():
        clean = by_condition.get((CLEAN, 0.0), {})
        rows += [_row(model, CLEAN, 0.0, clean)] if clean else []
        for eps in sorted({eps for _, eps in by_condition if eps}):
            worst = dict(clean)
            for (attack, size), values in by_condition.items():
                if size == eps:
                    rows.append(_row(model, attack, eps, values))
                    worst = {case: max(value, worst.get(case, 1.0)) for case, value in values.items()}
            rows.append(_row(model, WORST, eps, worst))
    return rows


def table(records: Iterable[Record]) -> str:
    """Markdown: attacks and sizes down, models across, top-1 / top-5 in per cent."""
    rows = summary(records)
    models = list(dict.fromkeys(row.model for row in rows))
    cells = {(row.attack, row.eps, row.model): f"{100 * row.top1:.1f} / {100 * row.top5:.1f}" for row in rows}
    lines = [f"| attack | eps | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    for attack, eps in dict.fromkeys((row.attack, row.eps) for row in rows):
        size = f"{eps:g}/255" if eps else ""
        lines.append(f"| {attack} | {size} | " + " | ".join(cells.get((attack, eps, m), "") for m in models) + " |")
    images = ", ".join(str(count) for count in sorted({row.images for row in rows}))
    return "\n".join([*lines, "", f"Top-1 / top-5 in per cent of {images} images; ties count as wrong.", ""])


def curves(records: Iterable[Record]) -> bytes:
    """PNG: top-1 over eps, one panel an attack, one line a model."""
    from medrobust.drawing import INK, MARKERS, POINTS, figure_of, png, quiet

    rows = summary(records)
    attacks = [name for name in dict.fromkeys(row.attack for row in rows) if name != CLEAN]
    figure = figure_of(3.2 * max(len(attacks), 1), 3.4)
    panels = figure.subplots(1, max(len(attacks), 1), sharey=True, squeeze=False)[0]
    for panel, attack in zip(panels, attacks, strict=False):
        for number, model in enumerate(dict.fromkeys(row.model for row in rows)):
            line = [row for row in rows if row.model == model and row.attack in (CLEAN, attack)]
            panel.plot(
                [row.eps for row in line],
                [100 * row.top1 for row in line],
                marker=MARKERS[number % len(MARKERS)],
                color=POINTS[number % len(POINTS)],
                label=model if panel is panels[0] else "",
            )
        panel.set_title(attack, fontsize=10, color=INK)
        panel.set_ylim(0, 100)
        quiet(panel, across="eps in 1/255", up="top-1 in %" if panel is panels[0] else "")
    return png(figure, legend=3)


def _row(model: str, attack: str, eps: float, ranks: dict[str, float]) -> Row:
    values = list(ranks.values())
    top1, top5 = (sum(value <= k for value in values) / len(values) for k in (1, 5))
    return Row(model=model, attack=attack, eps=eps, images=len(values), top1=top1, top5=top5)


def _condition(name: str) -> tuple[str, float]:
    """``"PGD 4/255"`` as ``("PGD", 4.0)``."""
    attack, _, size = name.rpartition(" ")
    return (attack, float(size.removesuffix("/255"))) if attack and size.endswith("/255") else (name, 0.0)
