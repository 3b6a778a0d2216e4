"""Saved volumes evaluated again, and failures that outlive the run they happened in."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_bundle
from test_cli import call, values

from medrobust.preparing import prepare
from medrobust.records import read_csv
from medrobust.run_tables import fingerprint, manifest, read_failures, write_manifest

QUICK = ("--no-pictures", "--soundness", "off")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle.make(tmp_path / "bundle")


def test_two_runs_volumes_are_not_mixed_in_one_folder(bundle: Path, tmp_path: Path) -> None:
    for name, eps in (("a", 1), ("b", 32)):
        call("attack", "-b", bundle, "-o", tmp_path / name, "-a", f"fgsm eps={eps}/255")
    words = ("evaluate", "-b", bundle, "-o", tmp_path / "again", *QUICK, "--saved")
    call(*words, tmp_path / "a" / "volumes")
    rows = (tmp_path / "again" / "records.csv").read_text()
    text = call(*words, tmp_path / "b" / "volumes", code=2).replace("\n", " ")
    assert "expected the saved volumes of the run in" in text
    assert "choose another --output" in text
    assert (tmp_path / "again" / "records.csv").read_text() == rows
    # The same ones in another order, as workers may leave them, are the same.
    volumes = tmp_path / "a" / "volumes"
    before = fingerprint(volumes)
    write_manifest(volumes, manifest(volumes)[::-1])
    assert fingerprint(volumes) == before
    assert "already there" in call(*words, volumes)


def test_the_volumes_of_an_ensemble_that_broke_a_case_early(bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # case0 is broken by the first member, so there is no volume of the second.
    call("evaluate", "-b", bundle, "-o", first, "-a", "sea eps=75/255 budget=fast", "-a", "fgsm eps=1/255", *QUICK)
    call("evaluate", "-b", bundle, "-o", second, "--saved", first / "volumes", *QUICK)
    assert not (second / "failures.csv").exists()
    before, after = (
        [(r.case, r.condition, r.metric, r.class_name) for r in read_csv(folder / "records.csv")]
        for folder in (first, second)
    )
    assert ("case0", "SEA Dice", "dice", "organ") not in after
    assert ("case1", "SEA Dice", "tp", "organ") in after
    assert sorted(after) == sorted(before)
    worst = [line for line in (first / "report.md").read_text().splitlines() if "worst of 2" in line]
    assert worst
    assert [line for line in (second / "report.md").read_text().splitlines() if "worst of 2" in line] == worst
    call("evaluate", "-b", bundle, "-o", second, "--saved", first / "volumes", *QUICK)
    run, _ = prepare(bundle=bundle, output=second, saved=first / "volumes")
    assert run.missing("case0", run.done()) == run.missing("case1", run.done()) == []


def test_a_case_that_has_no_saved_volume_at_all_is_a_failure(bundle: Path, tmp_path: Path) -> None:
    call("attack", "-b", bundle, "-o", tmp_path / "a", "-a", "fgsm", "--split", "training")  # case0 alone
    words = ("evaluate", "-b", bundle, "-o", tmp_path / "again", *QUICK)
    text = call(*words, "--saved", tmp_path / "a" / "volumes", code=1).replace("\n", " ")
    assert "case case1 failed: expected the adversarial volume case1__noise-8-255__whole-volume__adv.nii.gz" in text


def test_volumes_at_the_smallest_eps(bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    search = ("--minimum-eps", "fgsm objective=CE", "--below", "0.6", "--most", "0.4")
    call("evaluate", "-b", bundle, "-o", first, *search, *QUICK)
    call("evaluate", "-b", bundle, "-o", second, "--saved", first / "volumes", *QUICK)
    records = read_csv(second / "records.csv")
    dice = values(records, condition="minimum eps, FGSM", metric="dice", class_name="organ")
    assert dice == pytest.approx(values(read_csv(first / "records.csv"), metric="dice_at_minimum_eps"), abs=1e-6)


@pytest.mark.parametrize("more", [("--minimum-eps", "fgsm"), ("--stored", "png")])
def test_what_saved_volumes_cannot_be_asked(bundle: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    call("attack", "-b", bundle, "-o", tmp_path / "a", "-a", "fgsm", "--split", "training")
    words = ("evaluate", "-b", bundle, "-o", tmp_path / "again", "--saved", tmp_path / "a" / "volumes")
    assert "expected --saved without --minimum-eps and --stored" in call(*words, *more, code=2).replace("\n", " ")
    assert not (tmp_path / "again").exists()


def test_failures_stay_until_their_case_is_done(bundle: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "run", bundle / "data"
    whole = (images / "case0.nii.gz").read_bytes()
    (images / "case0.nii.gz").write_bytes(whole[:100])
    words = ("attack", "-b", bundle, "-o", out, "-a", "fgsm")
    call(*words, "--image", images / "case0.nii.gz", code=1)
    (why,) = read_failures(out).items()
    assert why[0] == "case0"
    # Another case: it is no failure of this call, and the earlier one stays, whether there is something to do or not.
    for _ in range(2):
        call(*words, "--image", images / "case1.nii.gz")
        assert list(read_failures(out).items()) == [why]
    other = tmp_path / "other"
    call("attack", "-b", bundle, "-o", other, "-a", "fgsm", "--split", "training", code=1)
    (images / "case0.nii.gz").write_bytes(whole)
    (other / "run.json").unlink()  # it knows the broken file's hash
    call("attack", "-b", bundle, "-o", other, "-a", "fgsm", "--split", "training")
    assert read_failures(other) == {}
