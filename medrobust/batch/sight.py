"""What every machine of a run has to see: the same bundle, INPUT and OUTPUT under the same paths, and its locks."""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medrobust.batch.commit import Store
from medrobust.batch.recipe import Recipe

HEAD = 1 << 16
READERS = ("nibabel", "SimpleITK", "pydicom", "highdicom", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls")
"""What reads and writes files: a machine without one of them would refuse what another takes."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Called on two machines, it gives the same words if a run may use both.

    Args:
        recipe: its digest covers weights and configuration.
        store: the OUTPUT; whoever calls this first holds the lock of its settings.
        note: a file in OUTPUT that this run wrote.
        example: a file or folder of INPUT; ``None`` if there is none.
        details: the private folder for tracebacks.
    """

    recipe: Recipe
    store: Store
    note: Path
    example: Path | None
    details: Path

    def __call__(self) -> dict[str, str]:
        return {
            "readers": " ".join(f"{name} {_version(name)}" for name in READERS),
            "bundle": _told(lambda: self.recipe.digest),
            "INPUT": _told(lambda: _mark(self.example) if self.example else "empty"),
            "OUTPUT": _told(lambda: _mark(self.note)),
            "writing to OUTPUT": _told(lambda: _writable(self.store.staging)),
            "writing to the private folder": _told(lambda: _writable(self.details)),
            "locks of OUTPUT": _told(lambda: _locked(self.store.state / "settings.lock")),
        }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _told(find: Callable[[], str]) -> str:
    try:
        return find()
    except OSError as error:
        return os.strerror(error.errno or 0)
    except ValueError as error:
        return type(error).__name__


def _mark(path: Path) -> str:
    """Size and first bytes, or names in a folder, as a hash that says nothing about them."""
    if path.is_dir():
        return hashlib.sha256("/".join(sorted(os.listdir(path))).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    with path.open("rb") as file:
        return hashlib.sha256(f"{path.stat().st_size}".encode() + file.read(HEAD)).hexdigest()[:16]


def _writable(folder: Path) -> str:
    probe = folder / f"probe.{uuid.uuid4().hex}"
    probe.touch()
    probe.unlink(missing_ok=True)
    return "possible"


def _locked(path: Path) -> str:
    """Whether the lock that the run holds is seen from here, too."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "seen"
    else:
        return "not seen: flock does not reach this machine"
    finally:
        os.close(descriptor)
