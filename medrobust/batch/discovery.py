"""Find the volumes below a folder, or in a data list: always in the same order, each once, nothing left out in silence.

Folders are walked to any depth (Patient/Study/Series trees, flat folders). What cannot be a case is passed over: hidden
files, ``._*``, ``Thumbs.db``, files that are still being copied, OUTPUT itself. What looks like a case but is none
(a link out of the tree, a pipe, a folder that cannot be opened) is found with its ``problem``, so that it is reported.
NIfTI files are cases by their names; DICOM files are opened, and the series that they make are cases (``dicom_index``).
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from medrobust.batch.dicom_index import find_series, may_be, promises
from medrobust.batch.faults import Exit, RunError

ENDINGS = (".nii", ".nii.gz")
UNFINISHED = ("~", ".tmp", ".part", ".partial", ".crdownload", ".filepart")
BIDS_ASIDE = ("derivatives", "sourcedata", "code", "stimuli")
BIDS_NO_IMAGE = ("mask", "dseg", "probseg", "bold", "dwi", "sbref")
LIST_BYTES, LIST_CASES = 1 << 26, 1_000_000
NO_FILE = ("not-a-file", "a pipe, a socket or a device")


@dataclass(frozen=True, kw_only=True)
class Found:
    """One candidate.

    Attributes:
        relative: its path below the root, with ``/``; what it is named by.
        path: where to read it, without symbolic links; the folder of a DICOM series.
        files: of a DICOM series, sorted; none for NIfTI.
        label: its reference labels, from a data list.
        problem: code and message of what is wrong with it already.
    """

    relative: str
    path: Path
    files: tuple[Path, ...] = ()
    label: Path | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """What counts as a case.

    Args:
        layout: ``"auto"`` (BIDS where ``dataset_description.json`` lies in the root), ``"tree"`` or ``"bids"``.
        include, exclude: shell patterns on the path below the root; ``*`` also matches ``/``.
        aside: folders that are not walked, such as OUTPUT.
        outside: follow links and entries of data lists that leave the root.
        section: of a Decathlon data list.
    """

    layout: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    aside: Sequence[Path] = ()
    outside: bool = False
    section: str = "validation"

    def __post_init__(self) -> None:
        if self.layout not in ("auto", "tree", "bids"):
            raise RunError(Exit.USAGE, f"expected --layout auto, tree or bids, got {self.layout!r}")


def discover(root: Path, search: Search | None = None) -> list[Found]:
    """Every case in a folder, in a data list (``.json``, ``.csv``), or the one file itself; sorted by path.

    Raises:
        RunError: the root cannot be read, or the list is none.
    """
    search = search or Search()
    try:
        kind = os.stat(root).st_mode
    except (OSError, ValueError) as error:
        raise RunError(Exit.INPUT, f"INPUT cannot be read ({type(error).__name__})") from None
    if stat.S_ISREG(kind) and root.suffix.lower() in (".json", ".csv"):
        found = _listed(root, search)
    elif stat.S_ISREG(kind):
        path = root.resolve()
        series = [] if root.name.lower().endswith(ENDINGS) else _series({path: path}, {}, path.parent)
        found = series or [Found(relative=root.name, path=path)]
    elif stat.S_ISDIR(kind):
        found = list(_walked(root.resolve(), search))
    else:
        raise RunError(Exit.INPUT, "expected a folder, a data list, a NIfTI or a DICOM file as INPUT")
    wanted = [one for one in found if _wanted(one.relative, search)]
    return sorted(wanted, key=lambda one: os.fsencode(one.relative))


def _wanted(relative: str, search: Search) -> bool:
    if search.include and not any(fnmatchcase(relative, pattern) for pattern in search.include):
        return False
    return not any(fnmatchcase(relative, pattern) for pattern in search.exclude)


def _walked(root: Path, search: Search) -> Iterator[Found]:
    bids = search.layout == "bids" or (search.layout == "auto" and (root / "dataset_description.json").is_file())
    aside = {path.resolve() for path in search.aside}
    links: list[tuple[str, Path]] = []
    seen: set[Path] = set()
    dicom_links: list[tuple[str, Path]] = []
    slices: dict[Path, Path] = {}
    wrong: dict[Path, tuple[str, str]] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            if folder == root:
                raise RunError(Exit.INPUT, "INPUT cannot be read") from None
            relative = _relative(folder, root)
            yield Found(relative=relative, path=folder, problem=("unreadable", "the folder cannot be opened"))
            continue
        for entry in entries:
            path, name = folder / entry.name, entry.name.lower()
            if name.startswith(".") or name == "thumbs.db" or name.endswith(UNFINISHED):
                continue
            if entry.is_dir(follow_symlinks=False):
                if path not in aside and not (bids and folder == root and entry.name in BIDS_ASIDE):
                    waiting.append(path)
            elif name.endswith(ENDINGS) and not (bids and _no_image(name)):
                relative = _relative(path, root)
                if entry.is_symlink():
                    links.append((relative, path))
                elif entry.is_file(follow_symlinks=False):
                    seen.add(path)
                    yield Found(relative=relative, path=path)
                else:
                    yield Found(relative=relative, path=path, problem=NO_FILE)
            elif may_be(entry.name):
                if entry.is_symlink():
                    dicom_links.append((_relative(path, root), path))
                elif entry.is_file(follow_symlinks=False):
                    slices[path] = path
                elif promises(entry.name):
                    wrong.setdefault(folder, NO_FILE)
    for relative, path in sorted(links):
        found = _linked(relative, path, root, search.outside)
        if found.path not in seen:  # a link to a case that was found is that case
            seen.add(found.path)
            yield found
    for relative, path in sorted(dicom_links):
        found = _linked(relative, path, root, search.outside)
        if found.problem is None:
            slices.setdefault(found.path, path)
        elif promises(path.name):
            wrong.setdefault(path.parent, found.problem)
    yield from _series(slices, wrong, root)


def _series(files: Mapping[Path, Path], wrong: Mapping[Path, tuple[str, str]], root: Path) -> list[Found]:
    return [
        Found(relative=one.relative, path=one.folder, files=one.files, problem=one.problem)
        for one in find_series(files, root, wrong)
    ]


def _linked(relative: str, path: Path, root: Path, outside: bool) -> Found:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return Found(relative=relative, path=path, problem=("broken-link", "the link leads nowhere or to itself"))
    if not target.is_file():
        return Found(relative=relative, path=path, problem=("not-a-file", "the link leads to no regular file"))
    if not outside and root not in target.parents:
        hint = "the link leaves INPUT (--allow-outside-root follows it)"
        return Found(relative=relative, path=path, problem=("outside-root", hint))
    return Found(relative=relative, path=target)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _no_image(name: str) -> bool:
    return name.removesuffix(".gz").removesuffix(".nii").rpartition("_")[2] in BIDS_NO_IMAGE


def _listed(path: Path, search: Search) -> list[Found]:
    """The entries of a list; paths in it are below its folder."""
    if path.stat().st_size > LIST_BYTES:
        raise RunError(Exit.USAGE, f"expected a data list of at most {LIST_BYTES >> 20} MB")
    try:
        text = path.read_text(encoding="utf-8")
        rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text, search.section)
    except (ValueError, RecursionError, csv.Error) as error:
        raise RunError(Exit.USAGE, f"expected a data list, got: {error}") from None
    if len(rows) > LIST_CASES:
        raise RunError(Exit.USAGE, f"expected at most {LIST_CASES} cases in the data list, got {len(rows)}")
    root = path.resolve().parent
    found: dict[str, Found] = {}
    for index, row in enumerate(rows):
        image, label = row.get("image"), row.get("label")
        if not isinstance(image, str) or not image or not isinstance(label, str | None):
            raise RunError(Exit.USAGE, f"expected an image (and perhaps a label) as text in entry {index} of the list")
        one = _entry(image, label or None, root, search.outside, index)
        if one.relative in found:
            raise RunError(Exit.USAGE, f"expected each image once in the data list, got that of entry {index} again")
        found[one.relative] = one
    return list(found.values())


def _entry(image: str, label: str | None, root: Path, outside: bool, index: int) -> Found:
    targets: list[Path] = []
    for name in (image, label):
        if name is None:
            continue
        if "\0" in name:
            raise RunError(Exit.USAGE, f"expected paths in entry {index} of the data list")
        target = Path(os.path.realpath(root / name))
        if not outside and root not in target.parents:
            hint = "pass --allow-outside-root to read it"
            raise RunError(Exit.USAGE, f"entry {index} of the data list leaves the list's folder: {hint}")
        targets.append(target)
    relative = os.path.normpath(image).replace(os.sep, "/")
    problem = None if targets[0].exists() else ("missing", "the data list names a file that is not there")
    return Found(relative=relative, path=targets[0], label=targets[1] if label else None, problem=problem)


def _csv_rows(text: str) -> list[Mapping[str, Any]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or "image" not in rows[0]:
        raise ValueError("no column 'image'")
    return list(rows)


def _json_rows(text: str, section: str) -> list[Mapping[str, Any]]:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice in one object")
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f"the number {name}")

    content = json.loads(text, object_pairs_hook=once, parse_constant=constant)
    rows = content.get(section) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        sections = sorted(content) if isinstance(content, dict) else []
        known = [name for name in sections if isinstance(content[name], list)]
        raise ValueError(f"no section {section!r} of cases; there are {', '.join(known) or 'none'}")
    found = [row if isinstance(row, dict) else {"image": row} for row in rows]
    return [{**row, "image": row["image"][0]} if _single(row.get("image")) else row for row in found]


def _single(image: object) -> bool:
    return isinstance(image, list) and len(image) == 1
