"""Axial slices of the real CT and MR exams with the map of all four structures: one case for each slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrobust.data import ct_organs
from medrobust.data.slices import count
from medrobust.io import stem

CLASSES = ct_organs.CLASSES


def cases(section: str, dataset_dir: str | Path | None = None, *, every: int = 1) -> list[dict[str, Any]]:
    """Cases ``{"image", "label", "slice", "case"}`` for ``medrobust.data.class_maps.LoadClassMap``, lowest first.

    Those of CT A also have ``structures``, the map of everything that TotalSegmentator found.

    Args:
        section: ``training`` (CT A), ``validation`` (CT B) or ``shift`` (MR D).
        dataset_dir: of :func:`medrobust.data.ct_organs.prepare`.
        every: take each n-th slice, from the lowest.

    Raises:
        FileNotFoundError, ValueError: the data set was not prepared, there is no such section, or ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"expected every of 1 or more, got {every}: 1 takes all slices")
    return [
        {**exam, "slice": index, "case": f"{stem(exam['image'])}_slice{index:03d}"}
        for exam in ct_organs.cases(section, dataset_dir)
        for index in range(0, count(exam["image"]), every)
    ]
