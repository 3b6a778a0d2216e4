"""Names that tell things apart: no longer than they must be, and no two alike."""

from __future__ import annotations

from collections.abc import Sequence


def told_apart(labels: Sequence[str], *details: Sequence[str]) -> list[str]:
    """The labels, each unique: of those that are alike, ``"PGD"`` becomes ``"PGD, tiles"``.

    Args:
        labels: one a thing.
        details: more about each thing, most welcome first; one is added where it differs among things of one label.
            What no detail tells apart is numbered by its place.
    """
    found = list(labels)
    for column in (*details, [str(number) for number, _ in enumerate(labels, 1)]):
        named = list(zip(found, column, strict=True))
        apart = {label: len({detail for other, detail in named if other == label}) > 1 for label in found}
        found = [f"{label}, {detail}" if apart[label] and detail else label for label, detail in named]
    return found
