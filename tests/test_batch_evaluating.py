"""``evaluate`` and ``attack`` on workers and in shares: the folder is the one that a single process makes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_bundle
from typer.testing import CliRunner

from medrobust import merging
from medrobust.batch.evaluating import Case, Crew, Evaluator, evaluate
from medrobust.batch.faults import CaseError
from medrobust.batch.locks import hold
from medrobust.batch.night import Night
from medrobust.batch.workers import Event
from medrobust.cli import app
from medrobust.preparing import prepare
from medrobust.run_tables import read_failures

ROOT = Path(__file__).resolve().parent.parent
ATTACKS = ["fgsm eps=8/255 objective=CE", "gaussian_noise std=8/255"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle.make(tmp_path / "bundle", cases=4)


def call(bundle: Path, out: Path, *words: object, code: int = 0, command: str = "attack") -> str:
    attacks = [word for attack in ATTACKS for word in ("-a", attack)]
    wanted = [command, "-b", bundle, "-o", out, *attacks, *words]
    result = CliRunner().invoke(app, [str(word) for word in wanted], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its state, and the reports' pages, which hold times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".state" not in path.parts and path.suffix != ".html"
    }


def make(bundle: Path, folder: Path, **more: Any) -> partial[Any]:
    return partial(prepare, bundle=bundle, output=folder, attack=ATTACKS, pictures=False, **more)


def silent(event: str, **content: Any) -> None:
    """A log that keeps nothing."""


@pytest.fixture
def alone(bundle: Path, tmp_path: Path) -> dict[str, bytes]:
    call(bundle, tmp_path / "alone")
    found = contents(tmp_path / "alone")
    assert {"records.csv", "run.json", "volumes/manifest.csv", "volumes/case3__FGSM__whole-volume__adv.nii.gz"} <= {
        *found
    }
    return found


def test_workers_make_the_same_folder(bundle: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    text = call(bundle, tmp_path / "out", "--workers", 2, "--timeout-per-case", 300)
    assert "case3: done" in text
    assert contents(tmp_path / "out") == alone
    assert list((tmp_path / "out" / ".state" / "cases").iterdir()) == []


def test_evaluate_has_pictures_and_a_report(bundle: Path, tmp_path: Path) -> None:
    for name, words in (("alone", ()), ("out", ("--num-parts", 1, "--workers", 1))):
        call(bundle, tmp_path / name, *words, command="evaluate")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 4 * 3
    assert (tmp_path / "out" / "report.html").is_file()


def test_shares_of_one_output_make_the_same_folder(bundle: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    counts = []
    for part in range(3):
        call(bundle, out, "--num-parts", 3, "--part-id", part)
        rows = (out / "records.csv").read_text().splitlines()[1:] if (out / "records.csv").is_file() else []
        counts.append(len({row.split(",")[0] for row in rows}))
    assert counts[0] < counts[-1] == 4  # each share did some, and no share all
    assert contents(out) == alone
    assert "expected --part-id from 0 to 2, got 3 of 3" in call(bundle, out, "--num-parts", 3, "--part-id", 3, code=2)


def test_a_second_run_goes_on(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(bundle, out)
    before = contents(out)
    assert "case0: kept" in call(bundle, out, "--num-parts", 1, "--workers", 1)
    assert contents(out) == before
    text = call(bundle, out, "--workers", 1, "-a", "uniform: random_noise eps=4/255")
    assert "case0: uniform" in text
    assert "case0: FGSM" not in text
    call(bundle, tmp_path / "whole", "-a", "uniform: random_noise eps=4/255")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_case_that_fails_costs_itself(bundle: Path, tmp_path: Path) -> None:
    (bundle / "data" / "case1.nii.gz").unlink()
    for name, words in (("alone", ()), ("out", ("--workers", 2))):
        assert "case case1 failed: expected the image case1.nii.gz" in call(bundle, tmp_path / name, *words, code=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert list(read_failures(tmp_path / "out")) == ["case1"]


def test_a_killed_worker_costs_one_condition(bundle: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    config = bundle / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("oracles.VoxelLinear", "slow_network.SlowLinear"))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "BATCH_WORK_KILL": str(tmp_path / "killed")}
    out, attacks = tmp_path / "out", [word for attack in ATTACKS for word in ("-a", attack)]
    words = ["attack", "-b", str(bundle), "-o", str(out), *attacks, "--workers", "2"]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "medrobust", *words],
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "killed").exists()
    assert b"the worker was ended by SIGKILL" in run.stdout
    found = {name: data.replace(b"SlowLinear", b"VoxelLinear") for name, data in contents(out).items()}
    assert found == alone


class Losing:
    """A runner whose worker is lost with each case, after it has done some of it."""

    def __init__(self, evaluator: Evaluator, bundle: Path) -> None:
        self.evaluator, self.bundle = evaluator, bundle

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        while waiting:
            task = waiting.popleft()
            part = self.evaluator.part(task)
            merging.begin(part, self.evaluator.folder, task.key)
            run = prepare(bundle=self.bundle, output=part, attack=ATTACKS[1:], pictures=False)[0]
            run.evaluate([task.paths], names=[task.key])
            fault = CaseError("timeout", "hung in 'FGSM' beyond the limit of 3 s: the worker was ended", kind="failed")
            yield Event(task=task, stage="FGSM", lost=fault, seconds=3.0)

    def close(self) -> None:
        """Nothing is left to end."""


def test_what_a_lost_case_had_is_kept(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run, cases = make(bundle, folder)()
    run.check_settings({"case0": cases[0]})
    evaluator = Evaluator(make=make(bundle, folder), folder=folder)
    for name in ("locks", "cases"):
        (evaluator.state / name).mkdir(parents=True)
    night = Night(work=evaluator, runner=Losing(evaluator, bundle), log=silent)
    assert night.run([Case(key="case0", paths=cases[0])]) == 3
    assert read_failures(folder) == {"case0": "hung in 'FGSM' beyond the limit of 3 s: the worker was ended"}
    assert {condition for _, condition, _ in run.done()} == {"clean", "GaussianNoise"}
    evaluate(make(bundle, folder), run, cases, Crew(number=1), silent)
    assert read_failures(folder) == {}
    assert len({condition for _, condition, _ in run.done()}) == 4


def test_a_case_of_another_run_is_waited_for(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, cases = make(bundle, folder)()
    evaluator = Evaluator(make=make(bundle, folder), folder=folder)
    for name in ("locks", "cases"):
        (evaluator.state / name).mkdir(parents=True)
    case = Case(key="case0", paths=cases[0])
    with hold(evaluator._lock(case)):
        assert evaluator(case, lambda stage: None)["status"] == "busy"
    assert evaluator(case, lambda stage: None)["status"] == "done"
    assert evaluator(case, lambda stage: None)["status"] == "kept"


def test_a_merge_that_is_cut_short_is_finished_later(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, part = tmp_path / "model", tmp_path / "model" / ".state" / "cases" / "case0"
    run, cases = make(bundle, part)()
    run.evaluate(cases[:1], names=["case0"])
    (model / "volumes").mkdir()
    merging.write_failures(model, {"case0": "of an earlier run", "case9": "another"})
    whole = shutil.copytree(model, tmp_path / "whole")
    merging.merge(whole / ".state" / "cases" / "case0", whole, "case0")
    expected = contents(whole)
    assert "volumes/case0__FGSM__whole-volume__adv.nii.gz" in expected
    assert read_failures(whole) == {"case9": "another"}

    for name in ("write_manifest", "note_failure", "append"):
        monkeypatch.setattr(merging, name, _counted(getattr(merging, name)))
    monkeypatch.setattr(os, "replace", _counted(os.replace))
    monkeypatch.setattr(merging.shutil, "rmtree", _counted(shutil.rmtree))
    for cut in itertools.count(1):
        folder = shutil.copytree(model, tmp_path / f"out{cut}")
        again = folder / ".state" / "cases" / "case0"
        _Cut.left = cut
        try:
            merging.merge(again, folder, "case0")
        except _CutError:
            _Cut.left = 10**6
        else:
            break
        merging.sweep(folder, age=0)
        merging.merge(again, folder, "case0")
        assert contents(folder) == expected, cut
        assert not again.exists()
    assert cut > 10


class _CutError(BaseException):
    """The end of the process, as far as the code can see."""


class _Cut:
    left = 10**6


def _counted(function: Any) -> Any:
    def counted(*words: Any, **more: Any) -> Any:
        _Cut.left -= 1
        if _Cut.left <= 0:
            raise _CutError
        return function(*words, **more)

    return counted


@pytest.mark.parametrize("name", ["..", "../../outside", "\u809d" * 60])
def test_any_name_of_a_case_stays_inside(bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    _, cases = make(bundle, folder)()
    evaluator = Evaluator(make=make(bundle, folder), folder=folder)
    part = evaluator.part(Case(key=name, paths=cases[0]))
    assert part.parent == evaluator.state / "cases"
    assert len(part.name) == 32
    assert part != evaluator.part(Case(key="case0", paths=cases[0]))


def test_a_share_without_cases_is_no_failure(bundle: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"out{part}" for part in range(9)]
    texts = [
        call(bundle, out, "--num-parts", 9, "--part-id", part, command="evaluate") for part, out in enumerate(outs)
    ]
    empty = [text for text in texts if "no case falls to this share" in text]
    assert len(empty) == sum(not (out / "records.csv").exists() for out in outs) > 4


def test_limits_need_workers(bundle: Path, tmp_path: Path) -> None:
    assert "only another process can be ended" in call(bundle, tmp_path / "out", "--timeout-per-case", 5, code=2)
    assert "expected --memory such as" in call(bundle, tmp_path / "out", "--workers", 1, "--memory", "much", code=2)
