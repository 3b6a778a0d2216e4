"""OUTPUT: a case appears whole, by one rename, or not at all.

```
cases/<case>/         seg.nii.gz, what else was made, and case.json, which says what it was made of
quarantine/<case>/    reason.json; previous/ is a result of other settings that the failed one did not replace
.state/               locks, staging (swept), the runs and their events
cases.csv, failures.csv, records.csv, summary.json, report.md, report.html    made from the two folders above
```

A case is done if its ``case.json`` can be read, was made of the same input, bundle and settings (by their hashes), and
every file that it names has the recorded hash. That a file is there proves nothing. Everything is first written and
flushed below ``.state/staging``, on the same file system; a process that is killed leaves its traces there only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrobust.atomic import flush
from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.locks import BusyError, hold
from medrobust.batch.naming import KEY, folder_of
from medrobust.hashing import sha256_of_file

SCHEMA = 1
RECORD, REASON = "case.json", "reason.json"
LARGEST_RECORD = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a result is made of, each as SHA-256; the same three make the same result."""

    input: str
    bundle: str
    settings: str

    def of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of these."""
        return record.get("made_of") == vars(self)


@dataclass(frozen=True)
class Store:
    """The folder OUTPUT."""

    output: Path

    @property
    def cases(self) -> Path:
        return self.output / "cases"

    @property
    def quarantine(self) -> Path:
        return self.output / "quarantine"

    @property
    def state(self) -> Path:
        return self.output / ".state"

    @property
    def staging(self) -> Path:
        return self.state / "staging"

    def prepare(self) -> None:
        """Make the folders, see that they can be written to, and sweep what killed runs left.

        Raises:
            RunError: they cannot.
        """
        try:
            for folder in (self.cases, self.quarantine, self.staging, self.state / "locks", self.state / "runs"):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.staging / f"probe.{uuid.uuid4().hex}"
            _write(probe, "x")
            probe.unlink(missing_ok=True)  # another run may have swept it
        except OSError as error:
            raise RunError(Exit.OUTPUT, f"OUTPUT cannot be written to: {error.strerror}") from None
        self.sweep()

    def sweep(self) -> None:
        """Delete what is left in staging of cases that nobody works on."""
        for left in sorted(self.staging.iterdir()):
            key = left.name.partition(".")[0]
            try:
                with self.lock(key if KEY.fullmatch(key) else "report"):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink(missing_ok=True)
            except BusyError:
                continue

    def check_space(self, needed: int) -> None:
        """See that so many bytes are free, before the work is done that could not be written.

        Raises:
            CaseError: they are not.
        """
        free = shutil.disk_usage(self.output).free
        if free < needed:
            text = f"the case may need {needed >> 10} KB in OUTPUT, {free >> 10} KB are free"
            raise CaseError("disk-full", text, kind="failed")

    @contextmanager
    def lock(self, name: str, *, wait: float = 0.0) -> Iterator[None]:
        """Hold the lock of a case, or ``"report"``; raises BusyError."""
        with hold(self.state / "locks" / name, wait=wait):
            yield

    @contextmanager
    def stage(self, key: str) -> Iterator[Path]:
        """A new folder for the files of a case; what is not committed from it goes with the block."""
        folder = self.staging / f"{key}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, key: str, folder: Path, made: Made, about: Mapping[str, Any]) -> dict[str, Any]:
        """Put a staged folder in its place: the record of its files is written last, then one rename.

        The caller holds the lock of the case.
        """
        outputs = {
            path.name: {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
        }
        record = {"schema": SCHEMA, "case": key, "status": "done", "attempt": uuid.uuid4().hex}
        record |= {"made_of": vars(made), "outputs": outputs, **about}
        _write(folder / RECORD, _json(record))
        flush(folder)
        final = folder_of(self.cases, key)
        if final.exists():
            os.rename(final, folder.with_name(folder.name + ".old"))
        os.rename(folder, final)
        flush(self.cases)
        shutil.rmtree(folder.with_name(folder.name + ".old"), ignore_errors=True)
        self.forgive(key)
        return record

    def refuse(self, key: str, made: Made | None, fault: CaseError, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write down why a case failed; a result of other settings moves out of ``cases``.

        The caller holds the lock of the case.
        """
        record = {"schema": SCHEMA, "case": key, "status": fault.kind, "attempt": uuid.uuid4().hex}
        record |= {"code": fault.code, "reason": fault.message, "made_of": vars(made) if made else None, **about}
        place = folder_of(self.quarantine, key)
        done = folder_of(self.cases, key)
        with self.stage(key) as folder:
            _write(folder / REASON, _json(record))
            place.mkdir(exist_ok=True)
            if done.exists():  # first, so that a result beside a reason is always the newer one
                shutil.rmtree(place / "previous", ignore_errors=True)
                os.rename(done, place / "previous")
            os.replace(folder / REASON, place / REASON)
            flush(place)
            flush(self.quarantine)
        return record

    def forgive(self, key: str) -> None:
        """Take a case that was done out of quarantine."""
        place = folder_of(self.quarantine, key)
        if place.exists():
            with self.stage(key) as folder:
                os.rename(place, folder / "quarantine")

    def done(self, key: str, made: Made | None, *, check: bool = True) -> dict[str, Any] | None:
        """The record of a case that is done.

        Args:
            made: of what it has to be made; ``None``: of anything.
            check: hash its files.

        Raises:
            RunError: a newer version of this program wrote it.
        """
        record = _read(folder_of(self.cases, key) / RECORD)
        if record is None or (made and not made.of(record)):
            return None
        outputs: Mapping[str, Any] = record["outputs"]
        for name, expected in outputs.items() if check else ():
            path = folder_of(self.cases, key) / name
            if (
                not path.is_file()
                or path.stat().st_size != expected["bytes"]
                or sha256_of_file(path) != expected["sha256"]
            ):
                return None
        return record

    def failed(self, key: str) -> dict[str, Any] | None:
        """The record of a case that failed."""
        return _read(folder_of(self.quarantine, key) / REASON)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every case's record, done ones and failed ones; a case in both folders is done if its record can be read."""
        done = {path.name for path in self.cases.iterdir() if KEY.fullmatch(path.name)}
        failed = {path.name for path in self.quarantine.iterdir() if KEY.fullmatch(path.name)}
        for key in sorted(done | failed):
            record = self.done(key, None, check=False) or self.failed(key)
            if record is not None:
                yield record

    def publish(self, name: str, text: str) -> None:
        """Write a file of OUTPUT itself, whole or not at all."""
        partial = self.staging / f"report.{uuid.uuid4().hex}"
        _write(partial, text)
        os.replace(partial, self.output / name)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > LARGEST_RECORD:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        return None
    if found["schema"] > SCHEMA:
        raise RunError(
            Exit.USAGE, f"OUTPUT was written by a newer medrobust (schema {found['schema']}): choose another, or update"
        )
    return found


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
