"""A small night with everything at once: workers, a worker killed, the run killed, and the same command again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import batch_tree
import malformed
import numpy as np
import pydicom
import pytest
import small_bundle
from dicom_studies import ORIGIN, SPACING, fill, make_series
from pydicom import Dataset
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


SOUND = {"nifti": 120, "dicom": 60}
BROKEN_NIFTI = (
    *("gz cut in half", "wrong checksum", "text", "70 TB", "a bomb behind the voxels", "one slice", "colour", "NaN"),
    *("forms differ", "spacing 0"),
)
BROKEN_DICOM: dict[str, tuple[dict[str, Any], str]] = {
    "gap": ({"drop": 3}, "missing-slice"),
    "tilted": ({"tilt": 5.0}, "tilted"),
    "cut": ({"cut": 4}, "truncated"),
    "one": ({"slices": 1}, "single-slice"),
    "scout": ({"image_type": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    "x-ray": ({"modality": "CR"}, "modality"),
    "twice": ({"twice": 2}, "duplicate-slice"),
    "size": ({"wide": 3}, "mixed-size"),
    "uneven": ({"moved": 3}, "irregular-spacing"),
    "colour": ({"photometric": "RGB"}, "colour"),
}


def test_a_night_of_two_hundred_studies(tmp_path: Path) -> None:
    """One in ten is broken, in twenty ways; workers and the run are killed at random; the disk is full for a while."""
    expected = _studies(tmp_path / "in")
    small_bundle.make(tmp_path / "bundle")
    words = [sys.executable, str(ROOT / "tests" / "rehearsal.py"), str(tmp_path)]
    alone = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        ["unshare", "-m", *words] if alone else words,
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
    )
    told = json.loads(done.stdout)
    out = tmp_path / "kept" if told["own_disk"] else tmp_path / "out"
    assert told["codes"][-1] == 3
    assert told["did"] == {"worker": 5, "run": 2, "disk": int(told["own_disk"])}

    rows = {row["case"]: row for row in report.read_rows(out / "cases.csv")}
    with (tmp_path / "secrets" / "names.csv").open(encoding="utf-8", newline="") as file:
        found = {row["path"]: rows[row["case"]] for row in csv.DictReader(file)}
    assert {path: (row["status"], row["code"]) for path, row in found.items()} == expected
    assert len(rows) == 200
    assert sum(row["status"] == "done" for row in rows.values()) == 180

    events = [
        json.loads(line)
        for path in (out / ".state" / "runs").glob("*.jsonl")
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]
    finished = Counter(event["case"] for event in events if event["event"] == "done")
    assert max(finished.values()) == 1  # a case that was done was never done again
    assert any(event.get("code") == "killed" for event in events)
    assert any(event.get("code") == "disk-full" for event in events) == told["own_disk"]

    again = report.summarise(report.read_rows(out / "cases.csv"))
    summary = json.loads((out / "summary.json").read_text())
    assert {name: summary[name] for name in again} == again
    assert list((out / ".state" / "staging").iterdir()) == []
    assert batch_tree.leaks(out) == []
    assert [word for word in batch_tree.CANARIES if word in (tmp_path / "log").read_text()] == []
    if not told["own_disk"]:
        pytest.skip("all else was as it should be, but no disk of its own could be mounted, so none was filled")


def _studies(root: Path) -> dict[str, tuple[str, str]]:
    """Write 200 studies; which path ends how, and why."""
    batch_tree.make(root, sound=SOUND["nifti"], broken=False)
    expected = {path.relative_to(root).as_posix(): ("done", "") for path in root.rglob("*.nii.gz")}
    for name in BROKEN_NIFTI:
        ending, data, code = malformed.REJECTED[name]
        path = root / f"DOE^JOHN_{name}" / f"CANARY-MRN-42{ending}"
        path.parent.mkdir()
        path.write_bytes(data())
        expected[path.relative_to(root).as_posix()] = ("rejected", code)
    for number in range(SOUND["dicom"]):
        files = make_series(root / f"DOE^JOHN_d{number}" / "19700101", slices=6 + number % 3, study=f"s{number}")
        expected[_series(root, files)] = ("done", "")
    for name, (wrong, code) in BROKEN_DICOM.items():
        files = _broken_series(root / f"DOE^JOHN_{name}" / "19700101", name, wrong)
        expected[_series(root, files)] = ("rejected", code)
    return expected


def _series(root: Path, files: list[Path]) -> str:
    uid = pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID
    return f"{files[0].parent.relative_to(root).as_posix()}/{uid}"


def _broken_series(folder: Path, name: str, wrong: Mapping[str, Any]) -> list[Path]:
    def change(one: Dataset, index: int) -> None:
        if "image_type" in wrong:
            one.ImageType = wrong["image_type"]
        if wrong.get("moved") == index:
            one.ImagePositionPatient = [*one.ImagePositionPatient[:2], float(one.ImagePositionPatient[2]) + 0.9]
        if wrong.get("wide") == index:
            fill(one, np.zeros((10, 12), np.int16))
        if "photometric" in wrong:
            one.PhotometricInterpretation, one.SamplesPerPixel, one.PlanarConfiguration = "RGB", 3, 0
            one.BitsAllocated = one.BitsStored = 8
            one.HighBit, one.PixelRepresentation, one.PixelData = 7, 0, bytes(one.Rows * one.Columns * 3)
        if wrong.get("twice") == index:
            one.ImagePositionPatient = [float(x) for x in (ORIGIN[0], ORIGIN[1], ORIGIN[2] + (index - 1) * SPACING[2])]

    given = {key: wrong[key] for key in ("tilt", "slices", "modality") if key in wrong}
    files = make_series(folder, study=name, change=change, **{"slices": 8, **given})
    if "drop" in wrong:
        files.pop(wrong["drop"]).unlink()
    if "cut" in wrong:
        path = files[wrong["cut"]]
        path.write_bytes(path.read_bytes()[:-40])
    return files
