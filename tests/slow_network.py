"""The known network, slow enough to be killed at work. A module of its own, so that a bundle can name it."""

from __future__ import annotations

import os
import signal
import time

from oracles import VoxelLinear
from torch import Tensor


class SlowLinear(VoxelLinear):
    """It kills the first worker that uses it, and tells when it is made, where the environment tells it so."""

    def __init__(self) -> None:
        super().__init__()
        told = os.environ.get("BATCH_WORK_LOADS", "")
        if told:
            with open(told, "a", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")

    def forward(self, image: Tensor) -> Tensor:
        mark = os.environ.get("BATCH_WORK_KILL", "")
        if mark and not os.path.exists(mark):
            with open(mark, "w", encoding="ascii"):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("BATCH_WORK_SLEEP", "0")))
        return super().forward(image)
