"""Texts that stand for a class: templates filled with its name, tokenised; and lists of class names from files.

Several templates a class are averaged in the embedding (prompt ensembling, Radford et al., 2103.00020, Sec. 3.1.4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medrobust.data.tokenizer import tokenize

PHOTO = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "a dark photo of a {}.",
    "a bright photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)
"""For everyday pictures, in the manner of OpenAI's list of 80, which :func:`read_templates` takes as a file."""

ORGAN = (
    "{}",
    "the {}",
    "CT of the {}",
    "an axial CT slice through the {}",
    "a scan centred on the {}",
    "a radiology image of the {}",
)
"""For structures in slices."""


class ClassName(NamedTuple):
    """One class: what its folder is called, and its name in words."""

    folder: str
    name: str


def tokens(names: Sequence[str], templates: Sequence[str] = PHOTO, *, truncate: bool = False) -> Tensor:
    """Tokens (K, T, 77) int64 of every name in every template.

    Raises:
        ValueError: no names, a name that is there twice, or a template without exactly one ``{}``.
    """
    _check(templates)
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if not names or twice:
        raise ValueError(
            f"expected class names that differ, got {', '.join(twice) or 'none'}: no model tells them apart"
        )
    return torch.stack([tokenize([t.format(name) for t in templates], truncate=truncate)[0] for name in names])


def with_prompts(cases: Iterable[Mapping[str, Any]], templates: Sequence[str] = PHOTO) -> list[dict[str, Any]]:
    """The cases with ``prompts``: their ``name`` in every template, keyed ``t0``, ``t1``, ...; for training."""
    _check(templates)
    return [
        {**case, "prompts": {f"t{index}": text.format(case["name"]) for index, text in enumerate(templates)}}
        for case in cases
    ]


def read_templates(path: str | PathLike[str]) -> tuple[str, ...]:
    """One template a line, with ``{}`` where the name goes; empty lines and lines from ``#`` are left out.

    Raises:
        ValueError: a line without exactly one ``{}``, or no line.
    """
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    _check(found)
    return found


def read_names(path: str | PathLike[str]) -> list[ClassName]:
    """Classes in the order of their numbers, from any of the usual lists of ImageNet.

    * JSON ``{"0": ["n01440764", "tench"], ...}`` (``imagenet_class_index.json``), or an array of names;
    * lines ``n01440764 tench, Tinca tinca`` (``LOC_synset_mapping.txt``): the first of the synonyms counts;
    * lines of one name each; the folder is then called as the name.

    Underscores in names become blanks.

    Raises:
        ValueError: numbers with gaps, or nothing in it.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    rows = _from_json(text, path) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    found = []
    for row in rows:
        if isinstance(row, str) and re.match(r"n\d{8}\s", row):
            row = row.split(None, 1)
        if row:
            folder, name = (row, row) if isinstance(row, str) else row
            found.append(ClassName(folder, name.split(",")[0].replace("_", " ").strip()))
    if not found:
        raise ValueError(f"expected names of classes in {path.name}, got none")
    return found


def _from_json(text: str, path: Path) -> list[Any]:
    content = json.loads(text)
    if isinstance(content, Mapping):
        if sorted(content) != sorted(str(number) for number in range(len(content))):
            raise ValueError(
                f"expected classes 0 to {len(content) - 1} in {path.name}, got {', '.join(list(content)[:3])} ..."
            )
        return [content[str(number)] for number in range(len(content))]
    return list(content)


def _check(templates: Sequence[str]) -> None:
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            f"expected templates with one {{}} each, got {wrong[0] if wrong else 'none'!r}: as in 'CT of the {{}}'"
        )
