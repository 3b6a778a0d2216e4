"""Pictures with several captions each, in the CSV files of Flickr8k (``image,caption``) and Flickr30k (``|``)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from medrobust.data.tokenizer import tokenize

IMAGE = ("image", "image_name", "filename")
CAPTION = ("caption", "comment", "raw")


def read_captions(path: str | PathLike[str], images: str | PathLike[str]) -> list[dict[str, Any]]:
    """Cases ``{"image": path, "captions": [text, ...], "case": name}``, one an image, in the order of the file.

    The first line names the columns, ``|`` or ``,`` parts them; others, such as ``comment_number``, are left out. With
    ``|`` a caption may hold commas and quotes; with ``,`` it is quoted where it does.

    Args:
        path: CSV file in UTF-8.
        images: folder of the images.

    Raises:
        ValueError: other columns, lines without an image or a caption (named), or no line at all.
    """
    path = Path(path)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = stream.read().splitlines()
    delimiter = "|" if lines and "|" in lines[0] else ","
    # Typed as one of four numbers, but csv names them as plain ones.
    quoting: Any = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, quoting=quoting)]
    header = rows[0] if rows else []
    places = [next((header.index(name) for name in known if name in header), None) for known in (IMAGE, CAPTION)]
    if None in places:
        raise ValueError(
            f"expected the columns image and caption in {path.name}, got {', '.join(header) or 'an empty file'}"
        )
    at, text_at = (place for place in places if place is not None)
    found: dict[str, list[str]] = {}
    wrong = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) <= max(at, text_at) or not row[at] or not row[text_at]:
            wrong.append(f"line {number}")
            continue
        found.setdefault(row[at], []).append(row[text_at])
    if wrong or not found:
        raise ValueError(
            f"expected an image and a caption in every line of {path.name}, got {_few(wrong) or 'no lines'}"
        )
    return [
        {"image": str(Path(images, name)), "captions": texts, "case": Path(name).stem} for name, texts in found.items()
    ]


def caption_tokens(cases: Sequence[Mapping[str, Any]], *, truncate: bool = True) -> tuple[Tensor, list[int]]:
    """Tokens (N, 77) of all captions in order, and which case, from 0, each of them belongs to."""
    texts = [(text, number) for number, case in enumerate(cases) for text in case["captions"]]
    input_ids, _ = tokenize([text for text, _ in texts], truncate=truncate)
    return input_ids, [number for _, number in texts]


def _few(lines: Sequence[str]) -> str:
    return f"{len(lines)} without ({', '.join(lines[:5])})" if lines else ""
