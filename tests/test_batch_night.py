"""``medrobust batch`` from end to end, in one process: results, reasons, resuming, exit codes, no name anywhere."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import batch_tree
import nibabel as nib
import numpy as np
import pytest
import small_bundle
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import Invertd
from oracles import VoxelLinear
from typer.testing import CliRunner

from medrobust.batch import report, volumes
from medrobust.batch.command import batch as command
from medrobust.batch.commit import Store
from medrobust.batch.discovery import discover
from medrobust.batch.faults import CaseError
from medrobust.batch.logs import Log
from medrobust.batch.naming import case_key, secret_of
from medrobust.batch.night import Night
from medrobust.batch.recipe import Recipe
from medrobust.batch.segment import Segmenter, Task
from medrobust.batch.workers import Event, Here
from medrobust.bundle import Bundle
from medrobust.cli import app
from medrobust.records import read_csv

CODES = {"cut": "truncated", "nan": "nonfinite", "shear": "sheared"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle.make(tmp_path / "bundle")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return batch_tree.make(tmp_path / "in", sound=3)


def call(tree: Path, out: Path, bundle: Path, *words: object, code: int = 0) -> str:
    arguments = ["batch", tree, out, "-b", bundle, "--trust-bundle", "--workers", "0", *words]
    result = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def key_of(out: Path, relative: str) -> str:
    return case_key(secret_of(out.with_name(out.name + ".private")), relative)


def status(out: Path) -> dict[str, str]:
    return {row["case"]: row["status"] for row in report.read_rows(out / "cases.csv")}


def events(out: Path, run: int = -1) -> dict[str, str]:
    """What the last run did with each case."""
    path = sorted((out / ".state" / "runs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)[run]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["case"]: line["event"] for line in lines if "case" in line and line["event"] != "stage"}


def test_a_night(bundle: Path, tree: Path, tmp_path: Path) -> None:
    """Sound studies as MONAI segments them, broken ones with their reason, a report that follows from its table."""
    out = tmp_path / "out"
    text = call(tree, out, bundle, code=3)
    assert "6 cases in OUTPUT: 3 done, 3 rejected" in text
    opened = Bundle(root=bundle, overrides={})
    for found in discover(tree):
        key = key_of(out, found.relative)
        kind = found.relative.split("/")[0].removeprefix("DOE^JOHN_")
        if kind in CODES:
            reason = json.loads((out / "quarantine" / key / "reason.json").read_text())
            assert (reason["code"], reason["status"], reason["stage"]) == (CODES[kind], "rejected", "read")
            assert not (out / "cases" / key).exists()
            continue
        data = opened.preprocessing({"image": str(found.path)})
        with torch.no_grad():
            pred = sliding_window_inference(data["image"][None], (8, 8, 8), 2, VoxelLinear(), overlap=0.5)
        item = {**data, "pred": pred[0].copy_meta_from(data["image"], copy_attr=False)}
        inverted = Invertd("pred", opened.preprocessing, orig_keys="image", nearest_interp=False)(item)["pred"]
        expected = inverted.argmax(0)
        image = nib.load(out / "cases" / key / "seg.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected.numpy())
        np.testing.assert_array_equal(image.affine, nib.load(found.path).affine)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        record = json.loads((out / "cases" / key / "case.json").read_text())
        assert record["volume_ml"]["organ"] == pytest.approx(int(expected.sum()) * 2 * 1.5 * 3 / 1000, abs=1e-3)
    rows = report.read_rows(out / "cases.csv")
    summary = json.loads((out / "summary.json").read_text())
    assert report.summarise(rows) == {name: value for name, value in summary.items() if name != "about"}
    assert summary["status"] == {"done": 3, "rejected": 3}
    assert summary["codes"] == {"nonfinite": 1, "sheared": 1, "truncated": 1}
    with (out / "failures.csv").open(newline="") as file:
        assert {row["code"] for row in csv.DictReader(file)} == set(CODES.values())
    page = (out / "report.html").read_text()
    assert "not for diagnosis" in page
    assert "http" not in page


def test_no_output_byte_holds_a_canary(
    bundle: Path, tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tree / "DOE^JOHN_link.nii").symlink_to("/DOE^JOHN")
    text = call(tree, out, bundle, "-a", "fgsm eps=8/255 objective=CE", "--json", code=3) + "".join(capfd.readouterr())
    assert batch_tree.leaks(out) == []
    assert [word for word in batch_tree.CANARIES if word in text] == []
    private = tmp_path / "out.private"
    assert batch_tree.leaks(private) != []  # the table of names is there, and the search finds it
    assert private.stat().st_mode & 0o077 == 0


def test_resuming_goes_by_content(bundle: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(tree, out, bundle, code=3)
    first = batch_tree.contents(out)
    call(tree, out, bundle, code=3)
    assert batch_tree.contents(out) == first
    assert sorted(events(out).values()) == ["kept"] * 3 + ["rejected"] * 3
    # Another input of the same name, a result that was damaged: these two, and no other.
    paths = [found for found in discover(tree) if "MRN" in found.relative]
    batch_tree.write(paths[0].path, np.full((12, 10, 11), 500, dtype=np.int16))
    damaged = out / "cases" / key_of(out, paths[1].relative) / "seg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (tree / "DOE^JOHN_cut" / "ct.nii.gz").write_bytes(paths[2].path.read_bytes())  # mended
    call(tree, out, bundle, code=3)
    did = events(out)
    assert {relative: did[key_of(out, relative)] for relative in [one.relative for one in paths]} == {
        paths[0].relative: "done",
        paths[1].relative: "done",
        paths[2].relative: "kept",
    }
    mended = key_of(out, "DOE^JOHN_cut/ct.nii.gz")
    assert did[mended] == "done"
    assert not (out / "quarantine" / mended).exists()
    # Other weights: every case anew.
    torch.save(VoxelLinear(5.0).state_dict(), bundle / "models" / "model.pt")
    call(tree, out, bundle, code=3)
    assert sorted(events(out).values()) == ["done"] * 4 + ["rejected"] * 2
    call(tree, out, bundle, "--overwrite", code=3)
    assert sorted(events(out).values()) == ["done"] * 4 + ["rejected"] * 2


def test_attacked_volumes_cannot_be_mistaken(bundle: Path, tmp_path: Path) -> None:
    tree, out = batch_tree.make(tmp_path / "in", sound=1, broken=False), tmp_path / "out"
    call(tree, out, bundle, "-a", "fgsm eps=8/255 objective=CE")
    (case,) = (out / "cases").iterdir()
    names = sorted(path.name for path in case.iterdir())
    assert names == [
        "adv-FGSM__whole-volume.nii.gz",
        "adv-FGSM__whole-volume_seg.nii.gz",
        "adv-noise-8-255__whole-volume.nii.gz",
        "adv-noise-8-255__whole-volume_seg.nii.gz",
        "case.json",
        "records.csv",
        "seg.nii.gz",
    ]
    adversarial = nib.load(case / names[0])
    assert adversarial.get_data_dtype() == np.float32
    assert b"ADVERSARIAL" in bytes(adversarial.header["descrip"])
    image = Bundle(root=bundle, overrides={}).preprocessing({"image": str(discover(tree)[0].path)})["image"]
    np.testing.assert_allclose(adversarial.affine, image.affine.numpy(), atol=1e-5)
    assert np.abs(np.asarray(adversarial.dataobj) - image[0].numpy()).max() == pytest.approx(8 / 255, abs=1e-6)
    labels = nib.load(case / names[1])
    np.testing.assert_array_equal(labels.affine, nib.load(discover(tree)[0].path).affine)
    record = json.loads((case / "case.json").read_text())
    assert [one["ADVERSARIAL"] for one in record["adversarial"]] == [True, True]
    # What is on the disk gives the Dice that is reported.
    with torch.no_grad():
        pred, clean = (
            sliding_window_inference(volume[None], (8, 8, 8), 2, VoxelLinear(), overlap=0.5)[0].argmax(0)
            for volume in (torch.tensor(np.asarray(adversarial.dataobj))[None], image.as_tensor())
        )
    dice = 2 * int((pred & clean).sum()) / int(pred.sum() + clean.sum())
    reported = [
        one.value
        for one in read_csv(out / "records.csv")
        if (one.condition, one.metric, one.class_name) == ("FGSM", "dice", "organ")
    ]
    assert reported == pytest.approx([dice], abs=1e-3)
    assert "1 ADVERSARIAL" not in (out / "report.html").read_text()
    assert "2 ADVERSARIAL volumes" in (out / "report.html").read_text()


def test_labels_of_a_data_list_are_what_attacks_are_measured_against(bundle: Path, tmp_path: Path) -> None:
    listing, out = bundle / "data" / "list.csv", tmp_path / "out"
    listing.write_text("image,label\ncase0.nii.gz,case1_label.nii.gz\ncase1.nii.gz,case0.nii.gz\n")
    call(listing, out, bundle, "-a", "fgsm eps=8/255 objective=CE", code=3)
    first, second = (key_of(out, f"case{number}.nii.gz") for number in (0, 1))
    labels, reference = (
        np.asarray(nib.load(path).dataobj) > 0
        for path in (out / "cases" / first / "seg.nii.gz", bundle / "data" / "case1_label.nii.gz")
    )
    dice = 2 * (labels & reference).sum() / (labels.sum() + reference.sum())
    found = [
        one.value
        for one in read_csv(out / "records.csv")
        if (one.case, one.condition, one.metric, one.class_name) == (first, "clean", "dice", "organ")
    ]
    assert found == pytest.approx([dice], abs=1e-6)
    assert 0 < dice < 1
    assert status(out)[second] == "rejected"  # an image is no label
    # Another label is another input.
    (bundle / "data" / "case1_label.nii.gz").write_bytes((bundle / "data" / "case0_label.nii.gz").read_bytes())
    call(listing, out, bundle, "-a", "fgsm eps=8/255 objective=CE", code=3)
    assert events(out)[first] == "done"


def test_the_plan_is_told_and_nothing_is_written(bundle: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = call(tree, out, bundle, "--dry-run", "-a", "fgsm")
    assert "6 cases: 3 to do, 0 done, 3 would be rejected" not in text  # a hole in the voxels is not in the header
    assert "rejected: sheared" in text
    assert "rejected: truncated" not in text
    assert "6 cases: 5 to do, 0 done, 1 would be rejected; at most" in text
    assert not out.exists()
    assert not (tmp_path / "out.private").exists()
    call(tree, out, bundle, code=3)
    assert "6 cases: 2 to do, 3 done, 1 would be rejected" in call(tree, out, bundle, "--dry-run")


def test_parts_are_disjoint_and_complete(bundle: Path, tree: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shared = ("--private", tmp_path / "secrets")
    call(tree, whole, bundle, *shared, code=3)
    did: list[str] = []
    for part in range(3):
        result = CliRunner().invoke(
            app,
            [
                str(word)
                for word in (
                    "batch",
                    tree,
                    parts,
                    "-b",
                    bundle,
                    "--trust-bundle",
                    "--workers",
                    0,
                    *shared,
                    "--num-parts",
                    3,
                    "--part-id",
                    part,
                )
            ],
        )
        assert result.exit_code in (0, 3), result.output
        did += events(parts)
    assert sorted(did) == sorted(status(whole))
    assert batch_tree.contents(parts) == batch_tree.contents(whole)


MISTAKES: list[tuple[tuple[str, ...], int, str]] = [
    (("--part-id", "2", "--num-parts", "2"), 2, "expected --part-id from 0 to 1"),
    (("--on-error", "ask"), 2, "expected --on-error skip or stop"),
    (("--geometry", "loose"), 2, "expected geometry strict or lenient"),
    (("--memory", "lots"), 2, "expected --memory such as"),
    (("-a", "pdg"), 2, "expected an attack among"),
    (("--weights", "none.pt"), 2, "expected weights in none.pt"),
    (("--set", "a"), 2, "expected --set id=value"),
    (("--include", "*.mha"), 4, "no .nii, .nii.gz or DICOM file was found"),
]


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES)
def test_mistakes_have_their_exit_code(
    bundle: Path, tree: Path, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    text = call(tree, tmp_path / "out", bundle, *words, code=code)
    assert text.startswith("error: ")
    assert message in text
    assert not (tmp_path / "out").exists()


def test_doors_that_are_shut(bundle: Path, tree: Path, tmp_path: Path) -> None:
    assert "INPUT cannot be read" in call(tmp_path / "nothing", tmp_path / "out", bundle, code=5)
    (tmp_path / "file").write_text("")
    assert "OUTPUT cannot be written" in call(tree, tmp_path / "file", bundle, code=6)
    assert "outside OUTPUT" in call(tree, tmp_path, bundle, code=2)
    result = CliRunner().invoke(app, ["batch", str(tree), str(tmp_path / "out"), "-b", str(bundle)])
    assert result.exit_code == 2
    assert "not trusted" in result.output


def test_stopping_at_failures(bundle: Path, tree: Path, tmp_path: Path) -> None:
    call(tree, tmp_path / "a", bundle, "--on-error", "stop", code=3)
    assert len([one for one in status(tmp_path / "a").values() if one == "rejected"]) == 1
    call(tree, tmp_path / "b", bundle, "--max-failures", "1", code=3)
    assert len([one for one in status(tmp_path / "b").values() if one == "rejected"]) == 2


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """What Python does about SIGINT, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_so_and_goes_on(
    bundle: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    real, cases = volumes.write, [1]

    def write(volume: np.ndarray, path: Path, *rest: Any, **settings: Any) -> str:
        digest = real(volume, path, *rest, **settings)
        cases[0] -= 1
        if cases[0] == -1:  # the second case is in staging, and not committed
            os.kill(os.getpid(), number)
        return digest

    monkeypatch.setattr(volumes, "write", write)
    out = tmp_path / "out"
    call(tree, out, bundle, code=code)
    assert list(status(out).values()).count("done") == 1
    assert list((out / ".state" / "staging").iterdir()) == []
    call(tree, out, bundle, code=3)
    assert sorted(events(out).values()) == ["done"] * 2 + ["kept"] + ["rejected"] * 3


def test_a_full_disk_is_tried_again_and_told(
    bundle: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = volumes.write, [2]

    def write(volume: np.ndarray, path: Path, *rest: Any, **settings: Any) -> str:
        full[0] -= 1
        if full[0] >= 0:
            path.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(volume, path, *rest, **settings)

    monkeypatch.setattr(volumes, "write", write)
    call(tree, tmp_path / "a", bundle, code=3)
    assert sorted(status(tmp_path / "a").values()) == ["done"] * 3 + ["rejected"] * 3
    full[0] = 1000
    call(tree, tmp_path / "b", bundle, code=6)
    assert sorted(status(tmp_path / "b").values()) == ["failed"] * 3 + ["rejected"] * 3
    assert list((tmp_path / "b" / "cases").iterdir()) == []
    assert list((tmp_path / "b" / ".state" / "staging").iterdir()) == []
    full[0] = 0
    call(tree, tmp_path / "b", bundle, code=3)
    assert sorted(status(tmp_path / "b").values()) == ["done"] * 3 + ["rejected"] * 3


def test_room_is_asked_for_before_the_work(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attacked scan of 12 x 10 x 11 voxels: three label maps, and with the control's two volumes of float32."""
    tree, out = batch_tree.make(tmp_path / "in", sound=1, broken=False), tmp_path / "out"
    needed = 3 * (12 * 10 * 11 // 20 + 1024) + 2 * 4 * 12 * 10 * 11
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=needed - 1))
    attack = ("-a", "fgsm eps=8/255 objective=CE")
    call(tree, out, bundle, *attack, code=6)
    (row,) = report.read_rows(out / "failures.csv")
    assert (row["code"], row["stage"]) == ("disk-full", "prepare")
    assert row["reason"] == "the case may need 13 KB in OUTPUT, 13 KB are free"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=needed))
    call(tree, out, bundle, *attack)
    assert list(status(out).values()) == ["done"]


def test_two_runs_on_one_output_never_do_a_case_twice(bundle: Path, tmp_path: Path) -> None:
    tree = batch_tree.make(tmp_path / "in", sound=8)
    store = Store(tmp_path / "out")
    store.prepare()
    cases = [Task(key=case_key(b"x" * 32, one.relative), path=one.path, problem=one.problem) for one in discover(tree)]
    did: list[tuple[str, str]] = []

    def run(order: Callable[[list[Task]], list[Task]]) -> None:
        segmenter = Segmenter(store=store, recipe=Recipe(root=bundle, trusted=True), settings="s")

        def work(task: Task, tell: Callable[[str], None]) -> Any:
            result = segmenter(task, tell)
            did.append((result["case"], result["attempt"] if result["status"] in ("done", "rejected") else ""))
            return result

        with Log(None, quiet=True) as log:
            night = Night(work=segmenter, runner=Here(work=work), log=log, pause=0.05)
            night.run(order(cases))
            assert set(night.results) == {task.key for task in cases}

    threads = [threading.Thread(target=run, args=(order,)) for order in (list, lambda found: found[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attempts = {pair for pair in did if pair[1]}
    assert len(attempts) == len({key for key, _ in attempts}) == len(cases) == 11
    assert len(list(store.records())) == 11


class Lost:
    """A runner whose workers do the case, and are lost before they can say so; or before they do it."""

    def __init__(self, work: Callable[..., Any], fault: CaseError, after: bool) -> None:
        self.work, self.fault, self.after = work, fault, after
        self.calls = 0

    def events(self, waiting: deque[Any]) -> Iterator[Event]:
        while waiting:
            task = waiting.popleft()
            self.calls += 1
            if self.after:
                self.work(task, lambda stage: None)
            yield Event(task=task, stage="commit", lost=self.fault, seconds=1.0)

    def close(self) -> None:
        """Nothing is left to end."""


@pytest.mark.parametrize(
    ("code", "after", "calls", "expected"),
    [
        ("timeout", True, 1, "done"),
        ("timeout", False, 1, "failed"),
        ("killed", False, 2, "failed"),
        ("memory", True, 2, "done"),
    ],
)
def test_a_lost_worker_costs_what_it_had_not_finished(
    bundle: Path, tmp_path: Path, code: str, after: bool, calls: int, expected: str
) -> None:
    tree, store = batch_tree.make(tmp_path / "in", sound=1, broken=False), Store(tmp_path / "out")
    store.prepare()
    segmenter = Segmenter(store=store, recipe=Recipe(root=bundle, trusted=True), settings="s")
    (found,) = discover(tree)
    task = Task(key=case_key(b"x" * 32, found.relative), path=found.path)
    runner = Lost(segmenter, CaseError(code, "lost", kind="failed"), after)
    with Log(None, quiet=True) as log:
        night = Night(work=segmenter, runner=runner, log=log)
        assert night.run([task]) == (0 if expected == "done" else 3)
    assert runner.calls == calls
    (record,) = store.records()
    assert record["status"] == expected
    if expected == "failed":
        assert (record["code"], record["stage"], record["attempts"]) == (code, "commit", calls)


def test_an_output_keeps_its_names(bundle: Path, tree: Path, tmp_path: Path) -> None:
    call(tree, tmp_path / "out", bundle, code=3)
    text = call(tree, tmp_path / "out", bundle, "--private", tmp_path / "other", code=2)
    assert "made with another secret" in text
    assert len(status(tmp_path / "out")) == 6


def test_a_run_of_other_settings_waits(bundle: Path, tree: Path, tmp_path: Path) -> None:
    from medrobust.batch.locks import membership

    out = tmp_path / "out"
    call(tree, out, bundle, code=3)
    with membership(out / ".state", {"bundle": "another"}):
        assert "held by a run of other settings" in call(tree, out, bundle, code=7)


def test_the_command_is_documented(root: Path) -> None:
    page = (root / "docs" / "batch.md").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["batch", "--help"], env={"COLUMNS": "200"})
    options = {word.strip(",") for word in result.output.split() if word.startswith("--")} - {"--help"}
    assert {option for option in options if option not in page} == set()
    assert (command.__doc__ or "").count("Exit codes") == 1
