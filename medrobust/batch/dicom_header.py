"""The header of one DICOM file, without trusting it: the few values that place its slices, never its free text.

Values are taken from their bytes, so that nothing of a header comes into a warning or a message; at most 16 MB are
looked at; links are not followed.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.filereader import read_dataset

from medrobust.batch.faults import CaseError
from medrobust.batch.stream import Stream

PEEK, LARGEST = 1 << 13, 1 << 24
"""Bytes in which the file meta information ends, and of a header in all."""
UID = re.compile(r"[0-9A-Za-z._-]{1,64}")
DEFLATED = "1.2.840.10008.1.2.1.99"
_STORAGE = "1.2.840.10008.5.1.4.1.1."
VOLUMES = {_STORAGE + tail for tail in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130")}
"""CT, MR and PET; classic, enhanced, and classic converted to enhanced."""
DERIVED = {_STORAGE + tail for tail in ("66.4", "66.7", "30", "481.2", "481.1")}
"""Segmentations, label maps, parametric maps, doses and RT images: they have rows and columns, yet are no scan."""
TAGS = {
    "sop_class": 0x00080016,
    "uid": 0x00080018,
    "study": 0x0020000D,
    "series": 0x0020000E,
    "frame_of_reference": 0x00200052,
    "modality": 0x00080060,
    "image_type": 0x00080008,
    "acquisition": 0x00200012,
    "number": 0x00200013,
    "position": 0x00200032,
    "orientation": 0x00200037,
    "spacing": 0x00280030,
    "samples": 0x00280002,
    "photometric": 0x00280004,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "allocated": 0x00280100,
    "representation": 0x00280103,
    "padding": 0x00280120,
    "padding_limit": 0x00280121,
    "inter": 0x00281052,
    "slope": 0x00281053,
    "lut": 0x00283000,
    "shared": 0x52009229,
    "per_frame": 0x52009230,
}
META = {"sop_class": 0x00020002, "uid": 0x00020003}
"""Where the file meta information repeats what anonymisers blank in the data set."""
GROUPS = {"position": 0x00209113, "orientation": 0x00209116, "spacing": 0x00289110, "slope": 0x00289145}
"""Where multi-frame objects hold what classic ones have at the top."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One slice: its first voxel's centre, its rows' and columns' cosines (LPS), its sides in mm, its scaling."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    slope: float = 1.0
    inter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What one file says. Numbers that it lacks are -1, texts ``""`` (also a series that was blanked)."""

    uid: str
    study: str
    series: str
    frame_of_reference: str
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    acquisition: str
    number: str
    syntax: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    allocated: int
    signed: bool
    padding: tuple[int, int] | None
    lut: bool
    planes: tuple[Plane, ...]

    @property
    def multiframe(self) -> bool:
        return self.sop_class in VOLUMES and self.sop_class.rpartition(_STORAGE)[2] not in ("2", "4", "128")


def read_header(path: str | os.PathLike[str]) -> Instance:
    """The header of a DICOM file.

    Raises:
        CaseError: it is none, it is cut before its series is named, or it is refused as too large.
    """
    with Stream(path, sniff=False) as stream:
        file = io.BufferedReader(stream.file, PEEK)
        try:
            with quiet():
                syntax = transfer_syntax(file.peek(PEEK))
                found = pydicom.dcmread(
                    _Bounded(file, stream.size),  # type: ignore[arg-type]
                    stop_before_pixels=True,
                    specific_tags=list(TAGS.values()),
                )
                return instance_of(found, syntax)
        except (CaseError, MemoryError):
            raise
        except Exception as error:
            raise broken(error) from None
        finally:
            file.detach()


def broken(error: BaseException) -> CaseError:
    """What a library's complaint becomes: its text may hold the header's."""
    return CaseError("bad-dicom", f"the file cannot be read as DICOM ({type(error).__name__})")


@contextmanager
def quiet() -> Iterator[None]:
    """The library warns with values of the header: not here."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before


class _Bounded:
    """A file that gives at most ``LARGEST`` bytes, and never asks for more than there are."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self.file, self.size, self.left = file, size, LARGEST
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= PEEK:
            rest = max(0, self.size - self.tell())
            count = rest if count < 0 else min(count, rest)
        self.left -= count
        if self.left < 0:
            raise CaseError("oversized", f"expected at most {LARGEST >> 20} MB of header")
        return self.file.read(count)


def is_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM files do."""
    return head[128:132] == b"DICM"


def transfer_syntax(head: bytes) -> str:
    """How the data set of a file is written, from the file meta information, as pydicom will take it.

    Raises:
        CaseError: the file is no DICOM file, or its header is compressed, which can make any size of a few bytes.
    """
    if not is_dicom(head):
        raise CaseError("not-dicom", "the file has no DICOM mark at byte 128")
    file = io.BytesIO(head)
    file.seek(132)
    try:
        meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
        syntax = str(meta[0x00020010].value).strip(" \0")
    except Exception as error:
        raise CaseError("bad-dicom", f"the file does not say how it is written ({type(error).__name__})") from None
    if len(head) >= PEEK and file.tell() >= len(head):
        raise CaseError("bad-dicom", "the file meta information does not end where it should")
    if syntax == DEFLATED:
        raise CaseError("compressed", "the header is deflated: save the files in another transfer syntax")
    return syntax


def instance_of(found: Dataset, syntax: str) -> Instance:
    """The values of a data set that was read.

    Raises:
        CaseError: it does not say which series it is of, or a value is none of its kind.
    """
    uids = {name: _text(found, TAGS[name]) for name in ("uid", "study", "series", "frame_of_reference", "sop_class")}
    for name, tag in META.items():
        uids[name] = uids[name] or _text(found.file_meta, tag)
    blanked = TAGS["series"] in found and not uids["series"]
    if not all(UID.fullmatch(uids[name]) or (blanked and name == "series") for name in ("uid", "series", "sop_class")):
        raise CaseError("bad-dicom", "the file does not say which instance of which series it is: was it cut?")
    whole = {name: _whole(found, TAGS[name]) for name in ("rows", "columns", "samples", "allocated", "representation")}
    frames = _text(found, TAGS["frames"])
    return Instance(
        **uids,
        modality=_text(found, TAGS["modality"]),
        image_type=tuple(_text(found, TAGS["image_type"]).split("\\")),
        acquisition=_text(found, TAGS["acquisition"]),
        number=_text(found, TAGS["number"]),
        syntax=syntax,
        rows=whole["rows"],
        columns=whole["columns"],
        frames=int(frames) if frames else 1,
        samples=whole["samples"],
        photometric=_text(found, TAGS["photometric"]),
        allocated=whole["allocated"],
        signed=whole["representation"] == 1,
        padding=_padding(found, signed=whole["representation"] == 1),
        lut=TAGS["lut"] in found,
        planes=_planes(found),
    )


def _planes(found: Dataset) -> tuple[Plane, ...]:
    if TAGS["per_frame"] not in found:
        return (_plane([found]),)
    shared = list(found.get(TAGS["shared"]).value) if TAGS["shared"] in found else []
    return tuple(_plane([frame, *shared]) for frame in found[TAGS["per_frame"]].value)


def _plane(places: Sequence[Dataset]) -> Plane:
    """From the first of some data sets, or of their functional groups, that has each value."""

    def numbers(name: str, group: str | None = None) -> tuple[float, ...]:
        for place in places:
            inside = place.get(GROUPS[group or name])
            holders = [place, *(inside.value if inside is not None else ())]
            for holder in holders:
                if text := _text(holder, TAGS[name]):
                    return tuple(float(value) for value in text.split("\\"))
        return ()

    slope, inter = numbers("slope") or (1.0,), numbers("inter", "slope") or (0.0,)
    return Plane(
        position=numbers("position"),
        orientation=numbers("orientation"),
        spacing=numbers("spacing"),
        slope=slope[0],
        inter=inter[0],
    )


def _bytes(found: Dataset, tag: int) -> bytes:
    if tag not in found:
        return b""
    element: Any = found.get_item(tag)
    if not isinstance(element.value, bytes):
        return b""
    if len(element.value) < getattr(element, "length", 0):
        raise CaseError("truncated", "a file ends inside its header")
    return element.value


def _text(found: Dataset, tag: int) -> str:
    return _bytes(found, tag).decode("latin-1").strip(" \0")


def _whole(found: Dataset, tag: int, *, signed: bool = False) -> int:
    value = _bytes(found, tag)
    if len(value) < 2:
        return -1
    little = getattr(found.get_item(tag), "is_little_endian", True)
    return int.from_bytes(value[:2], "little" if little else "big", signed=signed)


def _padding(found: Dataset, *, signed: bool) -> tuple[int, int] | None:
    if len(_bytes(found, TAGS["padding"])) < 2:
        return None
    value = _whole(found, TAGS["padding"], signed=signed)
    limit = value
    if len(_bytes(found, TAGS["padding_limit"])) >= 2:
        limit = _whole(found, TAGS["padding_limit"], signed=signed)
    return min(value, limit), max(value, limit)


def finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)
