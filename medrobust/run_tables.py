"""The small tables of a run's folder: failures, prompts, and the manifest of its volumes."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from medrobust.atomic import write_text
from medrobust.evaluation import Condition, slug


class Prompt(NamedTuple):
    """A row of ``prompts.csv``: which text a case had, and the key it was under."""

    case: str
    key: str
    text: str


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a run; none where its network reads no text."""
    path = folder / "prompts.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [Prompt(*row) for row in list(csv.reader(stream))[1:]]


def write_prompts(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Write what :func:`read_prompts` reads."""
    write_text(folder / "prompts.csv", _csv([Prompt._fields, *prompts]))


def volume_name(case: str, condition: Condition) -> str:
    """File name of an adversarial volume: ``ct_b__PGD__whole-volume__adv.nii.gz``."""
    return f"{case}__{slug(condition)}__adv.nii.gz"


MANIFEST = "manifest.csv"


class Saved(NamedTuple):
    """A row of the manifest: an adversarial volume and what made it, toward which goal (as typed; empty: none)."""

    file: str
    case: str
    condition: str
    protocol: str
    attack: str
    seed: str
    sha256: str
    goal: str = ""


def manifest(folder: Path) -> list[Saved]:
    """What a run's ``volumes`` folder holds.

    Raises:
        FileNotFoundError, ValueError: there is no manifest, or it is none.
    """
    table = folder / MANIFEST
    if not table.is_file():
        raise FileNotFoundError(f"expected {MANIFEST} of an earlier run in {folder}, got none")
    with table.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    if tuple(header) != Saved._fields or any(len(row) != len(header) for row in rows):
        raise ValueError(f"expected the columns {', '.join(Saved._fields)} in {table}, got {', '.join(header)}")
    return [Saved(*row) for row in rows]


def fingerprint(folder: Path) -> str:
    """What tells the volumes of one run's folder from those of another: a hash of the manifest, in whatever order.

    Raises:
        FileNotFoundError, ValueError: as :func:`manifest`.
    """
    return hashlib.sha256(_csv(sorted(manifest(folder))).encode()).hexdigest()[:12]


def write_manifest(folder: Path, rows: Iterable[Saved]) -> None:
    """Write what :func:`manifest` reads."""
    write_text(folder / MANIFEST, _csv([Saved._fields, *rows]))


def read_failures(folder: Path) -> dict[str, str]:
    """The failed cases of a run and why."""
    path = folder / "failures.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["case"]: row["reason"] for row in csv.DictReader(stream)}


def write_failures(folder: Path, failures: Mapping[str, str]) -> None:
    """Write what :func:`read_failures` reads."""
    path = folder / "failures.csv"
    if failures:
        write_text(path, _csv([["case", "reason"], *([case, why] for case, why in failures.items())]))
    elif path.is_file():
        path.unlink()


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
