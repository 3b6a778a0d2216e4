"""Do all cases: try again what may pass, wait for what another run has, stop when told, and say how it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medrobust.batch.commit import Store
from medrobust.batch.faults import TRANSIENT, CaseError, Exit
from medrobust.batch.locks import BusyError
from medrobust.batch.logs import Log
from medrobust.batch.segment import Segmenter, Task
from medrobust.batch.workers import Event, Runner

OUTPUT_TROUBLE = ("disk-full", "no-access")


@dataclass(kw_only=True)
class Night:
    """One run over its cases.

    Args:
        segmenter: whose way of recording failures is used for cases whose worker was lost, too.
        on_error: ``"skip"`` a failed case, or ``"stop"`` at the first.
        max_failures: stop when more cases than that have failed; ``None``: never.
        pause: seconds between two looks at cases that another run has.
    """

    segmenter: Segmenter
    runner: Runner
    log: Log
    on_error: str = "skip"
    max_failures: int | None = None
    pause: float = 1.0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: bool = False

    @property
    def store(self) -> Store:
        return self.segmenter.store

    def run(self, tasks: Sequence[Task]) -> Exit:
        """Do the tasks; returns what the exit code is."""
        waiting, elsewhere = deque(tasks), deque[Task]()
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

    def _take(self, event: Event, waiting: deque[Task], elsewhere: deque[Task]) -> None:
        task: Task = event.task
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
            waiting.append(_again(task))
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

    def _lost(self, task: Task, fault: CaseError, stage: str, seconds: float) -> dict[str, Any]:
        """A worker was lost with this case; nobody holds its lock any more, unless another run has taken it."""
        about = {"stage": stage, "attempts": task.attempt + 1, "measured": {"seconds": round(seconds, 3)}}
        if fault.code in TRANSIENT and not task.last:
            return {"case": task.key, "status": "again", "code": fault.code, "reason": fault.message, **about}
        try:
            with self.store.lock(task.key, wait=5.0):
                made = self.segmenter.made_of(task)
                done = self.store.done(task.key, made) if made else None
                if done and done["attempt"] not in task.seen:  # lost between committing and saying so
                    self.store.forgive(task.key)
                    return done
                return self.segmenter.refuse(task.key, made, fault, about)
        except BusyError:
            return {"case": task.key, "status": "busy"}


def _again(task: Task) -> Task:
    return Task(**{**vars(task), "attempt": task.attempt + 1, "last": True})
