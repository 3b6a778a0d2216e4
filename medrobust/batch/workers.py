"""Run tasks in processes of their own: one that hangs, is killed or eats too much memory costs its own task only.

``Pool`` gives each worker a copy of the work and tasks one by one. A worker that dies is replaced at once (its modules
are already imported, in a server that only forks). Another engine, such as a cluster's, needs the same two methods,
``events`` and ``close``; ``Here`` is the simplest: in this process, without any of the protection.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Protocol

from medrobust.batch.faults import CaseError, Exit, RunError, fault_of

Tell = Callable[[str], None]
Work = Callable[[Any, Tell], Any]
FREE = "load the model"
"""A stage that does not count towards a task's time limit."""
FREE_LIMIT = 900.0
"""Seconds after which even that hangs."""
STARTS = 3
"""Workers that may die one after the other before they did anything."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a task: it reached a ``stage``, it gave a ``result``, or its worker was ``lost``."""

    task: Any
    stage: str = ""
    result: Any = None
    lost: CaseError | None = None
    seconds: float = 0.0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Runner(Protocol):
    """Where tasks are done."""

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        """Do tasks until ``waiting`` is empty and nothing is at work; it may be added to meanwhile."""

    def close(self) -> None:
        """End all workers at once; what they are at is abandoned."""


@dataclass(kw_only=True)
class Here:
    """No processes: for small runs, and for looking for mistakes."""

    work: Work

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        while waiting:
            task = waiting.popleft()
            stages: list[str] = []
            result = self.work(task, stages.append)
            yield from (Event(task=task, stage=stage) for stage in stages)
            yield Event(task=task, result=result)

    def close(self) -> None:
        """Nothing is left to end."""


@dataclass(kw_only=True)
class Pool:
    """Processes of this machine.

    Args:
        work: called with a task and a function that tells the stage; it has to be picklable.
        workers: how many.
        timeout: seconds that a task may take; ``None`` for ever. ``FREE`` stages do not count.
        memory: bytes that a worker may have in memory.
        log: file for whatever libraries print, which may hold patient data; ``None`` throws it away.
        preload: modules that the forking server imports once.
    """

    work: Work
    workers: int = 1
    timeout: float | None = None
    memory: int | None = None
    log: Path | None = None
    preload: Sequence[str] = ()
    crew: list[_Worker] = field(default_factory=list)
    _early: int = 0

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        """Do tasks until ``waiting`` is empty and nothing is at work; it may be added to meanwhile.

        Raises:
            RunError: the work says so, or workers die before they are ready.
        """
        while waiting or any(worker.task is not None for worker in self.crew):
            while len(self.crew) < min(self.workers, len(waiting) + self._occupied()):
                self.crew.append(_Worker.start(self))
            for worker in self.crew:
                if worker.ready and worker.task is None and waiting:
                    worker.give(waiting.popleft())
            handles = [handle for worker in self.crew for handle in (worker.pipe, worker.process.sentinel)]
            connection.wait(handles, timeout=self._patience())
            for worker in list(self.crew):
                yield from self._look_after(worker)

    def close(self) -> None:
        """End all workers at once; what they are at is abandoned."""
        for worker in self.crew:
            worker.end()
        self.crew.clear()

    def _occupied(self) -> int:
        return sum(worker.task is not None for worker in self.crew)

    def _patience(self) -> float:
        ends = [worker.until for worker in self.crew if worker.task is not None and worker.until is not None]
        longest = 0.25 if self.memory else 5.0
        return max(0.0, min([end - time.monotonic() for end in ends] + [longest]))

    def _look_after(self, worker: _Worker) -> Iterator[Event]:
        ended = worker.process.exitcode is not None  # asked first: what it sent before is still in the pipe
        while worker.pipe.poll():
            try:
                kind, *content = worker.pipe.recv()
            except (EOFError, OSError):
                break
            if kind == "ready":
                worker.ready, self._early = True, 0
            elif kind == "stage":
                worker.reached(content[0], self.timeout)
                yield Event(task=worker.task, stage=content[0])
            elif kind == "fatal":
                raise RunError(Exit(content[0]), content[1])
            else:
                task, worker.task = worker.task, None
                yield Event(task=task, result=content[0], seconds=time.monotonic() - worker.since)
        if ended:
            yield from self._bury(worker, _death(worker.process.exitcode))
        elif worker.task is not None and worker.until is not None and time.monotonic() > worker.until:
            text = f"hung in '{worker.stage}' beyond the limit of {self.timeout:g} s: the worker was ended"
            yield from self._bury(worker, CaseError("timeout", text, kind="failed"))
        elif worker.task is not None and self.memory and worker.memory() > self.memory:
            text = f"more than {self.memory >> 20} MB of memory: the worker was ended"
            yield from self._bury(worker, CaseError("memory", text, kind="failed"))

    def _bury(self, worker: _Worker, fault: CaseError) -> Iterator[Event]:
        worker.end()
        self.crew.remove(worker)
        if worker.task is not None:
            yield Event(task=worker.task, stage=worker.stage, lost=fault, seconds=time.monotonic() - worker.since)
        elif not worker.ready:
            self._early += 1
            if self._early >= STARTS:
                raise RunError(
                    Exit.INTERNAL, f"{STARTS} workers in a row died before they were ready ({fault.message})"
                )


@dataclass(kw_only=True, eq=False)
class _Worker:
    """A process, and what it is at."""

    process: Any
    pipe: Any
    ready: bool = False
    task: Any = None
    stage: str = ""
    since: float = 0.0
    until: float | None = None

    @classmethod
    def start(cls, pool: Pool) -> _Worker:
        context: Any = get_context("forkserver")
        if pool.preload:
            context.set_forkserver_preload([*pool.preload])
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, pool.work, pool.log), daemon=True)
        process.start()
        theirs.close()
        return cls(process=process, pipe=ours)

    def give(self, task: Any) -> None:
        self.task, self.stage, self.since, self.until = task, "", time.monotonic(), None
        # A worker that has just died is found by its sentinel.
        with contextlib.suppress(OSError):
            self.pipe.send(task)

    def reached(self, stage: str, timeout: float | None) -> None:
        if timeout is not None and (not self.stage or self.stage == FREE):
            self.until = time.monotonic() + timeout
        if timeout is not None and stage == FREE:
            self.until = time.monotonic() + max(timeout, FREE_LIMIT)
        self.stage = stage

    def memory(self) -> int:
        """Bytes in memory; 0 where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.process.kill()
        self.process.join(10)  # one that hangs in the kernel cannot be waited for
        self.pipe.close()


def _death(code: int) -> CaseError:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return CaseError("killed", f"the worker was ended by {name}{hint}", kind="failed")
    return CaseError("killed", f"the worker ended by itself with code {code}", kind="failed")


def _serve(pipe: Any, work: Work, log: Path | None) -> None:
    """What a worker does until its pipe is closed; then it ends at once, for nobody would notice that it hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(target, stream)
    faulthandler.enable()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                inbox.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)

    def tell(stage: str) -> None:
        try:
            pipe.send(("stage", stage))
        except OSError:  # the run is gone; an error here would be taken for the case's
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    pipe.send(("ready",))
    while True:
        task = inbox.get()
        try:
            result = work(task, tell)
        except RunError as error:
            pipe.send(("fatal", int(error.exit_code), str(error)))
        except BaseException as error:
            fault = fault_of(error)
            pipe.send(("fatal", int(Exit.INTERNAL), f"a worker met a mistake of this program: {fault}"))
        else:
            pipe.send(("done", result))
