"""An evaluation on many workers: each case in a folder of its own, joined into the run's when it has come to its end.

The folder of a case is a run's folder itself (:mod:`medrobust.run`), so that a case whose worker was killed goes on
with the condition it was at. Several runs of the same settings may share the folder of the run: a lock for each case
says which of them has it, and another who may join.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.locks import BusyError, hold
from medrobust.batch.night import Log, Night
from medrobust.batch.plan import share
from medrobust.batch.workers import FREE, Here, Pool, Runner, Tell, cores
from medrobust.merging import begin, in_order, merge, note_failure, sweep
from medrobust.run import Run, case_names
from medrobust.run_tables import read_failures

PRELOAD = ("medrobust.preparing", "medrobust.pictures")
LONGEST_MERGE = 600.0
"""Seconds that one may wait for another's merge."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of the run.

    Attributes:
        key: what records call it.
        paths: its image and label, and what else the preprocessing needs.
        attempt: 0, or 1 after its worker was lost.
        last: no other attempt follows.
    """

    key: str
    paths: Mapping[str, Any]
    attempt: int = 0
    last: bool = False


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates cases; sent to each worker, where the run is made once.

    Args:
        make: gives the run and all its cases, as :func:`medrobust.preparing.prepare` does.
        folder: of the run.
        threads: of torch; 0 leaves that to torch.
    """

    make: Callable[[], tuple[Run, Any]]
    folder: Path
    threads: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @property
    def state(self) -> Path:
        return self.folder / ".state"

    @cached_property
    def run(self) -> Run:
        """Made once a worker.

        Raises:
            RunError: it cannot be: that is no case's fault.
        """
        try:
            return self.make()[0]
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise RunError(Exit.USAGE, str(error)) from error

    def __call__(self, task: Case, tell: Tell) -> dict[str, Any]:
        """Evaluate a case under its lock.

        Returns:
            ``case`` and ``status``: ``"done"``, ``"kept"`` (nothing was missing), ``"failed"`` with its ``reason``, or
            ``"busy"`` (another run has it).
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        tell(FREE)
        run = self.run
        try:
            with hold(self._lock(task)):
                return self._held(run, task, tell)
        except BusyError:
            return {"case": task.key, "status": "busy"}

    def _held(self, run: Run, task: Case, tell: Tell) -> dict[str, Any]:
        part = self.part(task)
        if not run.missing(task.key, run.done()):
            shutil.rmtree(part, ignore_errors=True)
            self._note(task.key, None)
            return {"case": task.key, "status": "kept"}
        begin(part, self.folder, task.key)
        own = replace(run, folder=part, failures={})
        own.evaluate([task.paths], lambda _, what: tell(what), names=[task.key])
        tell("joining")
        with joining(self.folder):
            merge(part, self.folder, task.key)
        why = own.failures.get(task.key)
        if why:
            return {"case": task.key, "status": "failed", "code": "error", "reason": why}
        return {"case": task.key, "status": "done"}

    def lost(self, task: Case, fault: CaseError, about: dict[str, Any]) -> dict[str, Any]:
        """A worker was lost with this case: what it had finished is joined, the rest is its failure."""
        try:
            with hold(self._lock(task), wait=5.0):
                if self.part(task).is_dir():
                    with joining(self.folder):
                        merge(self.part(task), self.folder, task.key)
                self._note(task.key, fault.message)
        except BusyError:
            return {"case": task.key, "status": "busy"}
        return {"case": task.key, "status": "failed", "code": fault.code, "reason": fault.message, **about}

    def _lock(self, task: Case) -> Path:
        return self.state / "locks" / _short(task.key)

    def part(self, task: Case) -> Path:
        """The folder of a case until it is joined."""
        return self.state / "cases" / _short(task.key)

    def _note(self, case: str, why: str | None) -> None:
        with joining(self.folder):
            note_failure(self.folder, case, why)


def _short(key: str) -> str:
    """A file name for any name of a case, however long."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextmanager
def joining(folder: Path) -> Iterator[None]:
    """Be the only one who writes to the folder of a run that others may be sharing."""
    (folder / ".state").mkdir(parents=True, exist_ok=True)
    with hold(folder / ".state" / "merge", wait=LONGEST_MERGE):
        yield


@dataclass(frozen=True, kw_only=True)
class Crew:
    """On what an evaluation runs.

    Args:
        workers: processes; 0: none, in this one.
        timeout: seconds for a case; ``None``: no limit.
        memory: largest memory of a worker in bytes; ``None``: no limit.
        number, part: of how many shares of the cases this is which one, from 0.
    """

    workers: int = 0
    timeout: float | None = None
    memory: int | None = None
    number: int = 1
    part: int = 0

    @property
    def alone(self) -> bool:
        """Whether this process does everything by itself."""
        return not self.workers and self.number == 1


def evaluate(
    make: Callable[[], tuple[Run, Any]],
    run: Run,
    cases: Sequence[Mapping[str, Any]],
    crew: Crew,
    log: Log,
    *,
    expect: Callable[[int], None] = lambda count: None,
) -> None:
    """What ``run.evaluate(cases)`` does, on workers and for one share of the cases; ``run.failures`` tells what failed.

    Args:
        make: makes ``run`` and ``cases`` anew, in each worker; picklable.
        log: is told what happens.
        expect: is told how many cases there are to do.

    Raises:
        ValueError: the folder holds a run of other settings, cases or attacks by the same names.
        RunError: workers cannot do any case.
    """
    names = case_names(cases)
    mine = share(dict(zip(names, cases, strict=True)), crew.number, crew.part)
    threads = max(1, cores() // crew.workers) if crew.workers else 0
    evaluator = Evaluator(make=make, folder=run.folder, threads=threads)
    for folder in ("locks", "cases"):
        (evaluator.state / folder).mkdir(parents=True, exist_ok=True)
    with joining(run.folder):
        sweep(run.folder)
        run.check_settings(mine)
    expect(len(mine))
    runner: Runner = Here(work=evaluator)
    if crew.workers:
        runner = Pool(
            work=evaluator,
            workers=crew.workers,
            timeout=crew.timeout,
            memory=crew.memory,
            log=evaluator.state / "workers.log",
            preload=PRELOAD,
        )
    else:
        evaluator.run = run
    try:
        Night(work=evaluator, runner=runner, log=log).run([Case(key=key, paths=mine[key]) for key in mine])
    finally:
        runner.close()
    with joining(run.folder):
        in_order(run.folder, names, [(one.name, one.protocol) for one in run.conditions])
        run.failures.update({case: why for case, why in read_failures(run.folder).items() if case in mine})
