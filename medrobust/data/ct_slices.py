"""Axial slices of the real CT and MR exams, one case for each structure in each slice, with prompts that name it.

The panel asks whether a model reads: its own name, a synonym, a typing error, another structure's name, nothing. The
prompts say what a structure is called and nothing that only the mask could tell.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medrobust.data import ct_organs
from medrobust.data.slices import load_volume_ras
from medrobust.io import stem

WINDOWS = {"training": (-500.0, 500.0), "validation": (-500.0, 500.0), "shift": (0.0, 692.0)}
"""HU of the CT exams; the MR exam's own scale, whose 692 is its 99th percentile."""

SYNONYMS = {
    "liver": ["hepatic organ", "the liver", "liver tissue"],
    "aorta": ["aortic vessel", "the aorta", "abdominal aorta"],
    "bones": ["skeleton", "bone", "skeletal structures"],
    "back muscles": ["muscles of the back", "spinal muscles", "paraspinal muscles"],
}
"""Other words for each structure. The last two of each list are never trained on (``p3`` and ``synonym`` differ)."""

TYPOS = {"liver": "livr", "aorta": "aotra", "bones": "bnoes", "back muscles": "bakc muscels"}

WRONG = {"liver": "aorta", "aorta": "back muscles", "bones": "liver", "back muscles": "bones"}
"""Whose name stands in for each structure's own in the prompt ``wrong``."""

TRAINED = ("name", "in_image", "segment")
"""Prompt keys to train with; all others test."""

PANEL = ("name", "synonym", "typo", "wrong", "p0")
"""Prompt keys of the robustness panel; ``p0`` is the empty prompt."""

LEAST = 20
"""Pixels of the exam's own grid below which a structure does not count as present in a slice."""


def prompts(structure: str) -> dict[str, Any]:
    """All prompts of a structure by key."""
    return {
        "p0": "",
        "name": structure,
        "in_image": f"{structure} in an abdominal scan",
        "segment": f"segment the {structure}",
        "synonym": SYNONYMS[structure],
        "typo": TYPOS[structure],
        "wrong": WRONG[structure],
    }


def cases(
    section: str,
    dataset_dir: str | Path | None = None,
    *,
    absent: bool = False,
    slices: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Cases ``{"image", "label", "slice", "value", "structure", "prompts", "case"}`` for ``LoadPair`` and ``Prompted``.

    Those of CT A also have ``structures``, the map of everything that TotalSegmentator found.

    Args:
        section: ``training`` (CT A), ``validation`` (CT B) or ``shift`` (MR D).
        dataset_dir: of :func:`medrobust.data.ct_organs.prepare`.
        absent: also structures that a slice does not show; their mask is empty.
        slices: from the first, counted from below, to before the second; ``None`` is all.

    Raises:
        FileNotFoundError, ValueError: the data set was not prepared, there is no such section, or no such slices.
    """
    found = []
    for exam in ct_organs.cases(section, dataset_dir):
        pixels = _pixels(exam["label"])
        first, last = slices or (0, len(pixels))
        if not 0 <= first < last <= len(pixels):
            raise ValueError(f"expected slices within 0 and {len(pixels)} of {stem(exam['image'])}, got {slices}")
        for index in range(first, last):
            for value, structure in enumerate(ct_organs.CLASSES[1:], 1):
                if absent or pixels[index][value] >= LEAST:
                    found.append(
                        {
                            **exam,
                            "slice": index,
                            "value": value,
                            "structure": structure,
                            "prompts": prompts(structure),
                            "case": f"{stem(exam['image'])}_slice{index:03d}_{structure.replace(' ', '-')}",
                        }
                    )
    return found


@lru_cache(maxsize=4)
def _pixels(label: str) -> list[list[int]]:
    """For each slice, how many pixels each class has."""
    volume, _ = load_volume_ras(label)
    classes = len(ct_organs.CLASSES)
    return [
        np.bincount(volume[:, :, index].astype(np.int64).ravel(), minlength=classes).tolist()
        for index in range(volume.shape[2])
    ]
