"""What an archive offers and takes: Orthanc by its changes, any other by DICOMweb. Both feed one loop (``pacs``)."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medrobust.batch.pacs_http import GoneError, RefusedError, Server

UID = re.compile(r"[0-9.]{1,64}")
PLACE = re.compile(r"[0-9a-f-]{1,64}")
MODALITY, STUDY, SERIES, INSTANCE = "00080060", "0020000D", "0020000E", "00080018"
COUNT, STUDY_DATE, STORED = "00201209", "00080020", "00081199"
PAGE = 100
DICOM = 'multipart/related; type="application/dicom"'


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A series that seems complete.

    Attributes:
        place: what the archive calls it.
        position: where to go on after it.
    """

    place: str
    position: Any


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a series is: its UID, its modality, and SOPInstanceUID -> where to fetch that instance.

    Attributes:
        expected: how many instances the archive says it has; ``None``: it does not say.
    """

    uid: str
    modality: str
    instances: Mapping[str, str]
    expected: int | None = None


class Source(Protocol):
    """An archive."""

    first: Any
    """The position before everything."""

    def arrivals(self, position: Any) -> Iterator[Arrival]:
        """Series that became complete after ``position``, in order; ends when there are no more for now."""

    def series(self, place: str) -> Series:
        """Raises GoneError where it was deleted meanwhile."""

    def fetch(self, where: str, target: Path) -> None:
        """Write one instance to a file."""

    def store(self, content: bytes) -> None:
        """Put a DICOM file into the archive; one that it has already is not stored twice."""

    def remove(self, series_uid: str) -> bool:
        """Delete a SEG series of ours; ``False`` where this cannot be done."""

    def probe(self) -> None:
        """Ask for something cheap that is of no series; raises what the archive as a whole is in trouble with."""

    def again(self) -> None:
        """What ``arrivals`` told may not have been done."""

    def later(self, place: str) -> None:
        """Tell of a series once more when some time has passed, each time a longer one."""

    @property
    def waiting(self) -> bool:
        """Whether more will arrive if one waits a little."""

    @property
    def skipped(self) -> int:
        """How many series the last ``arrivals`` could not tell of, since the archive names them by what is no name."""


@dataclass(kw_only=True)
class Orthanc:
    """Follows ``/changes``; a position is the number of the last change."""

    server: Server
    first: Any = 0

    waiting: bool = False
    skipped: int = 0

    def arrivals(self, position: Any) -> Iterator[Arrival]:
        with understood():
            yield from self._arrivals(int(position))

    def probe(self) -> None:
        self.server.get("changes?last")

    def again(self) -> None:
        """The position says where to go on."""

    def later(self, place: str) -> None:
        """All instances are in one answer."""

    def _arrivals(self, since: int) -> Iterator[Arrival]:
        if since > int(_object(self.server.get("changes?last")).get("Last", 0)):
            since = 0  # a new archive, which counts from the beginning
        while True:
            page = _object(self.server.get(f"changes?since={since}&limit={PAGE}"))
            for change in _list(page, "Changes"):
                since = int(change["Seq"])
                if change.get("ChangeType") == "StableSeries":
                    yield Arrival(place=_place(change["ID"]), position=since)
            if page.get("Done", True) or not page["Changes"]:
                return

    def series(self, place: str) -> Series:
        with understood():
            tags = _object(self.server.get(f"series/{_place(place)}"))["MainDicomTags"]
            rows = _rows(self.server.get(f"series/{_place(place)}/instances"))
            return Series(
                uid=_uid(tags.get("SeriesInstanceUID")),
                modality=str(tags.get("Modality", "")),
                instances={_uid(row["MainDicomTags"]["SOPInstanceUID"]): _place(row["ID"]) for row in rows},
            )

    def fetch(self, where: str, target: Path) -> None:
        self.server.save(f"instances/{_place(where)}/file", target)

    def store(self, content: bytes) -> None:
        try:
            _stow(self.server, "dicom-web/studies", content)
        except GoneError:  # without its DICOMweb plugin
            self.server.post("instances", content, "application/dicom")

    def remove(self, series_uid: str) -> bool:
        with understood():
            for one in _rows(self.server.post("tools/lookup", _uid(series_uid).encode(), "text/plain")):
                if one.get("Type") == "Series" and self.series(one["ID"]).modality == "SEG":
                    self.server.delete(f"series/{_place(one['ID'])}")
        return True


@dataclass(kw_only=True)
class DicomWeb:
    """Asks again and again which series there are; one that has not changed for ``settle`` seconds is complete.

    Args:
        modalities: asked for.
        days: only studies of the last so many days, by their date; 0: all.
        settle: seconds.
    """

    server: Server
    modalities: Sequence[str]
    days: int = 3
    settle: float = 60.0
    first: Any = None
    skipped: int = 0
    _seen: dict[str, _Sight] = field(default_factory=dict)

    def arrivals(self, position: Any) -> Iterator[Arrival]:
        """There is no position to save: what was done is known by its instances."""
        before, now = self._seen, time.monotonic()
        self._seen, skipped = {}, 0
        with understood():
            for modality in self.modalities:
                for row in self._paged(self._question(modality), SERIES):
                    try:
                        place = f"studies/{_uid(_value(row, STUDY))}/series/{_uid(_value(row, SERIES))}"
                        sight = _Sight(count=int(_value(row, COUNT) or 0), modality=modality, since=now)
                    except (RefusedError, TypeError, ValueError, OverflowError):  # all others are done
                        skipped += 1
                        continue
                    known = before.get(place)
                    self._seen[place] = known if known and known.count == sight.count else sight
            self.skipped = skipped
            for place, sight in list(self._seen.items()):
                if not sight.told and now - sight.since >= self.settle:
                    sight.told = True
                    yield Arrival(place=place, position=None)

    def probe(self) -> None:
        self.server.get(f"{self._question(self.modalities[0])}limit=1", "application/dicom+json")

    def again(self) -> None:
        for sight in self._seen.values():
            sight.told = False

    def later(self, place: str) -> None:
        sight = self._seen[place]
        sight.told, sight.delays = False, min(sight.delays + 1, 10)
        sight.since = time.monotonic() + max(self.settle, 1.0) * (2**sight.delays - 1)

    @property
    def waiting(self) -> bool:
        return not all(sight.told for sight in self._seen.values())

    def series(self, place: str) -> Series:
        with understood():
            instances = [_uid(_value(row, INSTANCE)) for row in self._paged(f"{place}/instances?", INSTANCE)]
            return Series(
                uid=place.rpartition("/")[2],
                modality=self._seen[place].modality,
                instances={uid: f"{place}/instances/{uid}" for uid in instances},
                expected=self._seen[place].count or None,
            )

    def fetch(self, where: str, target: Path) -> None:
        kind = self.server.save(where, target, f"{DICOM}; transfer-syntax=*")
        _unpack(target, kind)

    def store(self, content: bytes) -> None:
        _stow(self.server, "studies", content)

    def remove(self, series_uid: str) -> bool:
        return False

    def _question(self, modality: str) -> str:
        words = f"{MODALITY}={modality}&includefield={COUNT}&"
        if self.days:
            begin = time.strftime("%Y%m%d", time.gmtime(time.time() - 86400 * self.days))
            words += f"{STUDY_DATE}={begin}-&"
        return f"series?{words}"

    def _paged(self, path: str, tag: str) -> Iterator[Mapping[str, Any]]:
        """Each row once, by its ``tag``. A page without a new one ends: some archives cap pages, or know no offset."""
        offset, seen = 0, set[str]()
        while True:
            rows = _rows(self.server.get(f"{path}limit={PAGE}&offset={offset}", "application/dicom+json"))
            new = {str(_value(row, tag) or row): row for row in rows}
            new = {name: row for name, row in new.items() if name not in seen}
            if not new:
                return
            yield from new.values()
            seen.update(new)
            offset += len(rows)


@dataclass(kw_only=True)
class _Sight:
    """How many instances a series had (0: the archive does not say), and since when."""

    count: int
    modality: str
    since: float
    told: bool = False
    delays: int = 0


@contextmanager
def understood() -> Iterator[None]:
    """An answer that is not what the standard says is refused, whatever it holds."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RefusedError(f"the archive's answer is not understood ({type(error).__name__})") from None


def _stow(server: Server, path: str, content: bytes) -> None:
    """Store one file, and see that the archive says so."""
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = head + content + f"\r\n--{boundary}--\r\n".encode()
    answer = server.post(path, body, f"{DICOM}; boundary={boundary}", "application/dicom+json")
    if not _value_of(_object(answer), STORED):
        raise RefusedError("the archive does not say that it has stored the SEG")


def _unpack(path: Path, kind: str) -> None:
    """Take the one part out of a multipart file, in place; anything else stays as it is."""
    match = re.search(r'boundary="?([^";]+)"?', kind)
    if not kind.startswith("multipart/") or match is None:
        return
    content = path.read_bytes()
    mark = b"--" + match[1].encode("latin-1", "replace")
    begin = content.find(b"\r\n\r\n")
    end = content.rfind(b"\r\n" + mark)
    if not content.lstrip(b"\r\n").startswith(mark) or begin < 0 or end <= begin:
        raise RefusedError("the archive sends an instance in pieces that do not fit")
    path.write_bytes(content[begin + 4 : end])


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise RefusedError("the archive answers with something that is no JSON") from None
    if not isinstance(found, dict):
        raise RefusedError("the archive answers with another kind of JSON")
    return found


def _rows(content: bytes) -> list[dict[str, Any]]:
    if not content.strip():  # 204: nothing there
        return []
    found = _object(b'{"rows":' + content + b"}")["rows"]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise RefusedError("the archive answers with another kind of JSON")
    return found


def _list(page: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = page.get(name)
    if not isinstance(found, list):
        raise RefusedError(f"the archive answers without {name}")
    return found


def _value_of(row: Mapping[str, Any], tag: str) -> list[Any]:
    found = row.get(tag)
    values = found.get("Value") if isinstance(found, dict) else None
    return values if isinstance(values, list) else []


def _value(row: Mapping[str, Any], tag: str) -> Any:
    return next(iter(_value_of(row, tag)), None)


def _uid(value: Any) -> str:
    if not isinstance(value, str) or not UID.fullmatch(value):
        raise RefusedError("the archive names something by what is no UID")
    return value


def _place(value: Any) -> str:
    if not isinstance(value, str) or not PLACE.fullmatch(value):
        raise RefusedError("the archive names something by what is none of its names")
    return value
