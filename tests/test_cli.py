"""The command line on scans from disk: numbers that are known, failures that cost one case, mistakes told in a line."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import small_bundle
import torch
from nibabel.orientations import aff2axcodes
from oracles import VoxelLinear
from typer.testing import CliRunner

from medrobust.cli import _clear_demo, app
from medrobust.records import Record, read_csv, write_csv
from medrobust.run import case_names

EPS = 8 / 255
ATTACK = "fgsm eps=8/255 objective=CE"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle.make(tmp_path / "bundle")


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def values(records: list[Record], **wanted: str) -> list[float]:
    return [r.value for r in records if all(getattr(r, key) == value for key, value in wanted.items())]


def known_dice(bundle: Path, case: str, eps: float) -> float:
    """Foreground Dice of the linear network on the worst image, from the files alone."""
    image = (nib.load(bundle / "data" / f"{case}.nii.gz").get_fdata() + 1000) / 2000
    label = nib.load(bundle / "data" / f"{case}_label.nii.gz").get_fdata()
    worst = VoxelLinear.worst(torch.tensor(image), torch.tensor(label), eps)
    pred = (worst > 0.5).numpy()
    return float(2 * (pred & (label == 1)).sum() / (pred.sum() + (label == 1).sum()))


def test_evaluate(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("evaluate", "-b", bundle, "-o", out, "-a", ATTACK, "--protocol", "both", "--note", "for the test")
    records = read_csv(out / "records.csv")
    for case in ("case0", "case1"):
        shared = {"case": case, "metric": "dice", "class_name": "organ"}
        assert values(records, **shared, condition="clean") == pytest.approx([known_dice(bundle, case, 0)], abs=1e-3)
        for protocol in ("whole volume", "tiles"):
            found = values(records, **shared, condition="FGSM", protocol=protocol)
            assert found == pytest.approx([known_dice(bundle, case, EPS)], abs=1e-3)
            assert values(records, case=case, condition="FGSM", metric="linf", protocol=protocol) == pytest.approx(
                [EPS], abs=1e-6
            )
    assert {r.seed for r in records} == {0}
    assert all(r.model.startswith("VoxelLinear model.pt sha256:") for r in records)
    noise = values(records, condition="noise 8/255", metric="linf")
    assert noise == pytest.approx([EPS, EPS], abs=1e-6)
    assert {r.attack for r in records if r.condition == "FGSM"} == {
        "FGSM(objective=CrossEntropy(head='softmax'), targeted=False, eps=0.03137254901960784, norm='linf')"
    }
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names[0] == "case0__FGSM__tiles.png"
    assert len(names) == 6
    page = (out / "report.html").read_text()
    assert "for the test" in page
    assert "http://" not in page  # self-contained
    assert "https://" not in page
    assert "for the test" in (out / "report.md").read_text()
    assert not (out / "failures.csv").exists()


def test_voxels_labelled_minus_one_have_no_say(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "data" / "case0_label.nii.gz"
    label = np.asarray(nib.load(path).dataobj).astype(np.int16)
    label[:3] = -1
    small_bundle.write_scan(path, label)
    call("evaluate", "-b", bundle, "-o", tmp_path / "run", "-a", "sea eps=8/255 budget=fast", "--soundness", "off")
    records = read_csv(tmp_path / "run" / "records.csv")
    image = (nib.load(bundle / "data" / "case0.nii.gz").get_fdata()[3:] + 1000) / 2000
    pred, true = image > 0.5, label[3:] == 1
    expected = 2 * (pred & true).sum() / (pred.sum() + true.sum())
    shared = {"case": "case0", "metric": "dice", "class_name": "organ"}
    assert values(records, **shared, condition="clean") == pytest.approx([expected], abs=1e-3)
    worst = VoxelLinear.worst(torch.tensor(image), torch.tensor(label[3:]), EPS)
    pred = (worst > 0.5).numpy()
    expected = 2 * (pred & true).sum() / (pred.sum() + true.sum())
    lowest = min(value for r in records if r.condition != "clean" for value in values([r], **shared))
    assert lowest == pytest.approx(expected, abs=1e-3)
    saved = nib.load(tmp_path / "run" / "volumes" / "case0__label.nii.gz")
    assert sorted(np.unique(np.asarray(saved.dataobj))) == [-1, 0, 1]


def test_saved_volumes_keep_geometry_and_give_the_same_dice(bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    call("attack", "-b", bundle, "-o", first, "-a", ATTACK)
    assert not (first / "report.html").exists()
    volume = nib.load(first / "volumes" / "case0__FGSM__whole-volume__adv.nii.gz")
    assert volume.get_data_dtype() == np.float32
    assert aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_allclose(volume.header.get_zooms(), (2.0, 1.5, 3.0))
    assert volume.header.get_xyzt_units()[0] == "mm"
    assert (int(volume.header["qform_code"]), int(volume.header["sform_code"])) == (1, 1)
    call("evaluate", "-b", bundle, "-o", second, "--saved", first / "volumes")
    before, after = (read_csv(folder / "records.csv") for folder in (first, second))
    for metric in ("dice", "hd95", "linf", "ssim"):
        assert values(after, condition="FGSM", metric=metric) == pytest.approx(
            values(before, condition="FGSM", metric=metric), abs=1e-6
        )
    # Said in the records: such volumes may have been made against another model.
    assert {r.attack for r in after} == {f"saved {r.attack}" if r.attack else "" for r in before}
    volume = first / "volumes" / "case0__FGSM__whole-volume__adv.nii.gz"
    volume.write_bytes((first / "volumes" / "case1__FGSM__whole-volume__adv.nii.gz").read_bytes())
    text = call("evaluate", "-b", bundle, "-o", tmp_path / "third", "--saved", first / "volumes", code=1)
    assert "as its manifest describes it" in text


def test_a_second_run_continues(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK)
    rows = (out / "records.csv").read_text()
    assert "already there" in call("attack", "-b", bundle, "-o", out, "-a", ATTACK)
    assert (out / "records.csv").read_text() == rows
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK, "-a", "blur: gaussian_noise std=8/255")
    assert (out / "records.csv").read_text().startswith(rows)
    added = read_csv(out / "records.csv")[len(rows.splitlines()) - 1 :]
    assert {r.condition for r in added} == {"blur"}


OTHER = [
    (("-a", "fgsm eps=4/255"), "expected FGSM as in"),
    (("-a", ATTACK, "--seed", "1"), "expected the seed of the run"),
    (("-a", ATTACK, "--label-free"), "expected the label_free of the run"),
    (("-a", ATTACK, "--set", "validate#inferer#overlap=0.25"), "expected the overrides of the run"),
]


@pytest.mark.parametrize(("words", "message"), OTHER)
def test_numbers_of_other_settings_are_never_mixed(
    bundle: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "run"
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK)
    rows = (out / "records.csv").read_text()
    assert message in call("attack", "-b", bundle, "-o", out, *words, code=2).replace("\n", " ")
    assert (out / "records.csv").read_text() == rows


def test_another_file_of_the_same_name_is_not_taken_for_it(bundle: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "run", bundle / "data" / "case0.nii.gz"
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK, "--image", image)
    image.write_bytes((bundle / "data" / "case1.nii.gz").read_bytes())
    text = call("attack", "-b", bundle, "-o", out, "-a", ATTACK, "--image", image, code=2)
    assert "another file of that name" in text.replace("\n", " ")


def test_a_control_crafted_after_a_crash_has_its_attacks_norm(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("attack", "-b", bundle, "-o", out, "-a", "vafa steps=2 block_size=4,4,4", "--split", "training")
    call(*words)
    whole = read_csv(out / "records.csv")
    write_csv([r for r in whole if r.condition != "VAFA equal noise"], out / "records.csv")
    call(*words)
    assert read_csv(out / "records.csv") == whole


def test_a_bad_file_costs_that_file_only(bundle: Path, tmp_path: Path) -> None:
    broken = bundle / "data" / "case0.nii.gz"
    broken.write_bytes(broken.read_bytes()[:100])
    out = tmp_path / "run"
    text = call("evaluate", "-b", bundle, "-o", out, "-a", ATTACK, "--no-pictures", code=1)
    assert "case case0 failed" in text
    assert {r.case for r in read_csv(out / "records.csv")} == {"case1"}
    with (out / "failures.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["case"] == "case0"
    assert str(tmp_path) not in row["reason"]
    assert "Case case0 failed" in (out / "report.md").read_text()
    (out / "report.md").unlink()
    call("report", out, code=1)
    assert "Case case0 failed" in (out / "report.md").read_text()


def spoil(array: np.ndarray, how: str) -> np.ndarray:
    if how == "nan":
        array = array.copy()
        array[3, 3, 3] = np.nan
    return {"4d": np.stack([array] * 3, -1), "grid": array[:-2]}.get(how, array)


@pytest.mark.parametrize(
    ("how", "message"),
    [("nan", "finite intensities"), ("4d", "expected"), ("grid", "expected")],
)
def test_spoiled_images_are_explained(bundle: Path, tmp_path: Path, how: str, message: str) -> None:
    path = bundle / "data" / "case0.nii.gz"
    small_bundle.write_scan(path, spoil(np.asarray(nib.load(path).dataobj), how))
    text = call("attack", "-b", bundle, "-o", tmp_path / "run", "-a", ATTACK, code=1)
    (line,) = [line for line in text.splitlines() if line.startswith("case case0 failed:")]
    assert message in line


def test_one_image_without_a_label_attacks_the_prediction(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK, "--image", bundle / "data" / "case1.nii.gz")
    records = read_csv(out / "records.csv")
    assert values(records, condition="clean", metric="dice") == [1.0, 1.0]
    assert values(records, condition="FGSM", metric="dice", class_name="organ")[0] < 1


def test_training_split_and_data_list(bundle: Path, tmp_path: Path) -> None:
    call("attack", "-b", bundle, "-o", tmp_path / "a", "-a", ATTACK, "--split", "training")
    assert {r.case for r in read_csv(tmp_path / "a" / "records.csv")} == {"case0"}
    listing = bundle / "list.json"
    listing.write_text('{"night": [{"image": "data/case1.nii.gz", "label": "data/case1_label.nii.gz"}]}')
    words = ("--data-list", listing, "--section", "night")
    call("attack", "-b", bundle, "-o", tmp_path / "b", "-a", ATTACK, *words)
    assert {r.case for r in read_csv(tmp_path / "b" / "records.csv")} == {"case1"}


def test_vafa_stands_beside_its_controls(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("attack", "-b", bundle, "-o", out, "-a", "vafa steps=2 block_size=4,4,4")
    records = read_csv(out / "records.csv")
    names = list(dict.fromkeys(r.condition for r in records))
    assert names == ["clean", "VAFA", "VAFA tables only", "VAFA equal noise"]
    norm = values(records, condition="VAFA", metric="l2")
    assert values(records, condition="VAFA equal noise", metric="l2") == pytest.approx(norm, rel=1e-4)
    (text,) = {r.attack for r in records if r.condition == "VAFA tables only"}
    assert "steps=0" in text


MISTAKES = [
    (("-a", "pdg"), "expected an attack among"),
    (("-a", "pgd stepz=3"), "did you mean steps"),
    (("-a", "pgd", "-a", "pgd steps=3"), "twice"),
    ((), "at least one --attack"),
    (("-a", "pgd", "--protocol", "patches"), "whole, tiles, both or prompts"),
    (("-a", "pgd", "--set", "validate#inferer#overlp=0.1"), "did you mean validate#inferer#overlap"),
    (("-a", "pgd", "--set", "overlap"), "expected --set id=value"),
    (("-a", "pgd", "--split", "test"), "expected a split"),
    (("-a", "pgd", "--weights", "none.pt"), "expected weights in none.pt"),
    (("-a", "pgd", "--data-list", "none.json"), "expected a data list"),
    (("--saved", "nowhere"), "expected manifest.csv"),
    (("--saved", "nowhere", "-a", "pgd"), "either --attack or --saved"),
    (("-a", "pgd", "--label", "a.nii"), "--image with --label"),
    (("-a", "clean: pgd"), "expected a name of its own"),
    (("-a", "a b: pgd", "-a", "a-b: fgsm"), "expected a name of its own"),
    (("-a", "pgd targeted=true"), "expected a goal for the targeted attack"),
    (("-a", "pgd eps=["), "expected a number, a word or a list"),
    (("-a", "pgd steps=4.5"), "expected whole steps"),
    (("-a", "pgd", "--set", "validate#dataset#data=$1/0"), "expected validate#dataset#data of bundle to be built"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_end_in_one_line_and_code_2(
    bundle: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "run"
    text = call("evaluate", "-b", bundle, "-o", out, *words, code=2)
    (line,) = [line for line in text.splitlines() if line.strip()]
    assert line.startswith("error: expected")
    assert message in line
    assert not out.exists()


def test_wrong_channel_count_and_no_bundle(bundle: Path, tmp_path: Path) -> None:
    text = call("evaluate", "-b", tmp_path, "-o", tmp_path / "run", "-a", "pgd", code=2)
    assert "expected a MONAI bundle" in text
    metadata = bundle / "configs" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"1": "organ"', '"1": "organ", "2": "other"'))
    text = call("attack", "-b", bundle, "-o", tmp_path / "run", "-a", "pgd", code=1)
    assert "got 2 channels" in text


def test_the_demo_clears_only_a_demo(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text("a night's work")
    with pytest.raises(ValueError, match="expected a new folder or that of an earlier demo"):
        _clear_demo(tmp_path)
    (tmp_path / "run.json").write_text('{"shared": {"purpose": "demo"}}')
    (tmp_path / "mine.txt").write_text("kept")
    _clear_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_names_of_cases() -> None:
    names = case_names([{"image": name} for name in ("x/a.nii", "y/a.nii.gz", "a_2.nii", "b.nii")])
    assert names == ["a", "a_2", "a_2_2", "b"]


def test_report_again_and_list(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("attack", "-b", bundle, "-o", out, "-a", ATTACK)
    call("report", out)
    assert (out / "report.html").is_file()
    call("report", tmp_path / "nothing", code=2)
    text = call("list")
    assert "vafa2d" in text
    assert "hd95" in text
