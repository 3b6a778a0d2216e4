"""Locks that die with their holder: ``flock`` on files that are never deleted.

They hold on one machine, and between machines on file systems that pass ``flock`` on (NFS 4, Lustre with ``flock``).
Where they do not, a case may be done twice, which costs time: a result still appears whole, by one rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medrobust.atomic import write_text
from medrobust.batch.faults import Exit, RunError


class BusyError(Exception):
    """Somebody else holds the lock."""


@contextmanager
def hold(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock ``path`` alone.

    Raises:
        BusyError: it was not free within ``wait`` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, fcntl.LOCK_EX, wait)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, kind: int, wait: float) -> None:
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BusyError from None
            time.sleep(0.05)


@contextmanager
def membership(state: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Work on an OUTPUT beside other runs of the same settings; a run of others has to wait until all of them ended.

    Raises:
        RunError: runs of other settings are at work there.
    """
    told = state / "settings.json"
    descriptor = os.open(state / "settings.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        for _ in range(20):
            try:
                _take(descriptor, fcntl.LOCK_EX, 0.0)
                owner = {"pid": os.getpid(), "host": socket.gethostname()}
                write_text(told, json.dumps({"settings": dict(settings), **owner}, indent=2) + "\n")
            except BusyError:
                pass
            # Going from the exclusive lock to the shared one lets go of it for a moment: look again who is there.
            try:
                _take(descriptor, fcntl.LOCK_SH, 2.0)
            except BusyError:
                continue
            content = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
            if content.get("settings") == dict(settings):
                yield
                return
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if content:
                other = f"process {content.get('pid')} on {content.get('host')}"
                raise RunError(
                    Exit.HELD, f"OUTPUT is held by a run of other settings ({other}): wait, or choose another"
                )
        raise RunError(Exit.HELD, "OUTPUT is held by another run")
    finally:
        os.close(descriptor)
