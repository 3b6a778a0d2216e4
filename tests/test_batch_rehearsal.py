"""A small night with everything at once: workers, a worker killed, the run killed, and the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import batch_tree
import small_bundle
from typer.testing import CliRunner

from medrobust.batch import report
from medrobust.cli import app

ROOT = Path(__file__).resolve().parent.parent


def test_killed_and_run_again_gives_the_tree_of_an_unbroken_run(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    config = bundle / "configs" / "train.yaml"
    config.write_text(config.read_text().replace("oracles.VoxelLinear", "slow_network.SlowLinear"))
    tree = batch_tree.make(tmp_path / "in", sound=9)
    whole, out = tmp_path / "whole", tmp_path / "out"

    def words(output: Path, workers: int) -> list[str]:
        options = ["--trust-bundle", "--private", str(tmp_path / "secrets"), "--workers", str(workers)]
        return ["batch", str(tree), str(output), "-b", str(bundle), *options]

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "BATCH_WORK_KILL": str(tmp_path / "killed"),
        "BATCH_WORK_SLEEP": "0.1",
    }
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "medrobust", *words(out, 2)], env=environment, stdout=log, stderr=log
        )
        until = time.monotonic() + 300
        while len(list((out / "cases").glob("*"))) < 3 and run.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert run.poll() is None, (tmp_path / "log").read_text()
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert (tmp_path / "killed").exists()
    assert '"code": "killed"' in (tmp_path / "log").read_text()  # the worker's death was told, and its case tried again
    unfinished = len(list((out / "cases").glob("*")))
    assert 3 <= unfinished < 9
    assert not (out / "cases.csv").exists()

    for output in (out, whole):
        result = CliRunner().invoke(app, words(output, 0))
        assert result.exit_code == 3, result.output
        assert "12 cases in OUTPUT: 9 done, 3 rejected" in result.output
    assert batch_tree.contents(out) == batch_tree.contents(whole)
    assert list((out / ".state" / "staging").iterdir()) == []
    assert batch_tree.leaks(out) == []
    assert {row["status"] for row in report.read_rows(out / "cases.csv")} == {"done", "rejected"}
    assert [word for word in batch_tree.CANARIES if word in (tmp_path / "log").read_text()] == []
