"""A Dask cluster gives what one machine gives: the same tree, the same reasons; what it does to tasks is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import batch_tree
import batch_work
import psutil
import pytest
import small_bundle
from distributed import Client
from typer.testing import CliRunner

from medrobust.batch import sight
from medrobust.batch.cluster import Cluster
from medrobust.batch.commit import Store
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.recipe import Recipe
from medrobust.batch.sight import Sight
from medrobust.batch.workers import Event
from medrobust.cli import app

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300.0


class Dask:
    """A scheduler and workers as their user starts them, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        self.started: list[subprocess.Popen[bytes]] = []
        self.start("scheduler", "--port", "0", "--scheduler-file", self.file)
        self.start("worker", "--scheduler-file", self.file, "--nworkers", "2", "--nthreads", "3")
        with self.client() as client:
            client.wait_for_workers(2, timeout=LIMIT)
            self.address = str(client.scheduler.address)

    def client(self) -> Client:
        until = time.monotonic() + LIMIT
        while not self.file.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        return Client(scheduler_file=str(self.file), timeout=LIMIT, set_as_default=False)

    def start(self, kind: str, *words: object) -> None:
        words = (*words, "--host", "127.0.0.1", "--no-dashboard")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        environment |= {"DASK_TEMPORARY_DIRECTORY": str(self.folder), "BATCH_WORK_PLACE": "a worker"}
        with (self.folder / "dask.log").open("ab") as log:
            run = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "distributed.cli.dask_" + kind, *map(str, words)],
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.started.append(run)

    def end(self) -> None:
        for run in reversed(self.started):  # the scheduler last: workers say goodbye to it
            run.terminate()
            try:
                run.wait(10)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    dask = Dask(tmp_path_factory.mktemp("dask"))
    yield dask
    dask.end()


@pytest.fixture
def cluster(dask: Dask) -> Iterator[Cluster]:
    cluster = Cluster(work=batch_work.do, scheduler=dask.address)
    yield cluster
    cluster.close()


def events(cluster: Cluster, tasks: list[Any]) -> Iterator[Event]:
    until = time.monotonic() + LIMIT
    for event in cluster.events(deque(tasks)):
        yield event
        assert time.monotonic() < until


def final(cluster: Cluster, tasks: list[Any]) -> list[Event]:
    return [event for event in events(cluster, tasks) if event.result is not None or event.lost is not None]


def test_tasks_are_done_once_and_reasons_are_those_of_one_machine(cluster: Cluster) -> None:
    cluster.timeout = 2.0
    tasks: list[dict[str, Any]] = [{"n": n} for n in range(12)]
    tasks[3], tasks[6], tasks[9] = {"kill always": 1}, {"exit": 3}, {"sleep": 60}
    found = [*events(cluster, tasks)]
    stages = [event.task for event in found if event.stage and event.lost is None]
    done = [event.result["done"] for event in found if event.result]
    lost = {str(event.task): (event.lost.code, event.lost.message, event.stage) for event in found if event.lost}
    assert sorted(map(str, stages)) == sorted(map(str, tasks))  # nothing was begun twice
    assert sorted(task["n"] for task in done) == [n for n in range(12) if n not in (3, 6, 9)]
    assert lost[str(tasks[3])][0] == lost[str(tasks[6])][0] == "killed"
    assert "SIGKILL" in lost[str(tasks[3])][1]
    assert "code 3" in lost[str(tasks[6])][1]
    assert (lost[str(tasks[9])][0], lost[str(tasks[9])][2]) == ("timeout", "begin")
    # The stage comes before the end.
    order = [event for event in found if event.task == {"n": 0}]
    assert [event.stage for event in order] == ["begin", ""]


def test_each_worker_has_one_process_that_stays(cluster: Cluster) -> None:
    """However many threads it has: two tasks at once would share its memory and its GPU."""
    pids = {event.result["pid"] for event in final(cluster, [{"sleep": 0.2} for _ in range(6)])}
    assert len(pids) == 2
    assert {event.result["pid"] for event in final(cluster, [{"n": n} for n in range(4)])} <= pids
    cluster.close()
    gone = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    psutil.wait_procs(gone, timeout=5)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


@pytest.mark.parametrize(("task", "code"), [({"stop": "no weights"}, Exit.USAGE), ({"mistake": "x"}, Exit.INTERNAL)])
def test_what_is_no_tasks_fault_stops_the_run(cluster: Cluster, task: dict[str, Any], code: Exit) -> None:
    with pytest.raises(RunError, match=r"no weights|KeyError") as caught:
        final(cluster, [task])
    assert caught.value.exit_code == code


def test_a_dask_worker_that_is_killed_loses_its_task_only_and_the_next_is_used(
    dask: Dask, cluster: Cluster, tmp_path: Path
) -> None:
    waiting: deque[dict[str, Any]] = deque([{"n": 0}, {"kill dask": str(tmp_path / "once"), "sleep": 5}, {"n": 2}])
    done, lost = [], []
    for event in cluster.events(waiting):
        if event.lost:
            lost.append((event.task, event.lost.code, event.stage, event.lost.message))
            waiting.append({**event.task, "sleep": 0})
        elif event.result:
            done.append(str(event.task))
    assert len(done) == len(set(done)) == 3
    ((_, code, stage, message),) = lost
    assert code == "killed"
    assert stage in ("", "begin")  # what it told in its last moment may be lost with it
    assert "Dask worker" in message
    with dask.client() as client:
        client.wait_for_workers(2, timeout=LIMIT)  # its nanny starts another
    assert len({event.result["pid"] for event in final(cluster, [{"sleep": 1.0} for _ in range(6)])}) == 2


def test_a_run_that_is_killed_leaves_nothing_at_work(dask: Dask, tmp_path: Path) -> None:
    lines = [
        "import batch_work, collections, os, signal",
        "from medrobust.batch.cluster import Cluster",
        f"cluster = Cluster(work=batch_work.do, scheduler={dask.address!r})",
        "for event in cluster.events(collections.deque([{'sleep': 600}, {'sleep': 600}])):",
        "    os.kill(os.getpid(), signal.SIGKILL)",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, timeout=LIMIT, check=False)
    assert run.returncode == -signal.SIGKILL
    cluster = Cluster(work=batch_work.do, scheduler=dask.address)  # its workers are free for others at once
    assert len(final(cluster, [{"n": 1}, {"n": 2}])) == 2
    cluster.close()


def test_a_worker_that_sees_something_else_is_refused(cluster: Cluster) -> None:
    cluster.view = batch_work.place
    with pytest.raises(RunError, match="OUTPUT: expected here, got a worker") as caught:
        final(cluster, [{"n": 1}])
    assert caught.value.exit_code == Exit.USAGE
    assert "under the same paths" in str(caught.value)


def test_another_version_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medrobust.__version__", "99.0")
    with pytest.raises(RunError, match=r"versions: expected medrobust 99.0; .*, got medrobust [\d.]+; torch"):
        final(cluster, [{"n": 1}])


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medrobust.batch.cluster.CONNECT", 0.5)
    cluster = Cluster(work=batch_work.do, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(RunError, match="no Dask scheduler answers"):
        final(cluster, [{"n": 1}])
    cluster.close()


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["batch", *map(str, words)], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_tree_is_that_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local cluster, with a process killed at its case, and paths below the folder that one is in."""
    bundle = small_bundle.make(tmp_path / "bundle")
    config = bundle / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("oracles.VoxelLinear", "slow_network.SlowLinear"))
    batch_tree.make(tmp_path / "in", sound=3)
    monkeypatch.chdir(tmp_path)
    shared = ("-b", "bundle", "--trust-bundle", "--private", "secrets")
    assert call("in", "one", *shared, "--workers", 0)[0] == 3
    monkeypatch.setenv("BATCH_WORK_KILL", str(tmp_path / "killed"))
    monkeypatch.setenv("BATCH_WORK_LOADS", str(tmp_path / "loads"))
    code, text = call("in", "many", *shared, "--scheduler", "local", "--workers", 1)
    assert code == 3, text
    assert '"code": "killed"' in text
    assert batch_tree.contents(tmp_path / "many") == batch_tree.contents(tmp_path / "one")
    assert batch_tree.leaks(tmp_path / "many") == []
    assert [word for word in batch_tree.CANARIES if word in text] == []
    # Once in the process that was killed, and once in the next, which did all other cases.
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheduler", "nowhere.json"), "expected --scheduler local, an address"),
        (("--scheduler", "local", "--workers", 0), "expected --workers 1 or more"),
    ],
)
def test_mistakes(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    code, text = call(tmp_path, tmp_path / "out", "-b", tmp_path, *words)
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_a_machine_that_reads_files_with_something_else_sees_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse a series that the others take."""
    store = Store(tmp_path / "out")
    store.prepare()
    note = store.state / "runs" / "a.json"
    note.write_text("{}")
    (store.state / "settings.lock").touch()
    recipe = Recipe(root=small_bundle.make(tmp_path / "bundle"), trusted=True)
    sight_of = Sight(recipe=recipe, store=store, note=note, example=None, details=tmp_path)
    before = sight_of()
    assert f"pydicom {version('pydicom')}" in before["readers"]
    known = sight.version

    def lacking(name: str) -> str:
        if name == "pylibjpeg":
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(sight, "version", lacking)
    after = sight_of()
    assert "pylibjpeg none" in after["readers"]
    assert {name for name in before if before[name] != after[name]} == {"readers"}
