"""A night of trouble, run by ``test_batch_rehearsal.py`` in a mount namespace of its own, where that is allowed.

``python rehearsal.py WORK``: runs ``medrobust batch`` on WORK/in with four workers, kills workers and the whole run at
random moments, fills the disk once, gives the same command again after each death, and at last once undisturbed. Prints
what it did as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

DISK = 48 << 20
TROUBLES = ["worker", "worker", "disk", "worker", "run", "worker", "run", "worker"]


def mount(folder: Path) -> bool:
    """Give the folder a small disk of its own."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def start(work: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-W", "ignore", "-m", "medrobust", "batch", str(work / "in"), str(work / "out"), "-b"]
    words += [str(work / "bundle"), "--trust-bundle", "--workers", "4", "--private", str(work / "secrets")]
    with (work / "log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log)


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(folder.name))
    return found


def workers(run: int) -> list[int]:
    """The processes that the forking server made."""
    return [worker for server in children(run) for worker in children(server)]


def fill(folder: Path, seconds: float) -> None:
    """Leave no byte on the disk for a while."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        time.sleep(seconds)
    finally:
        filler.unlink()


def main(work: Path) -> None:
    rng = random.Random(7)
    did = {"worker": 0, "run": 0, "disk": 0}
    own_disk = mount(work / "out")
    waiting = [trouble for trouble in TROUBLES if own_disk or trouble != "disk"]
    codes = []
    run = start(work)
    until = time.monotonic() + 500
    while time.monotonic() < until:
        if run.poll() is not None:
            codes.append(run.returncode)
            if not waiting:
                break
            run = start(work)  # it ended before all trouble was over
        done = len(list((work / "out" / "cases").glob("*"))) if (work / "out" / "cases").is_dir() else 0
        if not waiting or done < 12 * (len(TROUBLES) - len(waiting)) or not workers(run.pid):
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0.0, 0.4))
        trouble = waiting.pop(0)
        if trouble == "worker" and (at_work := workers(run.pid)):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(at_work), signal.SIGKILL)
        elif trouble == "disk":
            fill(work / "out", 1.5)
        elif trouble == "run":
            run.kill()
            run.wait()
        did[trouble] += 1
    run.kill()
    codes.append(start(work).wait(300))
    result = {"own_disk": own_disk, "did": did, "codes": codes}
    if own_disk:  # the small disk goes with the namespace
        subprocess.run(["cp", "-a", str(work / "out"), str(work / "kept")], check=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
