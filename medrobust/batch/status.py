"""How far the runs on an OUTPUT are, read from what they write there; nothing is disturbed by it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from calendar import timegm
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medrobust.batch.commit import Store
from medrobust.batch.faults import Exit, RunError

ENDED = ("done", "kept", "failed", "rejected")


def status_of(output: Path, now: float | None = None) -> dict[str, Any]:
    """What is known of an OUTPUT of ``medrobust batch``.

    Returns:
        ``cases``: how many ended how, in all runs so far. ``running``: whether a run is at work. ``runs``: of those
        that have not ended: how many cases they have to do, did, have ``left``, the cases ``at_work`` with their stage
        and its seconds, ``seconds`` a case so far, and an estimate of the seconds that are ``to_go`` (``None`` before
        the first case).

    Raises:
        RunError: it is none.
    """
    store = Store(output)
    if not (store.state / "runs").is_dir():
        raise RunError(Exit.USAGE, "expected an OUTPUT of `medrobust batch`")
    running = _is_held(store.state / "settings.lock")
    logs = sorted((store.state / "runs").glob("*.jsonl"))
    open_ = [path for path in logs if running and _is_open(_note(path))]
    return {
        "cases": dict(Counter(record["status"] for record in store.records())),
        "running": running,
        "runs": [_run(path, time.time() if now is None else now) for path in open_],
        "last_exit": _note(logs[-1]).get("exit") if logs else None,
    }


def told(status: dict[str, Any]) -> str:
    """The same in words."""
    counts = ", ".join(f"{count} {word}" for word, count in sorted(status["cases"].items())) or "none yet"
    lines = [f"cases in OUTPUT: {counts}"]
    for run in status["runs"]:
        to_go = "" if run["to_go"] is None else f", {_span(run['seconds'])} a case, about {_span(run['to_go'])} to go"
        lines.append(f"{run['run']}: {run['did']} of {run['cases']} cases, {run['left']} left{to_go}")
        lines += [f"  {case}: {stage}, for {_span(seconds)}" for case, (stage, seconds) in run["at_work"].items()]
    if not status["running"]:
        last = "" if status["last_exit"] is None else f"; the last one ended with exit code {status['last_exit']}"
        lines.append(f"no run is at work{last}")
    return "\n".join(lines)


def _run(path: Path, now: float) -> dict[str, Any]:
    cases, begin, did, latest = 0, now, 0, now
    at_work: dict[str, tuple[str, float]] = {}
    for event in _events(path):
        when = timegm(time.strptime(event["ts"][:19], "%Y-%m-%dT%H:%M:%S"))
        if event["event"] == "begin":
            cases, begin = event["cases"], when
        elif event["event"] == "stage":
            at_work[event["case"]] = (event["stage"], max(0.0, now - when))
        elif "case" in event:
            at_work.pop(event["case"], None)
            did += event["event"] in ENDED
            latest = when
    each = (latest - begin) / did if did else None
    left = max(0, cases - did)
    to_go = None if each is None else each * left
    return {"run": path.stem, "cases": cases, "did": did, "left": left, "at_work": at_work} | {
        "seconds": each,
        "to_go": to_go,
    }


def _events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # the last one may be half there
                continue
            if isinstance(event, dict) and "event" in event and "ts" in event:
                yield event


def _note(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_open(note: dict[str, Any]) -> bool:
    """Whether a run has neither ended nor died, as far as this machine can tell."""
    here = note.get("host") == socket.gethostname() and sys.platform == "linux"
    return "end" not in note and not (here and not Path(f"/proc/{note.get('pid')}").exists())


def _is_held(lock: Path) -> bool:
    """Whether a run holds its share of OUTPUT."""
    if not lock.is_file():
        return False
    descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
