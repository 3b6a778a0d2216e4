"""Work for the pool's tests: what a task says is done. A module of its own, so that workers can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from medrobust.batch.faults import CaseError, Exit, RunError


def do(task: dict[str, Any], tell: Callable[[str], None]) -> Any:
    tell("begin")
    for kind, value in task.items():
        if kind == "kill" and not os.path.exists(value):
            with open(value, "w", encoding="ascii"):  # only the first time
                os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "kill always":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "kill dask" and not os.path.exists(value):
            with open(value, "w", encoding="ascii"):
                psutil.Process().parent().parent().kill()  # the forking server's own parent
        elif kind == "exit":
            os._exit(value)
        elif kind == "sleep":
            time.sleep(value)
        elif kind == "load":
            tell("load the model")
            time.sleep(value)
            tell("segment")
        elif kind == "eat":
            held = bytearray(value)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(30)
        elif kind == "stop":
            raise RunError(Exit.USAGE, value)
        elif kind == "mistake":
            raise KeyError(value)
        elif kind == "print":
            os.write(2, value.encode())
    return {"pid": os.getpid(), "done": task}


def refuse(task: object, tell: Callable[[str], None]) -> Any:
    raise CaseError("never", "this work is not called")


def place() -> dict[str, str]:
    """What a machine sees; its environment says which one it plays."""
    return {"OUTPUT": os.environ.get("BATCH_WORK_PLACE", "here")}
