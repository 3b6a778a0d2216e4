"""A task that hangs, dies or eats memory is lost alone; the others are done, each once."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batch_work
import pytest

from medrobust.batch.faults import Exit, RunError
from medrobust.batch.workers import Event, Here, Pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(work=batch_work.do, workers=2, log=tmp_path / "log")
    yield pool
    pool.close()


def final(pool: Pool | Here, tasks: list[dict[str, Any]]) -> list[Event]:
    return [event for event in pool.events(deque(tasks)) if event.result is not None or event.lost is not None]


def test_every_task_is_done_once_whatever_happens_to_others(pool: Pool) -> None:
    tasks: list[dict[str, Any]] = [{"n": n} for n in range(20)]
    tasks[3], tasks[7], tasks[11] = {"kill always": 1}, {"exit": 3}, {"kill always": 2}
    events = final(pool, tasks)
    done = [event.result["done"] for event in events if event.result]
    lost = {str(event.task): (event.lost.code, event.lost.message) for event in events if event.lost}
    assert sorted(task["n"] for task in done) == [n for n in range(20) if n not in (3, 7, 11)]
    assert set(lost) == {str(tasks[n]) for n in (3, 7, 11)}
    assert {code for code, _ in lost.values()} == {"killed"}
    assert "SIGKILL" in lost[str(tasks[3])][1]
    assert "code 3" in lost[str(tasks[7])][1]


def test_a_hung_task_is_ended_and_loading_costs_no_time(pool: Pool) -> None:
    pool.timeout = 0.6
    begin = time.monotonic()
    events = final(pool, [{"sleep": 60}, {"load": 1.2, "sleep": 0.01}, {"n": 1}])
    assert time.monotonic() - begin < 20
    assert [event.lost.code for event in events if event.lost] == ["timeout"]
    assert [event.task for event in events if event.lost] == [{"sleep": 60}]
    assert len(events) == 3


def test_a_task_that_eats_memory_is_ended(pool: Pool) -> None:
    pool.memory = 1 << 30  # a worker has the modules of the forking server, whoever started that
    events = final(pool, [{"eat": 1200 << 20}, {"n": 1}])
    assert {event.lost.code if event.lost else "done" for event in events} == {"memory", "done"}


def test_tasks_may_be_added_meanwhile_and_workers_stay(pool: Pool, tmp_path: Path) -> None:
    waiting: deque[dict[str, Any]] = deque([{"kill": str(tmp_path / "once")}])
    results = []
    for event in pool.events(waiting):
        if event.lost:
            waiting.append(event.task)
        elif event.result:
            results.append(event.result)
    assert len(results) == 1
    (again,) = final(pool, [{"n": 2}])
    assert again.result["pid"] == results[0]["pid"]


def test_what_libraries_print_goes_into_the_log(pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    final(pool, [{"print": "DOE_JOHN"}])
    pool.close()
    assert "DOE_JOHN" in (tmp_path / "log").read_text()
    assert "DOE_JOHN" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("task", "code"), [({"stop": "no weights"}, Exit.USAGE), ({"mistake": "x"}, Exit.INTERNAL)])
def test_what_is_no_tasks_fault_stops_the_run(pool: Pool, task: dict[str, Any], code: Exit) -> None:
    with pytest.raises(RunError, match=r"no weights|KeyError") as caught:
        final(pool, [task])
    assert caught.value.exit_code == code


def test_workers_die_with_the_run(pool: Pool) -> None:
    """A worker whose supervisor is gone does not sit on a hung case for ever."""
    (event,) = final(pool, [{"n": 1}])
    (worker,) = pool.crew
    worker.pipe.send({"sleep": 60})
    worker.pipe.close()
    worker.process.join(10)
    assert worker.process.exitcode == 0
    assert event.result["pid"] == worker.process.pid


def test_a_worker_killed_while_idle_is_replaced(pool: Pool) -> None:
    (event,) = final(pool, [{"n": 1}])
    os.kill(event.result["pid"], signal.SIGKILL)
    pool.crew[0].process.join(10)
    found = final(pool, [{"n": 2}, {"n": 3}])
    # One of them may have been given to the dead; it comes back as lost, not as done.
    assert len(found) == 2


def test_without_processes() -> None:
    events = list(Here(work=batch_work.do).events(deque([{"n": 1}, {"n": 2}])))
    assert [event.stage for event in events if event.stage] == ["begin", "begin"]
    assert [event.result["done"] for event in events if event.result] == [{"n": 1}, {"n": 2}]
