"""DICOM SEG: the mask lies where the series lies, for another reader too; the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import batch_tree
import dicom_studies
import highdicom as hd
import numpy as np
import pydicom
import pytest
import small_bundle
from typer.testing import CliRunner

from medrobust.batch import dicom_codes, dicom_seg
from medrobust.batch.dicom_seg import SegWriter
from medrobust.batch.dicom_series import read_head
from medrobust.batch.faults import CaseError, RunError
from medrobust.batch.recipe import Recipe
from medrobust.cli import app

KEY = "case-0123456789abcdef"
SHEETS = {
    "axial": dicom_studies.AXIAL,
    "sagittal": dicom_studies.SAGITTAL,
    "oblique": dicom_studies.OBLIQUE,
}
ROWS_DOWN = {"spacing": (0.8, 0.6, 2.5), "shape": (10, 8), "slices": 7, "origin": (-12.5, 20.25, -300.0)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = small_bundle.make(tmp_path_factory.mktemp("seg") / "organs")
    path = root / "configs" / "metadata.json"
    names = {"0": "background", "1": "right kidney", "2": "something new"}
    path.write_text(json.dumps({"network_data_format": {"outputs": {"pred": {"channel_def": names}}}}))
    return Recipe(root=root, trusted=True)


def affine_of(orientation: Sequence[float], spacing: Sequence[float], origin: Sequence[float]) -> np.ndarray:
    """Of (columns, rows, slices) to RAS, by hand."""
    found = np.eye(4)
    row, column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    found[:3, 0], found[:3, 1] = row * spacing[1], column * spacing[0]
    found[:3, 2] = np.cross(row, column) * spacing[2]
    found[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ found


def labels_of(shape: tuple[int, ...]) -> np.ndarray:
    """No symmetry, two classes, empty planes at both ends."""
    found = np.zeros(shape, dtype=np.uint8)
    found[1:4, 2:9, 1:3] = 1
    found[5:, 6:, 3:5] = 2
    found[2, 3, 5] = 2
    return found


def write(folder: Path, recipe: Recipe, files: Sequence[Path], labels: np.ndarray, affine: np.ndarray, **options: Any):
    writer = SegWriter(private=folder, **options)
    record = writer.write(KEY, files, labels, affine, recipe, "settings")
    return writer.path_of(KEY), record.get("dicom_seg")


def patient_points(array: np.ndarray, affine: np.ndarray, number: int) -> set[tuple[float, ...]]:
    """Where the voxels of a class lie, in mm, rounded."""
    places = np.argwhere(array == number)
    points = (affine @ np.c_[places, np.ones(len(places))].T)[:3].T
    return {tuple(float(part) for part in np.round(point, 3) + 0.0) for point in points}


@pytest.mark.parametrize("kind", dicom_seg.KINDS)
@pytest.mark.parametrize("sheet", SHEETS)
def test_every_voxel_is_where_it_was_for_another_reader(tmp_path: Path, recipe: Recipe, sheet: str, kind: str) -> None:
    """Files in any order and one of them twice; highdicom reads the SEG."""
    files = dicom_studies.make_series(tmp_path / "in", orientation=SHEETS[sheet], **ROWS_DOWN)
    labels = labels_of((8, 10, 7))
    affine = affine_of(SHEETS[sheet], ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    points = {number: patient_points(labels, affine, number) for number in (1, 2)}
    copy = tmp_path / "in" / "copy.dcm"
    copy.write_bytes(files[3].read_bytes())
    path, record = write(tmp_path / "out", recipe, [copy, *files[::-1]], labels, affine, kind=kind)
    assert record == {
        "kind": kind,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "empty": False,
        "filled": [],
    }
    seg = hd.seg.segread(path)
    assert seg.SegmentationType == kind.upper()
    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    ras = np.diag([-1, -1, 1, 1]) @ volume.affine
    assert {number: patient_points(volume.array, ras, number) for number in (1, 2)} == points
    centroid = np.mean(sorted(points[1]), axis=0)
    np.testing.assert_allclose(centroid, (affine @ [2, 5, 1.5, 1])[:3], atol=1e-3)  # by hand: the block's middle


def test_what_the_file_says(tmp_path: Path, recipe: Recipe) -> None:
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    path, _ = write(tmp_path / "out", recipe, files, labels_of((8, 10, 7)), affine)
    source, seg = pydicom.dcmread(files[0]), pydicom.dcmread(path)
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate", "AccessionNumber"):
        assert seg[name].value == source[name].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.SeriesDescription == "RESEARCH ONLY - medrobust"
    assert seg.ContentDescription == "Research only, not for diagnosis"
    assert (seg.Modality, seg.SeriesNumber, seg.ContentLabel) == ("SEG", 9003, "MEDROBUST")
    kidney, new = seg.SegmentSequence
    assert (kidney.SegmentLabel, new.SegmentLabel) == ("right kidney", "something new")
    code = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("64033007", "SCT")
    assert code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    assert new.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert kidney.SegmentAlgorithmType == "AUTOMATIC"
    identified = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (identified.AlgorithmName, identified.AlgorithmSource) == ("organs", "medrobust")
    assert recipe.digest[:16] in identified.AlgorithmVersion
    assert "medrobust" in [item.Manufacturer for item in seg.ContributingEquipmentSequence]
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    uids = [pydicom.dcmread(one).SOPInstanceUID for one in files]
    assert sorted(item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence) == sorted(uids)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        place = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        assert image.ReferencedSOPInstanceUID == uids[round((place + 300) / 2.5)]


@pytest.mark.parametrize("kind", dicom_seg.KINDS)
def test_the_same_input_gives_the_same_bytes_at_any_time(
    tmp_path: Path, recipe: Recipe, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    labels = labels_of((8, 10, 7))
    one = write(tmp_path / "one", recipe, files, labels, affine, kind=kind)[0]
    time.sleep(1.1)
    two = write(tmp_path / "two", recipe, files[::-1], labels, affine, kind=kind)[0]
    assert one.read_bytes() == two.read_bytes()
    fewer = write(tmp_path / "three", recipe, files[:-1], labels[:, :, :-1], affine, kind=kind)[0]
    first, second = pydicom.dcmread(one), pydicom.dcmread(fewer)
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SOPInstanceUID.startswith("2.25.")
    assert len(first.SOPInstanceUID) <= 64
    other = SegWriter(private=tmp_path / "four", kind=kind)
    other.write(KEY, files, labels, affine, recipe, "other settings")
    assert pydicom.dcmread(other.path_of(KEY)).SeriesInstanceUID != first.SeriesInstanceUID


def test_an_empty_mask_says_that_nothing_was_found(tmp_path: Path, recipe: Recipe) -> None:
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    path, record = write(tmp_path / "out", recipe, files, np.zeros((8, 10, 7), np.uint8), affine)
    seg = pydicom.dcmread(path)
    assert record["empty"] is True
    assert (seg.NumberOfFrames, len(seg.SegmentSequence)) == (2, 2)
    assert not seg.pixel_array.any()


def test_what_an_anonymised_series_lacks_is_empty(tmp_path: Path, recipe: Recipe) -> None:
    def anonymise(one: pydicom.Dataset, index: int) -> None:
        for name in (*dicom_seg.MAY_BE_EMPTY, "SeriesNumber"):
            if name in one:
                del one[name]
        one.PatientSex = "U"

    files = dicom_studies.make_series(tmp_path / "in", change=anonymise, **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    path, record = write(tmp_path / "out", recipe, files, labels_of((8, 10, 7)), affine)
    seg = pydicom.dcmread(path)
    assert record["filled"] == sorted(dicom_seg.MAY_BE_EMPTY)
    assert not any(seg[name].value for name in dicom_seg.MAY_BE_EMPTY)
    assert (seg.ContentDate, seg.ContentTime, seg.SeriesNumber) == ("19000101", "000000", 9000)


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
def test_what_a_seg_cannot_do_without_is_named(tmp_path: Path, recipe: Recipe, name: str) -> None:
    """The gate sees to the instances' own UIDs and the modality."""
    files = dicom_studies.make_series(tmp_path / "in", change=lambda one, _: setattr(one, name, ""), **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    with pytest.raises(CaseError, match=f"seg-source: .*{name}"):
        write(tmp_path / "out", recipe, files, labels_of((8, 10, 7)), affine)
    assert not (tmp_path / "out" / "dicom").exists()


def test_labels_of_another_place_or_size_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    labels, away, bent = labels_of((8, 10, 7)), affine.copy(), affine.copy()
    away[0, 3] += 0.01
    bent[:3, :3] = affine[:3, :3] @ np.diag([1, 1.01, 1])
    turn = np.deg2rad(0.5)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    for wrong in (away, bent, turned @ affine):
        with pytest.raises(CaseError, match="seg-grid"):
            write(tmp_path / "out", recipe, files, labels, wrong)
    with pytest.raises(CaseError, match="seg-grid"):
        write(tmp_path / "out", recipe, files, labels[:, :, :-1], affine)
    with pytest.raises(CaseError, match="missing-slice"):
        write(tmp_path / "out", recipe, [*files[:2], *files[3:]], labels, affine)


def test_a_multi_frame_series_in_any_order(tmp_path: Path, recipe: Recipe) -> None:
    """Its frames are not in the order of the slices; cosines have three digits, here and in files of one slice."""
    orientation = np.round(dicom_studies.OBLIQUE, 3)
    stored = dicom_studies.voxels(7, (10, 8))
    order = [3, 0, 6, 1, 5, 2, 4]
    place = {"orientation": orientation.tolist(), "origin": ROWS_DOWN["origin"], "order": order}
    files = dicom_studies.make_series(tmp_path / "flat", **{**ROWS_DOWN, "orientation": orientation.tolist()})
    write(tmp_path / "other", recipe, files, labels_of((8, 10, 7)), read_head(files).geometry.affine)
    path = dicom_studies.make_enhanced(tmp_path / "in" / "one.dcm", stored=stored, **place)
    labels = labels_of((8, 10, 7))
    affine = read_head([path]).geometry.affine
    for kind in dicom_seg.KINDS:
        made, _ = write(tmp_path / kind, recipe, [path], labels, affine, kind=kind)
        seg, source = pydicom.dcmread(made), pydicom.dcmread(path)
        uses = [
            groups.DerivationImageSequence[0].SourceImageSequence[0] for groups in seg.PerFrameFunctionalGroupsSequence
        ]
        assert {one.ReferencedSOPInstanceUID for one in uses} == {source.SOPInstanceUID}
        for groups, pixels, use in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, uses, strict=True):
            frame = int(use.ReferencedFrameNumber) - 1
            of_source = source.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0].ImagePositionPatient
            assert list(groups.PlanePositionSequence[0].ImagePositionPatient) == list(of_source)
            plane = labels[:, :, order[frame]].T
            if kind == "binary":
                plane = plane == groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            np.testing.assert_array_equal(pixels, plane)


def test_a_file_that_was_read_back_as_another_does_not_count(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    build = dicom_seg._build

    def moved(seg: Any) -> None:
        seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[0] += 0.5

    def other(seg: Any) -> None:
        seg.PixelData = bytes([seg.PixelData[0] ^ 4]) + seg.PixelData[1:]

    def renamed(seg: Any) -> None:
        seg.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 2

    def turned(seg: Any) -> None:
        seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

    def scaled(seg: Any) -> None:
        seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.6, 0.8]

    for change in (moved, other, renamed, turned, scaled):

        def spoiled(*content: Any, change: Any = change) -> Any:
            seg = build(*content)
            change(seg)
            return seg

        monkeypatch.setattr(dicom_seg, "_build", spoiled)
        with pytest.raises(CaseError, match="read-back"):
            write(tmp_path / change.__name__, recipe, files, labels_of((8, 10, 7)), affine)
        assert not list(tmp_path.glob(f"{change.__name__}/**/seg.dcm"))


def test_a_nifti_case_has_none_and_what_is_gone_is_missed(tmp_path: Path, recipe: Recipe) -> None:
    writer = SegWriter(private=tmp_path / "out")
    assert writer.write(KEY, (), np.zeros((2, 2, 2), np.uint8), np.eye(4), recipe, "s") == {}
    assert writer.holds(KEY, {})
    files = dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    affine = affine_of(dicom_studies.AXIAL, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    record = writer.write(KEY, files, labels_of((8, 10, 7)), affine, recipe, "s")
    left = writer.path_of(KEY).parent / ".writing-killed" / "seg.dcm"  # of a worker that was killed at it
    left.parent.mkdir()
    left.write_bytes(b"DOE^JOHN")
    assert writer.write(KEY, files, labels_of((8, 10, 7)), affine, recipe, "s") == record
    assert [path.name for path in writer.path_of(KEY).parent.iterdir()] == ["seg.dcm"]
    assert writer.holds(KEY, record)
    assert (tmp_path / "out" / "dicom").stat().st_mode & 0o077 == 0
    writer.path_of(KEY).write_bytes(b"other")
    assert not writer.holds(KEY, record)
    writer.path_of(KEY).unlink()
    assert not writer.holds(KEY, record)
    with pytest.raises(ValueError, match="expected a name"):
        writer.path_of("../seg")
    with pytest.raises(RunError, match="expected --dicom-seg binary, labelmap or none"):
        SegWriter(private=tmp_path, kind="fractional")


@pytest.mark.skipif(
    not shutil.which("dciodvfy"), reason="DICOM SEG NOT VALIDATED: no dciodvfy (apt-get install dicom3tools)"
)
@pytest.mark.parametrize("sheet", ["axial", "oblique", "empty"])
def test_the_validator_finds_nothing(tmp_path: Path, recipe: Recipe, sheet: str) -> None:
    """Binary ones: that of Debian 12 does not know label maps yet."""
    orientation = SHEETS.get(sheet, dicom_studies.AXIAL)
    files = dicom_studies.make_series(tmp_path / "in", orientation=orientation, **ROWS_DOWN)
    affine = affine_of(orientation, ROWS_DOWN["spacing"], ROWS_DOWN["origin"])
    labels = labels_of((8, 10, 7)) * (sheet != "empty")
    path, _ = write(tmp_path / "out", recipe, files, labels, affine)
    result = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    said = [line for line in (result.stdout + result.stderr).splitlines() if "Error" in line or "Warning" in line]
    assert (said, result.returncode) == ([], 0)


def test_the_command_writes_it_beside_output(tmp_path: Path) -> None:
    """Nothing of the patient is below OUTPUT; NIfTI goes on; a SEG that is gone is made again, as it was."""
    dicom_studies.make_series(tmp_path / "in" / "series", **ROWS_DOWN)
    batch_tree.make(tmp_path / "in" / "nifti", sound=1, broken=False)
    bundle, output = small_bundle.make(tmp_path / "bundle"), tmp_path / "out"

    def run(*words: str) -> list[Path]:
        fixed = ["-b", str(bundle), "--trust-bundle", "--workers", "0", "--quiet"]
        result = CliRunner().invoke(app, ["batch", str(tmp_path / "in"), str(output), *fixed, *words])
        assert (result.exit_code, result.output) == (0, "")
        return sorted((tmp_path / "out.private").glob("dicom/*/seg.dcm"))

    (path,) = run("--dicom-seg", "binary")
    record = json.loads((output / "cases" / path.parent.name / "case.json").read_text())
    assert record["dicom_seg"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(list(output.glob("cases/*/seg.nii.gz"))) == 2
    assert batch_tree.leaks(output) == []
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    assert run("--dicom-seg", "binary") == [path]
    assert path.stat().st_mtime_ns == changed
    path.unlink()
    assert run("--dicom-seg", "binary") == [path]
    assert path.read_bytes() == before
    run("--dicom-seg", "labelmap")
    assert pydicom.dcmread(path).SegmentationType == "LABELMAP"
    path.unlink()
    assert run() == []


def test_the_command_wants_what_it_needs(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom_studies.make_series(tmp_path / "in", **ROWS_DOWN)
    words = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "-b", str(recipe.root), "--trust-bundle"]
    result = CliRunner().invoke(app, [*words, "--dicom-seg", "fractional"])
    assert (result.exit_code, "expected --dicom-seg binary, labelmap or none" in result.output) == (2, True)
    monkeypatch.setitem(sys.modules, "medrobust.batch.dicom_seg", None)
    result = CliRunner().invoke(app, [*words, "--dicom-seg", "binary"])
    assert (result.exit_code, "pip install 'medrobust[dicom]'" in result.output) == (2, True)


def test_names_of_classes_have_codes() -> None:
    tables = [dicom_codes.NORMAL, dicom_codes.HEART, dicom_codes.ABNORMAL]
    for name in [name for table in tables for name in table]:
        assert dicom_codes.segment_of(name).type.scheme_designator == "SCT", name
    found = dicom_codes.segment_of("adrenal_gland_left")
    assert (found.type.meaning, found.modifier.meaning if found.modifier else "") == ("Adrenal gland", "Left")
    ventricle = dicom_codes.segment_of("left ventricle")
    assert (ventricle.type.value, ventricle.modifier) == ("87878005", None)
    assert dicom_codes.segment_of("tumour").category.meaning == "Morphologically Abnormal Structure"
    assert dicom_codes.segment_of("left or right of it").modifier is None


def test_a_bundle_may_say_it_better(tmp_path: Path) -> None:
    def code(value: str, meaning: str) -> dict[str, str]:
        return {"CodeValue": value, "CodingSchemeDesignator": "SCT", "CodeMeaning": meaning}

    item = {
        "labelID": 2,
        "SegmentLabel": "lobe VI",
        "SegmentedPropertyCategoryCodeSequence": code("91723000", "Anatomical Structure"),
        "SegmentedPropertyTypeCodeSequence": code("245404007", "Liver segment"),
        "SegmentedPropertyTypeModifierCodeSequence": code("24028007", "Right"),
        "AnatomicRegionSequence": code("10200004", "Liver"),
        "recommendedDisplayRGBValue": [221, 130, 101],
    }
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "segments.json"
    names = ["background", "liver", "six"]
    path.write_text(json.dumps({"segmentAttributes": [[item]]}))
    liver, six = dicom_codes.segments_of(tmp_path, names)
    assert liver == dicom_codes.segment_of("liver")
    assert (six.label, six.type.value, six.rgb) == ("lobe VI", "245404007", (221, 130, 101))
    assert [one.meaning for one in (six.modifier, six.region) if one] == ["Right", "Liver"]
    described = dicom_seg._described(2, six, _algorithm())
    assert described.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert len(described.RecommendedDisplayCIELabValue) == 3
    for wrong in (
        {**item, "labelID": 3},
        {**item, "recommendedDisplayRGBValue": [1, 2]},
        {**item, "SegmentedPropertyTypeCodeSequence": {"CodeValue": "1"}},
        {**item, "SegmentedPropertyTypeCodeSequence": code("", "x")},
        "text",
    ):
        path.write_text(json.dumps({"segmentAttributes": [[wrong]]}))
        with pytest.raises(ValueError, match=r"segments\.json"):
            dicom_codes.segments_of(tmp_path, names)


def _algorithm() -> hd.AlgorithmIdentificationSequence:
    return hd.AlgorithmIdentificationSequence("a", pydicom.sr.codedict.codes.cid7162.ArtificialIntelligence, "1")
