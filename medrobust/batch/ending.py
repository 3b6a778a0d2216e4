"""How a command ends: one line on standard error, and its exit code."""

from __future__ import annotations

from collections.abc import Callable

import typer

from medrobust.batch.faults import Exit, RunError, fault_of
from medrobust.batch.signals import TerminatedError


def exit_code(work: Callable[[], Exit], place: str) -> Exit:
    """Do the work, and say why where it ended early.

    Args:
        place: what messages call the folder that is written to.

    Raises:
        OSError: one that has nothing to do with that folder.
    """
    try:
        return work()
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, TerminatedError) as error:
        typer.echo("interrupted: the same command goes on from here", err=True)
        return Exit.TERMINATED if isinstance(error, TerminatedError) else Exit.INTERRUPTED
    except OSError as error:
        if fault_of(error).code not in ("disk-full", "no-access"):
            raise
        typer.echo(f"error: {place}: {error.strerror}", err=True)
        return Exit.OUTPUT
