"""What a worker of a Dask cluster runs: a post, which is a ``Pool`` of one process that keeps the work between tasks.

So time limits, memory limits and signals are those of one machine. The post ends when the key that it was opened under
goes: when the run says so, and when the run itself is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
import uuid
from collections import deque
from dataclasses import replace
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from medrobust.batch.faults import RunError
from medrobust.batch.sealed import Sealed, Terms, Unsealed
from medrobust.batch.workers import Event, Pool

ENDED = ""
"""In place of a stage: nothing of the task is left at work."""
FINISHED = ("released", "forgotten", "cancelled")
TURN = threading.Lock()
"""One task at a time in a worker, however many threads it has and whoever sends them."""
POSTS: dict[str, Post] = {}

Failed = tuple[int, str]
"""Exit code and message of a RunError, which could not be unpickled itself."""


class Post(WorkerPlugin):
    """Held open on a worker by the key under which it was opened."""

    def __init__(self, key: str, topic: str, pool: Pool) -> None:
        self.key, self.topic, self.pool = key, topic, pool
        self.name = uuid.uuid4().hex
        self.at_work, self.ended = threading.Lock(), False

    def setup(self, worker: Worker) -> None:
        self.worker = worker

    def transition(self, key: Any, start: Any, finish: Any, **_: Any) -> None:
        """Called by the worker with every change of a key."""
        if key == self.key and finish in FINISHED and not self.ended:
            self.end()
            self.worker.loop.add_callback(self.worker.plugin_remove, self.name)

    def teardown(self, worker: Worker) -> None:
        self.end()

    def end(self) -> None:
        """End the process; a task that is at work is abandoned, and its thread closes what is left."""
        self.ended = True
        POSTS.pop(self.name, None)
        if self.at_work.acquire(blocking=False):
            self.pool.close()
            self.at_work.release()
        for one in list(self.pool.crew):
            with contextlib.suppress(ValueError):  # closed by now
                one.process.kill()

    def do(self, task: Sealed, number: int) -> Event | Failed | None:
        """Do a task; ``None`` if the post has ended before."""
        with TURN, self.at_work:
            outcome = None
            try:
                for event in () if self.ended else self.pool.events(deque([task])):
                    if self.ended:
                        return None
                    if event.stage and event.lost is None:
                        self.worker.log_event(self.topic, [number, event.stage])
                    else:
                        outcome = replace(event, task=None)
                return outcome
            except RunError as error:
                return int(error.exit_code), str(error)
            finally:
                if self.ended:
                    self.pool.close()
                    self.worker.log_event(self.topic, [number, ENDED])


def dask_setup(worker: Worker) -> None:
    """Called in workers of a local cluster when they start: Ctrl-C is for the run, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def open_post(key: str, terms: Terms) -> tuple[str, Event | Failed | None]:
    """Open a post on this worker: returns its name, and what is seen from here."""
    worker = get_worker()
    # A nanny's worker is a daemon, which may have no children; ours end with it all the same (see ``_serve``).
    multiprocessing.current_process().daemon = False
    pool = Pool(
        work=Unsealed(terms=terms, threads=worker.state.nthreads),
        timeout=terms.timeout,
        memory=terms.memory or worker.memory_manager.memory_limit,
        log=terms.log if terms.log and terms.log.parent.is_dir() else None,
        preload=terms.preload,
    )
    post = Post(key, terms.topic, pool)
    POSTS[post.name] = post
    added = worker.plugin_add(post, name=post.name, catch_errors=False)
    asyncio.run_coroutine_threadsafe(added, worker.loop.asyncio_loop).result(60)
    return post.name, post.do(Sealed.of(None), 0)


def do_task(post: str, task: Sealed, number: int) -> Event | Failed | None:
    """Do a task at a post of this worker; ``None`` if there is no such post, or no longer."""
    found = POSTS.get(post)
    return found.do(task, number) if found else None
