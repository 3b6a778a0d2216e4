"""Find DICOM series among the files of a tree: by what the files say, not by what they are called.

A series is what shares a SeriesInstanceUID, wherever it lies below INPUT; where an anonymiser has blanked that, what
lies in one folder. Where a series holds more than one volume it is split: localizers, frames of reference and
orientations always; image types and acquisitions only where slices would share a place. Objects without pixels
(reports, presentation states, structure sets) and those that are made of scans (segmentations, doses) are no cases and
are passed over. Whether a series is a volume is decided when it is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medrobust.batch.faults import CaseError

if TYPE_CHECKING:
    from medrobust.batch.dicom_header import Instance

NAMES = re.compile(r".*\.(dcm|dicom|dic|ima)|([a-z]+[._-]?)?\d+(\.\d+){3,}", re.IGNORECASE)
BLANK = "without-uid"
PARALLEL = 2e-3
"""Cosines that differ by less are of one orientation."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The files of one volume, or of what looks like one.

    Attributes:
        relative: its name below the root: the folder that holds all its files, and its SeriesInstanceUID; more behind
            that where the series holds several volumes.
        files: sorted; none where ``problem`` says what is wrong with a whole folder.
    """

    relative: str
    folder: Path
    files: tuple[Path, ...] = ()
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One image file, and what tells volumes apart. It lies at ``place`` below the root and is read at ``path``."""

    path: Path
    place: Path
    uid: str
    alone: bool
    hard: tuple[str, ...]
    soft: tuple[str, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    cut: bool


def may_be(name: str) -> bool:
    """Whether a file's name is one that DICOM files have: ``.dcm`` and the like, a UID, or no ending at all."""
    return name != "DICOMDIR" and ("." not in name or promises(name))


def promises(name: str) -> bool:
    """Whether a file's name says that it is DICOM: if it is none, that is reported."""
    return NAMES.fullmatch(name) is not None


def find_series(
    files: Mapping[Path, Path], root: Path, problems: Mapping[Path, tuple[str, str]] | None = None
) -> list[Series]:
    """The series among regular files, sorted by name.

    Files that cannot be read as DICOM though they are called so make the only series of their folder fail (it may lack
    a slice), else they are reported as one problem of the folder.

    Args:
        files: where to read a file -> where it lies below ``root``; these differ for links.
        problems: folder -> what is wrong with a file in it already.
    """
    able = importlib.util.find_spec("pydicom") is not None
    images: dict[str, list[_Entry]] = {}
    wrong = dict(problems or {})
    for path, place in sorted(files.items(), key=lambda item: os.fsencode(item[1])):
        try:
            if able:
                found = _entry(path, place)
                if found is not None:
                    images.setdefault(found[0], []).append(found[1])
            elif _sniff(path):
                raise CaseError("needs-extra", "DICOM is read with pydicom: pip install 'medrobust[dicom]'")
        except CaseError as error:
            if error.code != "not-dicom" or promises(place.name):
                wrong.setdefault(place.parent, (error.code, error.message))
    inside: dict[Path, set[str]] = {}
    for series, entries in images.items():
        for entry in entries:
            inside.setdefault(entry.place.parent, set()).add(series)
    lacking: dict[str, tuple[str, str]] = {}
    listed = []
    for folder, problem in wrong.items():
        if len(inside.get(folder, ())) == 1:
            lacking.setdefault(next(iter(inside[folder])), problem)
        else:
            listed.append(Series(relative=_below(folder, root), folder=folder, problem=problem))
    for series, entries in images.items():
        listed += _volumes(series, entries, root, lacking.get(series))
    return sorted(listed, key=lambda one: os.fsencode(one.relative))


def _below(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()


def _sniff(path: Path) -> bool:
    from medrobust.batch.stream import Stream

    with Stream(path, sniff=False) as stream:
        try:
            return (stream.file.read(132) or b"")[128:] == b"DICM"
        except OSError as error:
            raise CaseError("unreadable", f"the disk reports an error ({error.errno})", kind="failed") from None


def _entry(path: Path, place: Path) -> tuple[str, _Entry] | None:
    """An image file and its series; ``None`` for other objects."""
    from medrobust.batch.dicom_header import DERIVED, VOLUMES, read_header

    one = read_header(path)
    volume = one.sop_class in VOLUMES
    if one.sop_class in DERIVED or (not volume and min(one.rows, one.columns) < 1):
        return None
    plane = one.planes[0] if one.planes else None
    return one.series or f"/{os.fspath(place.parent)}", _Entry(
        path=path,
        place=place,
        uid=one.uid,
        alone=one.multiframe,
        hard=_hard(one),
        soft=("\\".join(one.image_type), one.acquisition),
        orientation=plane.orientation if plane else (),
        position=plane.position if plane else (),
        cut=min(one.rows, one.columns) < 1,
    )


def _hard(one: Instance) -> tuple[str, ...]:
    return (one.study, one.sop_class, one.frame_of_reference, str("LOCALIZER" in one.image_type))


def _volumes(series: str, entries: Sequence[_Entry], root: Path, problem: tuple[str, str] | None) -> list[Series]:
    """A series, split where it has to be."""
    if any(entry.cut for entry in entries):
        problem = problem or ("truncated", "a file ends before its header says how many rows and columns it has")
    parts = _split(entries) if problem is None else {(): list(entries)}
    folder = Path(os.path.commonpath([entry.place.parent for entry in entries]))
    below = _below(folder, root)
    called = BLANK if series.startswith("/") else series
    name = called if below == "." else f"{below}/{called}"
    return [
        Series(
            relative=name if len(parts) == 1 else f"{name}/{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}",
            folder=folder,
            files=tuple(entry.path for entry in part),
            problem=problem,
        )
        for key, part in parts.items()
    ]


def _split(entries: Sequence[_Entry]) -> Mapping[tuple[object, ...], list[_Entry]]:
    orientations: list[tuple[float, ...]] = []
    hard: dict[tuple[object, ...], list[_Entry]] = {}
    for entry in entries:
        hard.setdefault((*entry.hard, entry.uid if entry.alone else _known(entry, orientations)), []).append(entry)
    found: dict[tuple[object, ...], list[_Entry]] = {}
    for key, part in hard.items():
        found.update(_softly(key, part, (lambda entry: entry.soft[0], lambda entry: entry.soft[1])))
    return found


def _known(entry: _Entry, orientations: list[tuple[float, ...]]) -> tuple[float, ...]:
    """The first orientation that was seen and is about this one; seen in the order of paths, so always the same."""
    for known in orientations:
        if len(known) == len(entry.orientation) and all(
            abs(one - other) <= PARALLEL for one, other in zip(known, entry.orientation, strict=True)
        ):
            return known
    orientations.append(entry.orientation)
    return entry.orientation


def _softly(
    key: tuple[object, ...], entries: list[_Entry], ways: Sequence[Callable[[_Entry], str]]
) -> dict[tuple[object, ...], list[_Entry]]:
    """Split by one way after the other, as long as slices share a place."""
    positions = {entry.uid: entry.position for entry in entries}
    if not ways or len(set(positions.values())) == len(positions):
        return {key: entries}
    parts: dict[str, list[_Entry]] = {}
    for entry in entries:
        parts.setdefault(ways[0](entry), []).append(entry)
    found: dict[tuple[object, ...], list[_Entry]] = {}
    for value, part in parts.items():
        found.update(_softly((*key, value) if len(parts) > 1 else key, part, ways[1:]))
    return found
