"""ACDC's folders become cases of the right frames; what is missing or altered is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medrobust.data import acdc, splits


def patient(folder: Path, number: int, diastole: int = 1, systole: int = 12) -> Path:
    """One patient as the challenge ships it; the images are empty files."""
    name = f"patient{number:03d}"
    where = folder / name
    where.mkdir(parents=True)
    info = f"ED: {diastole}\nES: {systole}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
    (where / "Info.cfg").write_text(info, encoding="utf-8")
    for frame in (diastole, systole):
        for end in ("", "_gt"):
            (where / f"{name}_frame{frame:02d}{end}.nii.gz").touch()
    (where / f"{name}_4d.nii.gz").touch()
    (where / "MANDATORY_CITATION.md").touch()
    return where


@pytest.mark.parametrize("inside", ["", "training", "testing"])
def test_two_cases_a_patient_diastole_first(tmp_path: Path, inside: str) -> None:
    # Patient 90's end diastole is the later frame.
    patient(tmp_path / inside, 90, diastole=11, systole=4)
    patient(tmp_path / inside, 7)
    (tmp_path / inside / "patient_notes").mkdir()
    (tmp_path / inside / "patient008").touch()
    (tmp_path / "MANDATORY_CITATION.md").touch()
    found = acdc.cases(tmp_path)
    root = tmp_path / inside
    assert [(case["patient"], case["image"], case["label"]) for case in found] == [
        (name, str(root / f"{name}/{name}_frame{frame}.nii.gz"), str(root / f"{name}/{name}_frame{frame}_gt.nii.gz"))
        for name, frame in (("patient007", "01"), ("patient007", "12"), ("patient090", "11"), ("patient090", "04"))
    ]


def test_the_published_split_is_80_and_20_of_100_patients_and_50_apart(tmp_path: Path) -> None:
    for number in range(1, 101):
        patient(tmp_path / "training", number)
    for number in range(101, 151):
        patient(tmp_path / "testing", number)
    sections = {section: acdc.datalist(tmp_path, section) for section in acdc.SECTIONS}
    assert {section: len(found) for section, found in sections.items()} == {
        "training": 160,
        "validation": 40,
        "testing": 100,
    }
    for section, numbers in (("validation", (2, 3, 95)), ("training", (1, 4, 100)), ("testing", (101, 150))):
        assert {f"patient{number:03d}" for number in numbers} <= {case["patient"] for case in sections[section]}
    splits.check(sections["training"], sections["validation"])
    splits.check(sections["training"] + sections["validation"], sections["testing"])


def test_another_section_may_be_incomplete(tmp_path: Path) -> None:
    for number in acdc.SECTIONS["validation"]:
        patient(tmp_path, number)
    (patient(tmp_path, 1) / "Info.cfg").unlink()
    assert len(acdc.datalist(tmp_path, "validation")) == 40
    with pytest.raises(FileNotFoundError, match=r"80 patients of section 'training', got 79 of them.*patient004, pat"):
        acdc.datalist(tmp_path, "training")


def test_a_listing_replaces_the_split_and_learns_its_patients(tmp_path: Path) -> None:
    for number in (1, 2):
        patient(tmp_path, number)
    listing = {
        "training": [
            {
                "image": f"patient001/patient001_frame{frame}.nii.gz",
                "label": f"patient001/patient001_frame{frame}_gt.nii.gz",
            }
            for frame in ("01", "12")
        ],
        "validation": [
            {"image": "patient002/patient002_frame12.nii.gz", "label": "patient002/patient002_frame12_gt.nii.gz"}
            | {"patient": "two"}
        ],
    }
    (tmp_path / "split.json").write_text(json.dumps(listing), encoding="utf-8")
    training = acdc.datalist(tmp_path, "training", tmp_path / "split.json")
    assert training == acdc.cases(tmp_path)[:2]
    (validation,) = acdc.datalist(tmp_path, "validation", tmp_path / "split.json")
    assert validation == {**acdc.cases(tmp_path)[3], "patient": "two"}
    (tmp_path / "patient002/patient002_frame12_gt.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 1 cases .* 1 files missing \(patient002_frame12_gt"):
        acdc.datalist(tmp_path, "validation", tmp_path / "split.json")


def test_missing_files_are_counted_and_named_without_folders(tmp_path: Path) -> None:
    for number in (1, 2):
        patient(tmp_path, number)
    for name in ("patient001_frame01", "patient001_frame01_gt", "patient002_frame12", "patient002_frame12_gt"):
        (tmp_path / name[:10] / f"{name}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="expected 4 cases with all their files, got 4 files missing") as caught:
        acdc.cases(tmp_path)
    assert "(patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, patient002_frame12.nii.gz, ...)" in str(
        caught.value
    )
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "got"),
    [("ED: 1\n", "ES: nothing"), ("ED: first\nES: 12\n", "ED: first"), ("", "ED: nothing, ES: nothing"), ("\0", "ED")],
)
def test_an_altered_info_is_named(tmp_path: Path, text: str, got: str) -> None:
    (patient(tmp_path, 1) / "Info.cfg").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"for ED and for ES in patient001/Info\.cfg, got {got}"):
        acdc.cases(tmp_path)


def test_the_door_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (acdc.cases, acdc.datalist):
        with pytest.raises(FileNotFoundError, match="set dataset_dir or MEDROBUST_ACDC"):
            call(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a section among training, validation, testing, got 'test'"):
        acdc.datalist(tmp_path, "test")
    patient(tmp_path / "training", 1)
    patient(tmp_path, 1)
    with pytest.raises(ValueError, match="expected every patient once, got patient001 twice"):
        acdc.cases(tmp_path)
    (tmp_path / "patient001" / "Info.cfg").unlink()
    (tmp_path / "training").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected patient001/Info\.cfg, got no such file"):
        acdc.cases(tmp_path)
    monkeypatch.setenv("MEDROBUST_ACDC", str(tmp_path))
    assert acdc.folder() == tmp_path
    monkeypatch.delenv("MEDROBUST_ACDC")
    assert acdc.folder() == Path("data/acdc")
