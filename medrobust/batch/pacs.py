"""Follow an archive: fetch each series that became complete, segment it as ``medrobust batch`` does, store the SEG.

Each series is done at least once, and its SEG has UIDs that follow from the series, the set of its instances and the
bundle: what is stored again is what the archive has already. So a SEG is there exactly once, wherever this was killed.

```
STATE/archive                   hash of the address that all this is about
STATE/position.json, series/    how far; what became of each series
STATE/in/                       instances that are being worked on; gone when their series is done
STATE/out/, out.private/        the folders of the batch; the SEG files are in the private one
```

STATE holds patient data. Names of files in it are made of hashes, never of what the archive sends.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydicom

from medrobust.atomic import write_text
from medrobust.batch import naming
from medrobust.batch.commit import Store, digest_of
from medrobust.batch.dicom_seg import SegWriter
from medrobust.batch.discovery import Search, discover
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.logs import Log
from medrobust.batch.pacs_http import AwayError, DeniedError, GoneError, RefusedError
from medrobust.batch.pacs_sources import Series, Source

AT_ONCE = 8
"""Series that are fetched before the batch begins with them."""
LONGEST_PAUSE = 300.0
MARK, STORED = ".instances", "stored"
DOUBLINGS = 10
"""Of the pause, at most: an archive may stay away for as many questions as no number has room for."""
Work = Callable[[Path, Path], Exit]
T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """What was done, on the disk: each file appears whole or not at all."""

    state: Path

    @property
    def inbox(self) -> Path:
        return self.state / "in"

    @property
    def fetching(self) -> Path:
        return self.state / "fetching"

    @property
    def output(self) -> Path:
        return self.state / "out"

    def prepare(self) -> None:
        """Make the folders, for the owner's eyes only, and drop what a killed run was fetching.

        The caller holds the lock.

        Raises:
            RunError: they cannot be made.
        """
        try:
            shutil.rmtree(self.fetching, ignore_errors=True)
            for folder in (self.inbox, self.fetching, self.state / "series"):
                folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise RunError(Exit.OUTPUT, f"STATE cannot be written to: {error.strerror}") from None

    def bind(self, url: str) -> None:
        """Tie STATE to its archive: positions and what was stored mean nothing in another.

        Raises:
            RunError: it is tied to another.
        """
        path, proof = self.state / "archive", hashlib.sha256(url.rstrip("/").encode()).hexdigest()
        if not path.exists():
            write_text(path, proof + "\n")
        if path.read_text(encoding="ascii", errors="replace").strip() != proof:
            raise RunError(
                Exit.USAGE, "STATE is that of another URL: choose another STATE (or remove STATE/archive, if it moved)"
            )

    def position(self, first: Any) -> Any:
        """Where to go on; ``first`` where nothing is known."""
        return _read(self.state / "position.json").get("position", first)

    def move(self, position: Any) -> None:
        """All before ``position`` is done."""
        write_text(self.state / "position.json", json.dumps({"position": position}) + "\n")

    def record(self, name: str) -> dict[str, Any]:
        """What became of a series; empty: nothing yet."""
        return _read(self._path(name))

    def keep(self, name: str, record: Mapping[str, Any]) -> None:
        """Write down what became of a series."""
        write_text(self._path(name), json.dumps(dict(record), indent=1, sort_keys=True) + "\n")

    def _path(self, name: str) -> Path:
        return self.state / "series" / name[-2:] / f"{name}.json"


@dataclass(kw_only=True)
class Desk:
    """Does what arrives.

    Args:
        work: does all cases of a folder, and keeps results and SEG files in another (``medrobust batch``).
        modalities: of the series that are fetched; the SEG that we store are of none of these.
        model: what makes the SEG, as JSON; a series that another model has done is not done.
        again: do series once more that had failed or were rejected.
        once: do not wait for a series of which the archive lists a part only.
        counts: how many series went which way.
    """

    source: Source
    memory: Memory
    work: Work
    log: Log
    modalities: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    once: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def drain(self) -> None:
        """Do all that there is now."""
        jobs: dict[str, Series] = {}
        position = self.memory.position(self.source.first)
        try:
            for arrival in self.source.arrivals(position):
                position = arrival.position
                jobs.update(self._receive(arrival.place))
                if not jobs or len(jobs) >= AT_ONCE:
                    self._finish(jobs, position)
                    jobs = {}
            self._finish(jobs, position)
            if self.source.skipped != self.counts.get("skipped", 0):  # told once, not each time
                self.counts["skipped"] = self.source.skipped
                self.log("skipped", level="warning", count=self.source.skipped)
        except BaseException:
            self.source.again()
            raise

    def follow(self, poll: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on for ever; while the archive is away, ask ever more rarely."""
        troubles = 0
        while True:
            try:
                self.drain()
                troubles = 0
            except (AwayError, GoneError, RefusedError) as error:
                troubles += 1
                self.log("away", level="error", reason=str(error))
            sleep(min(poll * 2 ** min(troubles, DOUBLINGS), max(LONGEST_PAUSE, poll)))

    def _ask(self, ask: Callable[[], T]) -> T:
        """Ask the archive for something of one series, which must not keep all others waiting.

        Raises:
            AwayError, RunError: the archive answers nothing else either.
            RefusedError: it answers, but not this; asked twice, since it may have been away and come back.
        """
        asked = 0
        while True:
            try:
                return ask()
            except (AwayError, DeniedError) as error:
                try:
                    self.source.probe()
                except (GoneError, RefusedError):
                    raise error from None
                asked += 1
                if asked == 2:
                    raise RefusedError(f"for this series alone: {error}") from None

    def _receive(self, place: str) -> dict[str, Series]:
        """Fetch a series if it is one for us and not done yet."""
        try:
            series = self._ask(lambda: self.source.series(place))
        except GoneError:
            self._count("gone")
            return {}
        except RefusedError as error:
            self._count("failed")
            self.log("failed", level="error", code="archive", reason=str(error))
            return {}
        if series.modality not in self.modalities:
            self._count("passed-over")
            return {}
        name, about, count = self._name(series), self._about(series), len(series.instances)
        if series.expected not in (None, count):
            self._incomplete(place, name, f"the archive says {series.expected} instances, and lists {count}")
            return {}
        if not count:
            self._count("passed-over")
            return {}
        before = self.memory.record(name)
        ended = ("done",) if self.again else ("done", "failed", "rejected")
        if all(before.get(key) == value for key, value in about.items()) and before["status"] in ended:
            self._count("known")
            return {}
        self.log("fetch", series=name, instances=count, late=bool(before))
        try:
            self._fetch(name, series)
        except GoneError:
            if self._gone(place):
                self._count("gone")
            else:
                self._fail(name, "the archive lists an instance that it does not have", about)
            return {}
        except RefusedError as error:
            self._fail(name, str(error), about)
            return {}
        return {name: series}

    def _about(self, series: Series) -> dict[str, Any]:
        """What a series has to be the same in to be known."""
        return {"instances": _digest(series), "model": dict(self.model)}

    def _incomplete(self, place: str, name: str, reason: str) -> None:
        if self.once:
            self._fail(name, reason, {})  # without its instances: the next run asks again
        else:
            self.log("incomplete", level="warning", series=name, reason=reason)
            self.source.later(place)

    def _gone(self, place: str) -> bool:
        """Whether the whole series is."""
        try:
            return not self._ask(lambda: self.source.series(place)).instances
        except GoneError:
            return True
        except RefusedError:
            return False

    def _fail(self, name: str, reason: str, about: Mapping[str, Any]) -> None:
        """The archive is at fault. What we stored of the series earlier is not forgotten."""
        before = self.memory.record(name)
        kept: dict[str, Any] = {key: before[key] for key in ("stored", "superseded") if key in before}
        self._keep(name, {**kept, **about, "status": "failed", "code": "archive", "reason": reason})

    def _fetch(self, name: str, series: Series) -> None:
        target, partial = self.memory.inbox / name, self.memory.fetching / name
        mark, digest = target / MARK, _digest(series)
        if mark.is_file() and mark.read_text(encoding="ascii") == digest:
            return
        for folder in (target, partial):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(mode=0o700)
        for uid, where in series.instances.items():
            self._get(where, partial / f"{hashlib.sha256(uid.encode()).hexdigest()[:32]}.dcm")
        (partial / MARK).write_text(digest, encoding="ascii")
        os.rename(partial, target)

    def _get(self, where: str, path: Path) -> None:
        self._ask(lambda: self.source.fetch(where, path))

    def _finish(self, jobs: Mapping[str, Series], position: Any) -> None:
        if jobs:
            self._do(jobs)
        if position != self.memory.position(self.source.first):
            self.memory.move(position)

    def _do(self, jobs: Mapping[str, Series]) -> None:
        for left in self.memory.inbox.iterdir():
            if left.name not in jobs:
                shutil.rmtree(left, ignore_errors=True)
        code = self.work(self.memory.inbox, self.memory.output)
        if code not in (Exit.DONE, Exit.SOME_FAILED, Exit.NOTHING_FOUND):
            raise RunError(code, "the batch could not go on: see STATE/out and STATE/out.private")
        keys = self._keys() if code != Exit.NOTHING_FOUND else {}
        for name, series in jobs.items():
            self._settle(name, series, keys.get(name, []))
            shutil.rmtree(self.memory.inbox / name, ignore_errors=True)

    def _keys(self) -> dict[str, list[str]]:
        """Series -> names of its cases; mostly one."""
        secret = naming.secret_of(naming.private_folder(self.memory.output))
        found: dict[str, list[str]] = {}
        for one in discover(self.memory.inbox, Search()):
            found.setdefault(one.relative.split("/")[0], []).append(naming.case_key(secret, one.relative))
        return found

    def _settle(self, name: str, series: Series, keys: list[str]) -> None:
        """Store what was made of a series, and write down what became of it."""
        store = Store(self.memory.output)
        results = [store.done(key, None, check=False) or store.failed(key) or {} for key in keys]
        stored: list[str] = []
        faults: list[Mapping[str, Any]] = [] if results else [{}]
        for one in results:
            if one.get("status") != "done":
                faults.append(one)
                continue
            try:
                stored.append(self._store(one))
            except (GoneError, RefusedError) as error:
                faults.append({"status": "failed", "code": "not-stored", "reason": str(error)})
        before = self.memory.record(name)
        old = {*before.get("stored", []), *before.get("superseded", [])}
        record = {**self._about(series), "count": len(series.instances), "stored": stored}
        record |= {"status": STORED, "superseded": sorted(old - {*stored})}
        if faults:  # which of the earlier SEG were of the cases that failed now is not known: all of them stay
            fault = {"status": "rejected", "code": "no-volume", "reason": "", **faults[0]}
            self._keep(name, {**record, **{key: fault[key] for key in ("status", "code", "reason")}})
            return
        self.memory.keep(name, record)  # so that what is to be taken away is known if the archive goes away now
        left = [uid for uid in record["superseded"] if not self._remove(uid)]
        if left:
            self.log("superseded-kept", level="warning", series=name, count=len(left))
        self._keep(name, {**record, "status": "done", "superseded": left})

    def _store(self, done: Mapping[str, Any]) -> str:
        """Store the SEG of a case; returns the UID of its series."""
        writer = SegWriter(private=naming.private_folder(self.memory.output))
        if not done.get("dicom_seg") or not writer.holds(done["case"], done):
            raise RefusedError("the SEG of a case is not the one that was written")
        path = writer.path_of(done["case"])
        content = path.read_bytes()
        self._ask(lambda: self.source.store(content))
        return str(
            pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID
        )

    def _remove(self, uid: str) -> bool:
        try:
            return self._ask(lambda: self.source.remove(uid))
        except (GoneError, RefusedError):
            return False

    def _keep(self, name: str, record: Mapping[str, Any]) -> None:
        self.memory.keep(name, record)
        status = record["status"]
        self._count(status)
        told = {key: record[key] for key in ("code", "reason") if record.get(key)}
        self.log(status, level="info" if status == "done" else "error", series=name, **told)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _name(self, series: Series) -> str:
        """A name without the UID, the same for as long as STATE is."""
        secret = naming.secret_of(naming.private_folder(self.memory.output))
        return f"series-{hmac.new(secret, series.uid.encode(), hashlib.sha256).hexdigest()[:16]}"


def _digest(series: Series) -> str:
    return digest_of(sorted(series.instances))


def _read(path: Path) -> dict[str, Any]:
    """A file of ours; one that is not there, or not one, is empty: its work is done again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
