"""What a run says while it works: a bar on a terminal, one JSON object a line elsewhere, and always a file of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Log:
    """Events of a run; none holds a path or a name of a patient.

    Args:
        path: JSON lines are added to it; ``None``: no file.
        quiet: only errors on the screen.
        screen: standard error.
    """

    def __init__(self, path: Path | None, *, quiet: bool = False, screen: TextIO | None = None) -> None:
        self.file: TextIO | None = path.open("a", encoding="utf-8") if path else None
        self.quiet = quiet
        self.screen = screen or sys.stderr
        self.bar: Progress | None = None
        self.tasks: Any = None

    def __enter__(self) -> Log:
        if self.screen.isatty() and not self.quiet:
            columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
            self.bar = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=self.screen), transient=True
            )
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def expect(self, total: int) -> None:
        """How many cases the bar counts."""
        if self.bar is not None:
            self.tasks = self.bar.add_task("starting", total=total)

    def __call__(self, event: str, *, level: str = "info", advance: bool = False, **content: Any) -> None:
        """One event; ``advance`` moves the bar on by one case."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        line = json.dumps({"ts": stamp, "level": level, "event": event, **content}, allow_nan=False)
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk is told by the cases
                self.file.write(line + "\n")
                self.file.flush()
        if self.bar is not None:
            words = " ".join(str(content[name]) for name in ("case", "stage", "code", "reason") if content.get(name))
            if level == "error":
                self.bar.console.print(f"{event}: {words}", markup=False, highlight=False)
            if self.tasks is not None:
                self.bar.update(self.tasks, description=words[:60] or event, advance=1 if advance else 0)
        elif not self.quiet or level == "error":
            with contextlib.suppress(OSError):
                print(line, file=self.screen, flush=True)


def new_run() -> str:
    """A name for a run's files, in order of time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}-{os.urandom(3).hex()}"
