"""OUTPUT never holds half of anything: killed at any moment, run by two at once, read by a newer version."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medrobust.batch import commit, report
from medrobust.batch.commit import Made, Store
from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.locks import BusyError, hold, membership

KEY = "case-0123456789abcdef"
OLD, NEW = (Made(input=f"i{n}", bundle="b", settings="s") for n in (1, 2))
FAULT = CaseError("corrupt", "a reason")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "out")
    store.prepare()
    return store


def put(store: Store, made: Made, content: str = "labels") -> dict[str, Any]:
    with store.lock(KEY), store.stage(KEY) as folder:
        (folder / "seg.nii.gz").write_text(content)
        return store.commit(KEY, folder, made, {"warnings": []})


def tree(store: Store) -> dict[str, str]:
    """Every file outside ``.state``; what is drawn at random is left out."""
    found = {}
    for path in sorted(store.output.rglob("*")):
        name = path.relative_to(store.output).as_posix()
        if path.is_file() and not name.startswith(".state"):
            text = path.read_text()
            if path.suffix == ".json":
                text = json.dumps({k: v for k, v in json.loads(text).items() if k != "attempt"})
            found[name] = text
    return found


def test_done_means_verified(store: Store) -> None:
    assert store.done(KEY, OLD) is None
    record = put(store, OLD)
    assert store.done(KEY, OLD) == record
    assert record["outputs"]["seg.nii.gz"]["bytes"] == 6
    assert store.done(KEY, NEW) is None
    seg = store.cases / KEY / "seg.nii.gz"
    seg.write_text("Labels")
    assert store.done(KEY, OLD) is None
    seg.unlink()
    assert store.done(KEY, OLD) is None
    assert put(store, OLD)["outputs"] == record["outputs"]
    (store.cases / KEY / "case.json").write_text('{"schema": 1, "status": "do')
    assert store.done(KEY, OLD) is None


def test_a_failure_moves_the_old_result_out_and_a_success_takes_the_failure_away(store: Store) -> None:
    put(store, OLD, "old")
    with store.lock(KEY):
        store.refuse(KEY, NEW, FAULT, {"stage": "read"})
    assert not (store.cases / KEY).exists()
    assert (store.quarantine / KEY / "previous" / "seg.nii.gz").read_text() == "old"
    (record,) = store.records()
    assert (record["status"], record["code"], record["reason"], record["stage"]) == (
        "rejected",
        "corrupt",
        "a reason",
        "read",
    )
    put(store, NEW, "new")
    assert list(store.quarantine.iterdir()) == []
    assert [record["status"] for record in store.records()] == ["done"]
    assert list(store.staging.iterdir()) == []


STEPS = ["os.rename", "os.replace", "os.fsync", "shutil.rmtree"]


class KilledError(BaseException):
    """Stands for the moment in which the process is gone."""


class Axe:
    """Falls before the n-th call of the functions it hangs over, and on every call after it."""

    def __init__(self, calls: int) -> None:
        self.left, self.fell = calls, False

    def over(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            self.fell = self.fell or self.left <= 0
            if self.fell:
                raise KilledError
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("work", ["commit", "overwrite", "refuse", "refuse over a result"])
def test_killed_between_any_two_steps_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Cut off before the n-th call to the file system, for every n; the second run ends where an unbroken one does."""

    def do(store: Store) -> None:
        if work.startswith("refuse"):
            with store.lock(KEY):
                store.refuse(KEY, NEW, FAULT, {"stage": "read"})
        else:
            put(store, NEW, "new")

    def begin(name: str) -> Store:
        store = Store(tmp_path / name)
        store.prepare()
        if work in ("overwrite", "refuse over a result"):
            put(store, OLD, "old")
        return store

    whole = begin("whole")
    do(whole)
    expected = tree(whole)
    for cut in range(1, 40):
        store = begin(f"cut{cut}")
        axe = Axe(cut)
        with monkeypatch.context() as patch, contextlib.suppress(KilledError):
            for step in STEPS:
                module, name = step.split(".")
                patch.setattr(getattr(commit, module), name, axe.over(getattr(getattr(commit, module), name)))
            do(store)
        result = store.cases / KEY
        if result.exists():  # never half of a result
            record = json.loads((result / "case.json").read_text())
            assert store.done(KEY, Made(**record["made_of"])) is not None
        store.prepare()
        assert list(store.staging.iterdir()) == []
        if store.done(KEY, NEW) is None:
            do(store)
        else:
            store.forgive(KEY)
        found = tree(store)
        previous = {name: text for name, text in found.items() if "/previous/" not in name}
        assert previous == {name: text for name, text in expected.items() if "/previous/" not in name}
        if not axe.fell:
            assert cut > 3
            return
    pytest.fail("expected fewer steps")


def test_what_a_killed_run_left_is_swept_but_not_what_another_works_on(store: Store) -> None:
    dead, alive = (store.staging / f"case-{digit * 16}.abc" for digit in "12")
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "seg.nii.gz").write_text("half")
    (store.staging / "report.abc").write_text("half")
    with store.lock("case-2222222222222222"):
        store.sweep()
    assert [path.name for path in store.staging.iterdir()] == [alive.name]


def test_an_output_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="OUTPUT cannot be written") as caught:
        Store(tmp_path / "file").prepare()
    assert caught.value.exit_code == Exit.OUTPUT


def test_a_newer_version_is_not_touched(store: Store) -> None:
    put(store, OLD)
    path = store.cases / KEY / "case.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(RunError, match="newer medrobust"):
        store.done(KEY, OLD)


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from medrobust.batch.locks import hold
with hold(Path({str(tmp_path / "lock")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BusyError), hold(tmp_path / "lock", wait=0.1):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with hold(tmp_path / "lock", wait=2.0):
        pass


def test_runs_of_one_kind_share_an_output_and_others_wait(store: Store) -> None:
    with membership(store.state, {"bundle": "a"}):
        with membership(store.state, {"bundle": "a"}):
            pass
        with (
            pytest.raises(RunError, match=f"process {os.getpid()} on") as caught,
            membership(store.state, {"bundle": "b"}),
        ):
            pass
        assert caught.value.exit_code == Exit.HELD
    begin = time.monotonic()
    with membership(store.state, {"bundle": "b"}):
        assert time.monotonic() - begin < 5


def test_reports_of_runs_that_end_at_once_are_written_one_after_the_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tables of one run would stand beside the page of the other."""
    put(store, OLD)
    writers, publish = [], Store.publish

    def slowly(self: Store, name: str, text: str) -> None:
        writers.append(threading.get_ident())
        time.sleep(0.02)
        publish(self, name, text)

    monkeypatch.setattr(Store, "publish", slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: report.write(Store(store.output), {"run": number}), range(3)))
    assert len(set(writers)) == 3
    assert len([*itertools.groupby(writers)]) == 3
