"""Work and tasks on their way through a cluster: bytes, which only the process that does them opens.

So neither the scheduler nor the Dask worker imports torch, no log of theirs shows a task, and that process, which is
started anew after each that is lost, does not import Dask.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medrobust.batch.workers import Tell

View = Callable[[], Mapping[str, str]]


@dataclass(frozen=True, repr=False)
class Sealed:
    """A pickle that only the pool's process opens."""

    content: bytes

    @classmethod
    def of(cls, value: Any) -> Sealed:
        return cls(pickle.dumps(value))

    def open(self) -> Any:
        return pickle.loads(self.content)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a worker does its tasks with: see ``Pool``. The view tells what its machine sees."""

    topic: str
    work: Sealed
    view: Sealed
    timeout: float | None = None
    memory: int | None = None
    log: Path | None = None
    preload: Sequence[str] = ()


@dataclass(kw_only=True)
class Unsealed:
    """The work, opened where it is done; a task that is ``None`` asks what is seen here."""

    terms: Terms
    threads: int

    def __getstate__(self) -> dict[str, Any]:
        return {"terms": self.terms, "threads": self.threads}

    @cached_property
    def work(self) -> Any:
        work = self.terms.work.open()
        if hasattr(work, "threads"):
            work.threads = self.threads
        return work

    def __call__(self, sealed: Sealed, tell: Tell) -> Any:
        task = sealed.open()
        return look(self.terms) if task is None else self.work(task, tell)


def look(terms: Terms) -> dict[str, str]:
    """What this machine sees, beginning with what computes here, and whether the work can be opened here."""
    from medrobust.records import versions

    try:
        terms.work.open()
        return {"versions": versions(), **terms.view.open()()}
    except (ImportError, AttributeError, TypeError) as error:  # another version pickles other things
        return {"versions": versions(), "work": type(error).__name__}
