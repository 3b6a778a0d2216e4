"""Records: one number a row, with all that says where it came from. Reports are computed from nothing else."""

import csv
import io
import math
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import medrobust
from medrobust.atomic import write_text

CLEAN = "clean"
BACKGROUND = "background"
ABSENT = "absent"
"""Status of a search for one structure where the reference has none: nothing could be broken."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number of one case.

    ``condition`` is a short name, "clean" or "PGD"; ``attack`` the full ``repr`` behind it, "" for clean images.
    ``class_name`` is "" for a metric of the whole image, and "background" for the class that no mean over organs takes.
    ``status`` is "ok", "both empty", "missed", "invented", or "absent" of a search for the smallest eps.
    ``protocol`` is "whole volume" or "tiles", "" for clean.
    ``model`` names the weights, as in "unetr sha256:abcd1234". A new metric adds rows, never columns.

    Raises ValueError for NaN: metrics have explicit rules for empty classes, so NaN is a fault to report, not a number.
    """

    case: str
    condition: str
    metric: str
    value: float
    class_name: str = ""
    status: str = "ok"
    attack: str = ""
    protocol: str = ""
    seed: int | None = None
    model: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ValueError(
                f"expected a number for {self.metric} of case {self.case!r} under {self.condition!r}, got nan; "
                "look for NaN in the image or the logits, and report the case as failed"
            )


COLUMNS = tuple(field.name for field in fields(Record))


def versions() -> str:
    """What computed the numbers, as in "medrobust 0.1.0; torch 2.13.0; monai 1.6.1"."""
    return "; ".join(
        [
            f"medrobust {medrobust.__version__}",
            *(f"{name} {version(name).split('+')[0]}" for name in ("torch", "monai")),
        ]
    )


def csv_text(records: Iterable[Record]) -> str:
    """The records as CSV with a header; floats are written so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for record in records:
        # float() first: numpy's own numbers print with their type's name.
        row = {**dict(zip(COLUMNS, astuple(record), strict=True)), "value": repr(float(record.value))}
        cells = ["" if cell is None else str(cell) for cell in row.values()]
        # The csv module reads a bare carriage return as the end of a row, yet does not quote it.
        (quoting if "\r" in "".join(cells) else writer).writerow(cells)
    return text.getvalue()


def write_csv(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Write all records at once: a reader finds the old file or the new one, never half of it."""
    write_text(path, csv_text(records))


def append(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Add records to the end of a file, or begin it. As safe as ``write_csv``: a killed run leaves whole rows only.

    Raises ValueError where the file has another header.
    """
    path = Path(path)
    before = _read(path) if path.exists() else ""
    if before:
        _check_header(next(csv.reader(io.StringIO(before))), path)
        if not before.endswith("\n"):
            raise ValueError(f"expected whole rows in {path}, got a last line cut short; delete that line")
    text = csv_text(records)
    write_text(path, before + text.split("\n", 1)[1] if before else text)


def read_csv(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file written by ``write_csv`` or ``append``.

    Raises FileNotFoundError where there is no such file, ValueError naming the line for anything that is no record.
    """
    path = Path(path)
    rows = csv.reader(io.StringIO(_read(path)))
    try:
        _check_header(next(rows, []), path)
        return [_record(row, f"{path}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        raise ValueError(f"expected CSV in {path}, line {rows.line_num}: {error}") from error


def _record(row: list[str], where: str) -> Record:
    if len(row) != len(COLUMNS):
        raise ValueError(
            f"expected {len(COLUMNS)} columns in {where}, got {len(row)}; delete the line if the file was cut off there"
        )
    text = dict(zip(COLUMNS, row, strict=True))
    value, seed = text.pop("value"), text.pop("seed")
    try:
        return Record(**text, value=float(value), seed=int(seed) if seed else None)
    except ValueError as error:
        raise ValueError(
            f"expected a number as value and a whole one or nothing as seed in {where}: {error}"
        ) from error


def _check_header(header: list[str], path: Path) -> None:
    if tuple(header) != COLUMNS:
        raise ValueError(
            f"expected the header {','.join(COLUMNS)} in {path}, got {','.join(header) or 'an empty file'}; "
            "pass a file of records written by medrobust"
        )


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a text file in UTF-8, got something else in {path}; pass records.csv") from error
