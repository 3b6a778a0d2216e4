"""Join the folder of one case into that of its run. Cut short at any point and done again, it ends the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from medrobust.atomic import WRITING
from medrobust.records import Record, append, read_csv, write_csv
from medrobust.run_tables import (
    MANIFEST,
    Prompt,
    Saved,
    manifest,
    read_failures,
    read_prompts,
    write_failures,
    write_manifest,
    write_prompts,
)

RECORDS = "records.csv"


def begin(part: Path, folder: Path, case: str) -> None:
    """Make the folder of one case, with what the run knows of it: it goes on from there."""
    part.mkdir(parents=True, exist_ok=True)
    known, own = _of(case, _records(folder)), _records(part)
    if known:
        write_csv([*own, *_beyond(own, known)], part / RECORDS)
    prompts = [prompt for prompt in read_prompts(folder) if prompt.case == case]
    if prompts:
        write_prompts(part, prompts)


def merge(part: Path, folder: Path, case: str) -> None:
    """Move volumes and pictures, then add the rows of the tables, records last; the part is gone then.

    The caller sees to it that nobody else merges into the run's folder meanwhile.
    """
    for kind in ("volumes", "pictures"):
        for path in sorted((part / kind).glob("*")):
            if path.is_file() and path.name != MANIFEST:
                (folder / kind).mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / kind / path.name)
    rows = _manifest(part / "volumes")
    if rows:
        new = {row.file for row in rows}
        kept = [row for row in _manifest(folder / "volumes") if row.file not in new]
        write_manifest(folder / "volumes", [*kept, *rows])
    prompts = read_prompts(part)
    if prompts:
        write_prompts(folder, [*(one for one in read_prompts(folder) if one.case != case), *prompts])
    note_failure(folder, case, read_failures(part).get(case))
    new_records = _beyond(_records(folder), _of(case, _records(part)))
    if new_records:
        append(new_records, folder / RECORDS)
    shutil.rmtree(part)


def sweep(folder: Path, age: float = 3600.0) -> None:
    """Delete the half-written files that a killed run left, unless somebody may still be writing them.

    Args:
        age: in seconds.
    """
    for kind in (".", "volumes", "pictures"):
        for left in (folder / kind).glob(WRITING + "*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime >= age:
                    shutil.rmtree(left)


def note_failure(folder: Path, case: str, why: str | None) -> None:
    """Add a failed case to ``failures.csv``, or take it out; the caller holds the lock of ``merge``."""
    failures = {name: text for name, text in read_failures(folder).items() if name != case}
    write_failures(folder, {**failures, case: why} if why else failures)


def in_order(folder: Path, cases: Sequence[str], conditions: Sequence[tuple[str, str]]) -> None:
    """Sort all tables by the order of cases and conditions (name, protocol), whatever order they ended in."""
    place = {case: index for index, case in enumerate(cases)}
    turn = {condition: index for index, condition in enumerate(conditions)}

    def key(row: Record | Saved) -> tuple[int, int]:
        return place.get(row.case, len(place)), turn.get((row.condition, row.protocol), len(turn))

    def of_case(row: Prompt) -> int:
        return place.get(row.case, len(place))

    records, rows, prompts = _records(folder), _manifest(folder / "volumes"), read_prompts(folder)
    failures = read_failures(folder)
    if records:
        write_csv(sorted(records, key=key), folder / RECORDS)
    if rows:
        write_manifest(folder / "volumes", sorted(rows, key=key))
    if prompts:
        write_prompts(folder, sorted(prompts, key=of_case))
    write_failures(folder, dict(sorted(failures.items(), key=lambda item: place.get(item[0], len(place)))))


def _records(folder: Path) -> list[Record]:
    return read_csv(folder / RECORDS) if (folder / RECORDS).is_file() else []


def _manifest(folder: Path) -> list[Saved]:
    return manifest(folder) if (folder / MANIFEST).is_file() else []


def _of(case: str, records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.case == case]


def _beyond(known: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """The records of conditions that are not known yet."""
    done = {(record.case, record.condition, record.protocol) for record in known}
    return [record for record in records if (record.case, record.condition, record.protocol) not in done]
