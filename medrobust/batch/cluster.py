"""Run tasks on the workers of a Dask cluster: one of this machine, or any that is running.

Each worker is given one task at a time, for it alone, and does it in a process of its own (see ``post``): Dask brings
tasks there and says who is still alive; it never tries one again by itself. Workers may come and go.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed import TimeoutError as DaskTimeoutError
from distributed.utils import silence_logging_cmgr

from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.post import ENDED, Failed, do_task, open_post
from medrobust.batch.sealed import Sealed, Terms, View, look
from medrobust.batch.workers import Event, Work

LOCAL = "local"
CONNECT, ANSWER, LOOK, LISTEN, LEAVE = 30.0, 30.0, 1.0, 0.1, 5.0
"""Seconds: for a scheduler, for a result that is there, between two looks at who is there, for news, for the end."""
SETTLE = 60.0
"""Seconds that the first task waits until all workers that were there at the beginning have been looked at."""
GONE = (KilledWorker, CancelledError, DaskTimeoutError, OSError)
"""What asking for a result raises when worker or scheduler are gone."""


def _nothing() -> Mapping[str, str]:
    return {}


def _silent(event: str, **_: Any) -> None:
    """Nobody wants to know."""


@dataclass(kw_only=True)
class Cluster:
    """Workers of a Dask cluster.

    Args:
        work: called with a task and a function that tells the stage; it has to be picklable. Its attribute ``threads``,
            if it has one, becomes the number of threads of the Dask worker.
        scheduler: ``"local"`` starts workers on this machine, to be ended with the run; an address such as
            ``tcp://host:8786``, or a scheduler file, is of a cluster that goes on afterwards.
        workers: how many, of a local cluster.
        threads: of each of these.
        timeout: seconds that a task may take; ``None`` for ever.
        memory: bytes that a task's process may have in memory; ``None``: the memory limit of the Dask worker.
        log: file for whatever libraries print.
        preload: modules that each worker's forking server imports once.
        view: what this machine sees; each worker has to see the same.
        tell: called with what happens to workers, as a ``Log`` is.
        patience: seconds without any worker after which the run ends.
    """

    work: Work
    scheduler: str = LOCAL
    workers: int = 1
    threads: int = 1
    timeout: float | None = None
    memory: int | None = None
    log: Path | None = None
    preload: Sequence[str] = ()
    view: View = _nothing
    tell: Callable[..., None] = _silent
    patience: float = 3600.0
    _seats: dict[str, _Seat] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _inbox: queue.SimpleQueue[tuple[int, str]] = field(default_factory=queue.SimpleQueue)
    _given: int = 0
    _looked: float = 0.0
    _manned: float = 0.0
    _quiet: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _client: Any = None
    _own: Any = None

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        """Do tasks until ``waiting`` is empty and nothing is at work; it may be added to meanwhile.

        Raises:
            RunError: the work says so, there is no scheduler or no worker, or a worker does not see what we do.
        """
        self._connect()
        while waiting or any(seat.task is not None for seat in self._seats.values()):
            yield from self._look_round()
            for seat in [*self._seats.values()]:
                if seat.opening.cancelled():
                    yield from self._lose(seat, "the connection to the Dask scheduler was lost")
                elif not seat.post and seat.opening.done():
                    self._welcome(seat)
            for seat in self._free():
                if waiting:
                    self._give(seat, waiting.popleft())
            heard = [*self._listen(LISTEN)]
            done = [seat for seat in self._seats.values() if seat.future and seat.future.done()]
            for number, stage in [*heard, *self._listen(0.0)]:  # what was told before the end comes before it
                yield from self._reached(number, stage)
            for seat in done:
                yield from self._finish(seat)

    def close(self) -> None:
        """Abandon what is at work, and leave the cluster; one of our own ends."""
        busy = {seat.number for seat in self._seats.values() if seat.task is not None}
        for seat in [*self._seats.values()]:
            self._drop(seat)
        until = time.monotonic() + LEAVE
        while busy and self._client is not None and time.monotonic() < until:
            busy -= {number for number, stage in self._listen(LISTEN) if stage == ENDED}
        for one in (self._client, self._own):
            if one is not None:
                with contextlib.suppress(*GONE):
                    one.close(timeout=LEAVE)
        self._client = self._own = None
        self._quiet.close()

    def _connect(self) -> None:
        if self._client is not None:
            return
        self._quiet.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what matters is told as events
        where: dict[str, Any] = {"address": self.scheduler}
        if self.scheduler == LOCAL:
            with dask.config.set({f"distributed.{one}.http.routes": [] for one in ("scheduler", "worker")}):
                self._own = LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=self.threads,
                    memory_limit=0,  # it would not see the process that has the task; ours does
                    scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                    silence_logs=logging.CRITICAL,
                    preload=[open_post.__module__],
                )
            where = {"address": self._own}
        elif "://" not in self.scheduler:
            where = {"scheduler_file": self.scheduler}
        try:
            self._client = Client(**where, timeout=CONNECT, set_as_default=False, name="medrobust")
        except (OSError, ValueError, DaskTimeoutError):
            raise RunError(Exit.USAGE, f"no Dask scheduler answers at {self.scheduler}") from None
        self._topic = f"medrobust-{uuid.uuid4().hex}"
        self._terms = Terms(
            topic=self._topic,
            work=Sealed.of(self.work),
            view=Sealed.of(self.view),
            timeout=self.timeout,
            memory=self.memory,
            log=self.log,
            preload=tuple(self.preload),
        )
        self._expected = look(self._terms)
        self._began = self._manned = time.monotonic()

    def _look_round(self) -> Iterator[Event]:
        """Who is there: new workers are asked what they see, and tasks of lost ones are lost."""
        now = time.monotonic()
        if now < self._looked + LOOK:
            return
        self._looked = now
        if self._client.status == "closed":
            raise RunError(Exit.TERMINATED, "the Dask scheduler is gone: start it, and give the same command again")
        there = self._there()
        for seat in [*self._seats.values()]:
            if seat.address not in there:
                yield from self._lose(seat, "its Dask worker, or the machine of that, was lost")
        self._refused &= set(there)
        for address in there:
            if address not in self._seats and address not in self._refused:
                self._open(address)
        if any(seat.post for seat in self._seats.values()):
            self._manned = now
        elif now > self._manned + self.patience:
            raise RunError(Exit.TERMINATED, f"the Dask scheduler has had no worker for {self.patience:g} s")

    def _there(self) -> list[str]:
        """Addresses of workers; while the scheduler does not answer, of those that were there."""
        with contextlib.suppress(*GONE):
            if self._client.status == "running":
                return [*self._client.nthreads()]
        return [*self._seats]

    def _open(self, address: str) -> None:
        # Again each time: a new connection to the scheduler has forgotten it.
        self._client.subscribe_topic(self._topic, lambda event: self._inbox.put((event[1][0], event[1][1])))
        key = f"{self._topic}-{uuid.uuid4().hex}"
        self._seats[address] = _Seat(address=address, opening=self._submit(address, key, open_post, key, self._terms))

    def _submit(self, address: str, key: str, *call: Any) -> Future:
        return self._client.submit(*call, key=key, workers=[address], allow_other_workers=False, retries=0, pure=False)

    def _welcome(self, seat: _Seat) -> None:
        """See whether a worker sees what this machine does."""
        try:
            post, seen = seat.opening.result(timeout=ANSWER)
        except GONE:
            self._drop(seat)
            return
        except Exception as error:
            self._refuse(seat, f"{type(error).__name__}: {error}")
            return
        if not isinstance(seen, Event) or seen.lost is not None:
            why = seen.lost.message if isinstance(seen, Event) and seen.lost else str(seen[1] if seen else "it ended")
            self._refuse(seat, why)
            return
        other = [
            f"{name}: expected {expected}, got {seen.result.get(name, 'nothing')}"
            for name, expected in self._expected.items()
            if seen.result.get(name) != expected
        ]
        if other:
            self._refuse(seat, "; ".join(other))
        else:
            seat.post = post

    def _refuse(self, seat: _Seat, why: str) -> None:
        self._drop(seat)
        self._refused.add(seat.address)
        if not self._given:
            raise RunError(
                Exit.USAGE,
                f"the Dask worker {seat.address} cannot take part: {why}. Every worker needs the same medrobust, and "
                "has to see the same bundle, INPUT, OUTPUT and private folder under the same paths",
            )
        self.tell("left-out", level="warning", worker=seat.address, reason=why)

    def _free(self) -> list[_Seat]:
        seats = self._seats.values()
        if not self._given and any(not seat.post for seat in seats) and time.monotonic() < self._began + SETTLE:
            return []
        return [seat for seat in seats if seat.post and seat.task is None]

    def _give(self, seat: _Seat, task: Any) -> None:
        self._given += 1
        seat.task, seat.number, seat.stage, seat.since = task, self._given, "", time.monotonic()
        key = f"{self._topic}-{self._given}"
        seat.future = self._submit(seat.address, key, do_task, seat.post, Sealed.of(task), self._given)

    def _listen(self, wait: float) -> Iterator[tuple[int, str]]:
        with contextlib.suppress(queue.Empty):
            yield self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            while True:
                yield self._inbox.get_nowait()

    def _reached(self, number: int, stage: str) -> Iterator[Event]:
        for seat in self._seats.values():
            if seat.task is not None and seat.number == number and stage != ENDED:
                seat.stage = stage
                yield Event(task=seat.task, stage=stage)

    def _finish(self, seat: _Seat) -> Iterator[Event]:
        if seat.future is None:
            return
        outcome: Event | Failed | None
        task = seat.task
        try:
            outcome = seat.future.result(timeout=ANSWER)
        except GONE as error:
            yield from self._lose(seat, f"its Dask worker was lost ({type(error).__name__})")
            return
        except Exception as error:
            text = f"a Dask worker met a mistake of this program: {type(error).__name__}"
            raise RunError(Exit.INTERNAL, text) from None
        if outcome is None:
            yield from self._lose(seat, "its Dask worker was started anew, or is about to end")
            return
        seat.future.release()
        seat.task = seat.future = None
        if isinstance(outcome, tuple):
            raise RunError(Exit(outcome[0]), outcome[1])
        yield replace(outcome, task=task)

    def _lose(self, seat: _Seat, why: str) -> Iterator[Event]:
        self._drop(seat)
        if seat.task is not None:
            fault = CaseError("killed", why, kind="failed")
            yield Event(task=seat.task, stage=seat.stage, lost=fault, seconds=time.monotonic() - seat.since)

    def _drop(self, seat: _Seat) -> None:
        """Give its keys back: that ends the post, if it is still there."""
        self._seats.pop(seat.address, None)
        for future in (seat.future, seat.opening):
            if future is not None:
                future.release()


@dataclass(kw_only=True, eq=False)
class _Seat:
    """A Dask worker, and what it is at."""

    address: str
    opening: Future
    post: str = ""
    task: Any = None
    number: int = 0
    future: Future | None = None
    stage: str = ""
    since: float = 0.0
