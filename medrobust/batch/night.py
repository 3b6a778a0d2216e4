"""Do all cases: try again what may pass, wait for what another run has, stop when told, and say how it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from medrobust.batch.faults import TRANSIENT, CaseError, Exit
from medrobust.batch.workers import Event, Runner

OUTPUT_TROUBLE = ("disk-full", "no-access")


class Work(Protocol):
    """What is done to each case, and how one is recorded whose worker was lost."""

    def lost(self, task: Any, fault: CaseError, about: dict[str, Any]) -> dict[str, Any]:
        """The record of a case whose worker is gone; its status is ``"busy"`` if another run has taken it since."""


class Log(Protocol):
    """Where it is told."""

    def __call__(self, event: str, *, level: str = "info", advance: bool = False, **content: Any) -> None:
        """One event; ``advance`` when a case has come to its end."""


@dataclass(kw_only=True)
class Night:
    """One run over its cases: dataclasses with a ``key``, the ``attempt`` (from 0), and whether it is the ``last``.

    Args:
        work: how a case is recorded whose worker was lost; the runner does the rest of it.
        on_error: ``"skip"`` a failed case, or ``"stop"`` at the first.
        max_failures: stop when more cases than that have failed; ``None``: never.
        pause: seconds between two looks at cases that another run has.
    """

    work: Work
    runner: Runner
    log: Log
    on_error: str = "skip"
    max_failures: int | None = None
    pause: float = 1.0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: bool = False

    def run(self, tasks: Sequence[Any]) -> Exit:
        """Do the tasks; returns what the exit code is."""
        waiting, elsewhere = deque(tasks), deque[Any]()
        while (waiting or elsewhere) and not self.stopped:
            if not waiting:
                time.sleep(self.pause)
                waiting, elsewhere = elsewhere, deque()
            for event in self.runner.events(waiting):
                self._take(event, waiting, elsewhere)
                if self._too_many():
                    self.stopped = True
                    break
        return self.outcome()

    def outcome(self) -> Exit:
        """How the run ended, from its results."""
        failed = [one for one in self.results.values() if one["status"] in ("failed", "rejected")]
        if any(one["code"] in OUTPUT_TROUBLE or one.get("unrecorded") for one in failed):
            return Exit.OUTPUT
        return Exit.SOME_FAILED if failed or self.stopped else Exit.DONE

    def _take(self, event: Event, waiting: deque[Any], elsewhere: deque[Any]) -> None:
        task = event.task
        if event.lost is not None:
            result = self._lost(task, event.lost, event.stage, event.seconds)
        elif event.result is None:
            self.log("stage", case=task.key, stage=event.stage)
            return
        else:
            result = event.result
        status = result["status"]
        if status == "busy":
            elsewhere.append(task)
            return
        if status == "again":
            told = {name: result[name] for name in ("stage", "code", "reason")}
            self.log("again", level="warning", case=task.key, **told)
            waiting.append(replace(task, attempt=task.attempt + 1, last=True))
            return
        self.results[task.key] = result
        level = "error" if status in ("failed", "rejected") else "info"
        told = {name: result[name] for name in ("stage", "code", "reason") if name in result}
        seconds = result.get("measured", {}).get("seconds") if status != "kept" else None
        self.log(status, level=level, advance=True, case=task.key, **told, **({"seconds": seconds} if seconds else {}))

    def _too_many(self) -> bool:
        limit = 0 if self.on_error == "stop" else self.max_failures
        failures = sum(one["status"] in ("failed", "rejected") for one in self.results.values())
        if limit is None or failures <= limit:
            return False
        self.log("stopped", level="error", failures=failures)
        return True

    def _lost(self, task: Any, fault: CaseError, stage: str, seconds: float) -> dict[str, Any]:
        """A worker was lost with this case."""
        about = {"stage": stage, "attempts": task.attempt + 1, "measured": {"seconds": round(seconds, 3)}}
        if fault.code in TRANSIENT and not task.last:
            return {"case": task.key, "status": "again", "code": fault.code, "reason": fault.message, **about}
        return self.work.lost(task, fault, about)
