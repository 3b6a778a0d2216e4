"""What a training says while it runs: a progress bar on a terminal, one row per epoch in a CSV file."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor

from medrobust.atomic import write_text


def losses(output: Any) -> dict[str, float]:
    """The loss and its terms in a trainer's output, decollated or not."""
    first = output[0] if isinstance(output, list) else output
    return {
        name: float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in first.items()
        if name.startswith("loss")
    }


class CSVLog:
    """Write one row per epoch: mean of the loss and of every term, learning rate of its last step, metrics of the last
    validation.

    The file is replaced as a whole, so it is never half written; a resumed training keeps the rows before it. Only
    rank 0 writes. Attach it after the handler that validates.

    Args:
        path: the CSV file.
        validator: engine whose metrics stand in the rows of the epochs in which it ran.
    """

    def __init__(self, path: str | Path, *, validator: Engine | None = None) -> None:
        self.path = Path(path)
        self.validator = validator
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._rate = 0.0
        self._validated: dict[str, float] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.clear)
        engine.add_event_handler(Events.ITERATION_STARTED, self.remember)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)
        if self.validator is not None:
            self.validator.add_event_handler(Events.COMPLETED, self.validated)

    def clear(self) -> None:
        """A new epoch."""
        self._sums.clear()
        self._count = 0
        self._validated = {}

    def remember(self, engine: Any) -> None:
        """The rate of this step: afterwards schedulers have set the next one's."""
        self._rate = engine.optimizer.param_groups[0]["lr"]

    def add(self, engine: Engine) -> None:
        """One iteration's losses."""
        for name, value in losses(engine.state.output).items():
            self._sums[name] += value
        self._count += 1

    def validated(self, engine: Engine) -> None:
        """Keep a validation's metrics for this epoch's row."""
        self._validated = {
            name: float(value) for name, value in engine.state.metrics.items() if isinstance(value, int | float)
        }

    def write(self, engine: Any) -> None:
        """Replace the file by the rows before this epoch and this epoch's."""
        if engine.state.rank:
            return
        epoch = engine.state.epoch
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
        means = {name: total / self._count for name, total in self._sums.items()}
        rows.append({"epoch": epoch, "iteration": engine.state.iteration, "lr": self._rate, **means, **self._validated})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


class Progress:
    """A progress bar with the current losses, on rank 0 and only where somebody looks (a terminal)."""

    def __init__(self) -> None:
        self._bar: Any = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(Events.COMPLETED, self.stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Any) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if engine.state.rank or not console.is_terminal:
            return
        self._bar = Bar(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console
        )
        length = engine.state.epoch_length or 0
        self._bar.add_task("", total=engine.state.max_epochs * length or None, completed=engine.state.iteration)
        self._bar.start()

    def advance(self, engine: Engine) -> None:
        """One iteration further."""
        if self._bar is not None:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in losses(engine.state.output).items())
            text = f"epoch {engine.state.epoch}/{engine.state.max_epochs}  {terms}"
            self._bar.update(self._bar.task_ids[0], completed=engine.state.iteration, description=text)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def fail(self, engine: Engine, error: BaseException) -> None:
        """The same, and the error goes on."""
        self.stop()
        raise error
