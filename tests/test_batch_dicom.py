"""DICOM series: every voxel where a hand calculation puts it, every defect refused with its reason."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_tree
import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import small_bundle
from dicom_studies import AXIAL, CORONAL, OBLIQUE, ORIGIN, SAGITTAL, SPACING, make_enhanced, make_series, voxels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from typer.testing import CliRunner

from medrobust.batch import dicom_grid, dicom_index, report, volumes
from medrobust.batch.attacked import Attacks
from medrobust.batch.dicom_codestream import size_of
from medrobust.batch.dicom_header import LARGEST, read_header
from medrobust.batch.dicom_series import read, read_head, sha256_of
from medrobust.batch.discovery import Found, Search, discover
from medrobust.batch.faults import CaseError
from medrobust.batch.nifti import Policy
from medrobust.batch.plan import need_of
from medrobust.batch.recipe import Recipe
from medrobust.cli import app
from medrobust.data import ct_organs as dataset

ORIENTATIONS = {"axial": AXIAL, "sagittal": SAGITTAL, "coronal": CORONAL, "oblique": OBLIQUE}


def code_of(files: list[Path], policy: Policy | None = None) -> str:
    with pytest.raises(CaseError) as caught:
        read(files, policy)
    with pytest.raises(CaseError):
        read_head(files, policy) if caught.value.code not in ("corrupt", "nonfinite", "truncated") else read(files)
    assert [word for word in batch_tree.CANARIES if word in str(caught.value)] == []
    return caught.value.code


def change_of(**values: Any) -> Callable[[Dataset, int], None]:
    """Set attributes of every slice; a function is called with the slice's index, ``None`` takes the attribute away."""

    def change(one: Dataset, index: int) -> None:
        for name, value in values.items():
            found = value(index) if callable(value) else value
            if found is None:
                delattr(one, name)
            else:
                setattr(one, name, found)

    return change


# Where voxels lie


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_is_where_its_slice_says(tmp_path: Path, name: str) -> None:
    """Patient coordinates by the formula of the standard (C.7.6.2.1.1), for non-square pixels."""
    orientation = ORIENTATIONS[name]
    files = make_series(tmp_path, orientation=orientation)
    stored = voxels()
    scan = read(files[::-1])
    assert scan.volume.shape == (8, 10, 12)
    assert scan.volume.dtype == np.float32
    along, down = np.array(orientation[:3]), np.array(orientation[3:])
    step = np.cross(along, down) * SPACING[2]
    for k, row, column in [(0, 0, 0), (0, 9, 7), (11, 0, 7), (5, 3, 2), (11, 9, 0)]:
        lps = np.array(ORIGIN) + k * step + column * SPACING[1] * along + row * SPACING[0] * down
        ras = scan.geometry.affine @ [column, row, k, 1]
        np.testing.assert_allclose(ras[:3], lps * [-1, -1, 1], atol=1e-4)
        assert scan.volume[column, row, k] == stored[k, row, column] - 1024
    assert scan.warnings == ()


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_same_places_and_values_as_highdicom(tmp_path: Path, name: str) -> None:
    files = make_series(tmp_path, orientation=ORIENTATIONS[name], slope=[1.0 + index / 8 for index in range(12)])
    scan = read(files)
    other = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in files], dtype=np.float32)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.affine
    for place in itertools.product((0, 4, 11), (0, 9), (0, 7)):  # slice, row, column of highdicom's array
        index = np.linalg.solve(scan.geometry.affine, affine @ [*place, 1])[:3]
        np.testing.assert_allclose(index, index.round(), atol=1e-4)
        i, j, k = index.round().astype(int)
        np.testing.assert_allclose(scan.volume[i, j, k], other.array[place], rtol=1e-6)


def test_the_header_is_one_that_other_readers_place_alike(tmp_path: Path) -> None:
    """What is written on a series' grid is verified by nibabel and SimpleITK."""
    for name, orientation in ORIENTATIONS.items():
        scan = read(make_series(tmp_path / name, orientation=orientation))
        assert scan.geometry.plain
        volumes.write(scan.volume.astype(np.int16), tmp_path / f"{name}.nii.gz", scan.geometry)
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (0.6, 0.8, 2.5), rtol=1e-6)


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2, *range(4, 12)]])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", RLELossless])
def test_a_multiframe_file_is_a_volume(tmp_path: Path, order: list[int] | None, syntax: str) -> None:
    path = make_enhanced(tmp_path / "x", stored=voxels(), orientation=OBLIQUE, order=order, transfer_syntax=syntax)
    classic = read(make_series(tmp_path / "classic", orientation=OBLIQUE))
    scan = read([path])
    np.testing.assert_array_equal(scan.volume, classic.volume)
    np.testing.assert_allclose(scan.geometry.affine, classic.geometry.affine, atol=1e-4)
    other = highdicom.imread(path).get_volume(dtype=np.float32)
    assert sorted(other.array.ravel()) == sorted(scan.volume.ravel())
    (found,) = discover(tmp_path, Search(exclude=["classic/*"]))
    assert found.files == (path,)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("signed", [True, False])
def test_transfer_syntaxes(tmp_path: Path, syntax: str, signed: bool) -> None:
    stored = voxels(3, (32, 40))
    stored = stored - 1000 if signed else stored.astype(np.uint16)
    plain = read(make_series(tmp_path / "plain", stored=stored))
    found = read(make_series(tmp_path / "packed", stored=stored, transfer_syntax=syntax))
    np.testing.assert_array_equal(found.volume, plain.volume)
    np.testing.assert_array_equal(found.volume[3, 7, 2], float(stored[2, 7, 3]) - 1024)


def test_a_slope_for_each_slice(tmp_path: Path) -> None:
    """As PET has it."""
    slope = [0.5 + index for index in range(12)]
    files = make_series(tmp_path, modality="PT", slope=slope, intercept=0.0)
    expected = voxels().astype(np.float64) * np.array(slope)[:, None, None]
    np.testing.assert_allclose(read(files).volume, expected.T.astype(np.float32), rtol=1e-6)


def test_a_real_series_is_its_nifti(ct_organs: Path, tmp_path: Path) -> None:
    """20 slices in JPEG 2000; the NIfTI was made by SimpleITK."""
    files = dataset.dicom_slices(tmp_path)
    assert {read_header(path).syntax for path in files} == {JPEG2000Lossless}
    scan = read(files)
    image = nib.load(ct_organs / "ct_b.nii.gz")
    array = np.asarray(image.dataobj)
    assert scan.warnings == ("no-series-uid", "numbers-missing")  # blanked for publication, and a part of a longer scan
    (found,) = discover(tmp_path)
    assert (found.relative, sorted(found.files)) == ("without-uid", sorted(files))
    for place in itertools.product((0, 100, scan.volume.shape[0] - 1), (0, 77), range(20)):
        index = np.linalg.solve(image.affine, scan.geometry.affine @ [*place, 1])[:3]
        np.testing.assert_allclose(index, index.round(), atol=1e-3)
    flip = np.linalg.solve(image.affine, scan.geometry.affine)
    ornt = nib.orientations.io_orientation(flip)
    np.testing.assert_array_equal(nib.orientations.apply_orientation(scan.volume, ornt), array)


# What is refused


DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "two slices lacking": ({"drop": (4, 5)}, "missing-slice"),
    "uneven": ({"ImagePositionPatient": lambda k: [0, 0, 2.5 * k + 0.4 * (k == 5)]}, "irregular-spacing"),
    "a slice at another's place": ({"ImagePositionPatient": lambda k: [0, 0, 2.5 * min(k, 10)]}, "duplicate-slice"),
    "a gantry's tilt": ({"tilt": 15.0}, "tilted"),
    "a small tilt": ({"tilt": 0.2}, "tilted"),
    "one slice moved": ({"ImagePositionPatient": lambda k: [3.0 * (k == 5), 0, 2.5 * k]}, "irregular-spacing"),
    "a localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    "one slice": ({"slices": 1}, "single-slice"),
    "an X-ray": ({"Modality": "CR"}, "modality"),
    "a screenshot": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "modality"),
    "another modality in it": ({"Modality": lambda k: "MR" if k == 3 else "CT"}, "mixed-series"),
    "two series": ({"SeriesInstanceUID": lambda k: f"1.2.{k // 6}"}, "mixed-series"),
    "two frames of reference": ({"FrameOfReferenceUID": lambda k: f"1.2.{k // 6}"}, "mixed-series"),
    "a slice that is turned": (
        {"ImageOrientationPatient": lambda k: [1, 0, 0, 0, 0.98480775, 0.17364818] if k == 3 else [*AXIAL]},
        "mixed-series",
    ),
    "other pixels": ({"PixelSpacing": lambda k: [0.8, 0.6 + 0.01 * (k == 3)]}, "mixed-size"),
    "colour": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
    "a palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
    "no position": ({"ImagePositionPatient": lambda k: None if k == 3 else [0, 0, 2.5 * k]}, "no-geometry"),
    "no orientation": ({"ImageOrientationPatient": None}, "no-geometry"),
    "no pixel spacing": ({"PixelSpacing": None}, "no-geometry"),
    "pixels without width": ({"PixelSpacing": [0.8, 0.0]}, "bad-spacing"),
    "skewed cosines": ({"ImageOrientationPatient": [1, 0, 0, 0.5, 0.8660254, 0]}, "bad-affine"),
    "long cosines": ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, "bad-affine"),
    "slope 0": ({"RescaleSlope": 0}, "bad-scaling"),
    "scaled beyond float32": ({"RescaleSlope": 1e38}, "nonfinite"),
    "no pixels": ({"PixelData": None}, "truncated"),
    "fewer pixels than said": ({"Rows": 11}, "truncated"),
    "frames in a classic slice": ({"NumberOfFrames": 5}, "bad-dicom"),
    "a header that asks for much": ({"Rows": 65535, "Columns": 65535}, "too-large"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_what_is_no_volume_is_refused(tmp_path: Path, name: str) -> None:
    wrong, code = DEFECTS[name]
    given = dict(wrong)
    drop, made = given.pop("drop", ()), {key: given.pop(key) for key in ("tilt", "slices") if key in given}
    files = make_series(tmp_path, **made, change=change_of(**given))
    assert code_of([path for index, path in enumerate(files) if index not in drop]) == code


def test_what_scanners_round_is_accepted(tmp_path: Path) -> None:
    """Positions to a thousandth, cosines to four digits, a lean of a twentieth of a degree."""
    turned = [float(f"{value:.4f}") for value in OBLIQUE]
    for name, made in {
        "cosines": {"orientation": OBLIQUE, "change": change_of(ImageOrientationPatient=turned)},
        "lean": {"tilt": 0.05},
        "places": {"spacing": (0.8, 0.6, 1.0 / 3), "change": _rounded},
    }.items():
        assert read(make_series(tmp_path / name, **made)).warnings == ()


def _rounded(one: Dataset, index: int) -> None:
    one.ImagePositionPatient = [round(float(value), 3) for value in one.ImagePositionPatient]


@pytest.mark.parametrize(("wider", "code"), [(0.009, ""), (-0.009, ""), (0.011, "irregular-spacing")])
def test_gaps_may_differ_by_a_hundredth(tmp_path: Path, wider: float, code: str) -> None:
    places = change_of(ImagePositionPatient=lambda k: [0, 0, round(2.5 * (k + wider * (k > 5)), 6)])
    files = make_series(tmp_path, change=places)
    if code:
        assert code_of(files) == code
    else:
        np.testing.assert_allclose(read(files).geometry.spacing, (0.6, 0.8, 2.5 * (11 + wider) / 11), rtol=1e-6)


def test_infinite_values_are_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    files = make_series(tmp_path, slope=1e35, intercept=0.0, stored=(voxels() * 5).astype(np.int16))
    huge = (voxels() * 5).astype(np.int16).astype(np.float64) * 1e35 > np.finfo(np.float32).max
    scan = read(files, Policy(nonfinite="replace"))
    assert 0 < huge.sum() < huge.size
    assert f"nonfinite-replaced:{huge.sum()}" in scan.warnings
    assert (scan.volume[huge.T] == scan.volume.min()).all()


def test_slices_a_little_off_the_grid_are_told(tmp_path: Path) -> None:
    assert read(make_series(tmp_path, slices=40, tilt=0.09)).warnings == ("slices-moved",)


def test_a_slice_of_another_size(tmp_path: Path) -> None:
    files = make_series(tmp_path)
    files[3].unlink()
    make_series(tmp_path / "more", shape=(12, 8), change=change_of(InstanceNumber=4))
    shutil.move(tmp_path / "more" / "IM-0004.dcm", files[3])
    assert code_of(files) == "mixed-size"


def test_a_series_without_its_first_slice_is_told(tmp_path: Path) -> None:
    files = make_series(tmp_path)
    assert read(files[1:]).warnings == ("numbers-missing",)


def test_a_compression_without_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_series(tmp_path, slices=3, shape=(32, 40), transfer_syntax=JPEG2000Lossless)

    def none(uid: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(dicom_grid, "get_decoder", none)
    assert code_of(files) == "compressed"
    assert not dicom_grid.decodable("1.2.3")
    assert dicom_grid.decodable(ImplicitVRLittleEndian)


def test_a_deflated_header_is_never_unpacked(tmp_path: Path) -> None:
    files = make_series(tmp_path, transfer_syntax="1.2.840.10008.1.2.1.99")
    assert code_of(files) == "compressed"


@pytest.mark.parametrize("trick", ["a second syntax", "a value of a long kind before it"])
def test_a_deflated_header_cannot_hide(tmp_path: Path, trick: str) -> None:
    """Of two transfer syntaxes the reader takes the last: a bomb behind a harmless one."""
    (path,) = make_series(tmp_path, slices=1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(b"\x08\x00\x05\x00CS\x02\x00AB" + bytes(1 << 24)) + packer.flush()
    plain, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    element = b"\x02\x00\x10\x00UI%c\0%b"
    hidden = element % (len(plain), plain)
    if trick != "a second syntax":  # taken for a short value, it would hide what follows it
        hidden = b"\x02\x00\x02\x01UC\0\0" + len(hidden).to_bytes(4, "little") + hidden
    path.write_bytes(bytes(128) + b"DICM" + hidden + element % (len(deflated), deflated) + bomb)
    tracemalloc.start()
    assert code_of([path]) == "compressed"
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_header_without_end_is_refused_early(tmp_path: Path) -> None:
    files = make_series(tmp_path, slices=2)
    raw = files[0].read_bytes()
    place = raw.index(b"\x08\x00\x60\x00CS")  # before it, a wanted value of 3 GB in a file of 40 MB
    files[0].write_bytes(raw[:place] + b"\x08\x00\x08\x00UT\0\0" + (3 << 30).to_bytes(4, "little"))
    os.truncate(files[0], LARGEST + (24 << 20))
    tracemalloc.start()
    assert code_of(files) == "oversized"
    assert tracemalloc.get_traced_memory()[1] < 3 * LARGEST
    tracemalloc.stop()


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", RLELossless, JPEG2000Lossless])
def test_every_cut_of_a_slice_is_found(tmp_path: Path, syntax: str) -> None:
    files = make_series(tmp_path, slices=3, shape=(32, 40), transfer_syntax=syntax)
    whole = files[1].read_bytes()
    for cut in [0, 1, 131, 200, *range(300, len(whole) - 8, 97), len(whole) - 9]:
        files[1].write_bytes(whole[:cut])
        with pytest.raises(CaseError) as caught:
            read(files)
        assert caught.value.code in ("truncated", "not-dicom", "bad-dicom", "no-geometry", "colour", "modality")
    files[1].write_bytes(whole)
    assert read(files).volume.shape == (40, 32, 3)


def test_a_compressed_slice_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    """A codestream may ask for any memory, whatever rows and columns the header says."""
    files = make_series(tmp_path, slices=2, shape=(32, 40), transfer_syntax=JPEG2000Lossless)
    raw = files[0].read_bytes()
    place = raw.index(b"\xff\x4f\xff\x51") + 8
    files[0].write_bytes(raw[:place] + (60000).to_bytes(4, "big") * 2 + raw[place + 8 :])
    assert code_of_pixels(files) == "bad-dicom"
    end = raw.rindex(b"\xff\xd9")
    files[0].write_bytes(raw[:end] + b"\0\0" + raw[end + 2 :])
    assert code_of_pixels(files) == "truncated"


def test_the_size_that_a_jpeg_says() -> None:
    made = io.BytesIO()
    Image.new("L", (40, 32)).save(made, "JPEG")
    assert size_of(made.getvalue()) == (32, 40)
    assert [size_of(made.getvalue()[:cut]) for cut in (0, 1, 3, 20, 40)] == [None] * 5


def code_of_pixels(files: list[Path]) -> str:
    with pytest.raises(CaseError) as caught:
        read(files)
    return caught.value.code


def test_padding_stays_and_is_told(tmp_path: Path) -> None:
    stored = voxels() - 1000
    stored[:, 0, 0] = -2000
    files = make_series(tmp_path, stored=stored, change=change_of(PixelPaddingValue=-2000))
    scan = read(files)
    assert scan.warnings == ("padding",)
    assert (scan.volume[0, 0] == -3024).all()


def test_constant_and_trailing(tmp_path: Path) -> None:
    stored = np.zeros((3, 10, 8), dtype=np.int16)

    def longer(one: Dataset, index: int) -> None:
        one.PixelData = one.PixelData + bytes(10)

    assert read(make_series(tmp_path, stored=stored, change=longer)).warnings == ("trailing-data", "constant")


# Copies, hashes, changes


def test_copies_count_once(tmp_path: Path) -> None:
    files = make_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (found,) = discover(tmp_path)
    assert len(found.files) == 24
    scan = read(found.files)
    np.testing.assert_array_equal(scan.volume, read(files).volume)
    assert scan.sha256 == read(files).sha256 == sha256_of(files) == sha256_of(found.files)
    again = make_series(tmp_path / "c", stored=voxels(seed=1))
    assert code_of_pixels([*files, again[3]]) == "duplicate-slice"
    moved = make_series(tmp_path / "d", origin=(0, 0, 0))
    assert code_of_pixels([*files, moved[3]]) == "duplicate-slice"


def test_a_series_is_known_by_its_content(tmp_path: Path) -> None:
    files = make_series(tmp_path / "a")
    named = make_series(tmp_path / "b", names="{uid}")
    assert sha256_of(files) == sha256_of(named[::-1])
    other = make_series(tmp_path / "c", stored=voxels(seed=1))
    assert sha256_of(files) != sha256_of(other)
    assert sha256_of(files) != sha256_of(files[1:])


def test_a_file_that_changes_between_the_gate_and_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medrobust.batch import dicom_series

    files = make_series(tmp_path / "a")
    moved = make_series(tmp_path / "b", origin=(0, 0, 0))
    gate = dicom_series.gate

    def swap(*given: Any) -> Any:
        found = gate(*given)
        shutil.copy(moved[3], files[3])
        return found

    monkeypatch.setattr(dicom_series, "gate", swap)
    with pytest.raises(CaseError, match="changed") as caught:
        read(files)
    assert caught.value.kind == "failed"


@settings(max_examples=40, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_give_a_scan_or_a_reason(tmp_path: Path, data: st.DataObject) -> None:
    syntax = data.draw(st.sampled_from(["1.2.840.10008.1.2.1", ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless]))
    folder = tmp_path / syntax
    if not folder.exists():
        files = make_series(folder, slices=2, shape=(32, 40), transfer_syntax=syntax)
        shutil.copy(files[0], folder / "whole.txt")
    files = [folder / "IM-0001.dcm", folder / "IM-0002.dcm"]
    raw = bytearray((folder / "whole.txt").read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), min_size=1, max_size=8)
    ):
        raw[place] = value
    files[0].write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 3]))])
    try:
        scan = read(files)
        assert scan.volume.shape == (40, 32, 2)
    except CaseError as error:
        assert error.kind == "rejected"  # noqa: PT017
    for found in discover(folder):
        assert found.files or found.problem


# What is found


def tree(root: Path) -> Path:
    """A hospital's tree: two patients, NIfTI beside DICOM, and what is no case."""
    make_series(root / "DOE^JOHN" / "ct", names="{uid}")
    make_series(root / "DOE^JOHN" / "ct", series="b", names="IMG{number}", slices=5)
    batch_tree.make(root / "nifti", sound=1, broken=False)
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (root / "README").write_text("no case")
    (root / "notes.txt").write_text("no case")
    return root


def test_series_are_found_by_what_they_say(tmp_path: Path) -> None:
    found = discover(tree(tmp_path))
    assert [len(one.files) for one in found] == [5, 12, 0]
    assert [one.problem for one in found] == [None] * 3
    for one in found[:2]:
        series = {read_header(path).series for path in one.files}
        assert one.relative == f"DOE^JOHN/ct/{series.pop()}"
        assert not series
        assert list(one.files) == sorted(one.files)
    only = discover(tmp_path, Search(include=["*/ct/*"], exclude=[found[0].relative]))
    assert [one.relative for one in only] == [found[1].relative]


def test_a_series_may_lie_in_several_folders(tmp_path: Path) -> None:
    files = make_series(tmp_path / "study" / "part1")
    (tmp_path / "study" / "part2").mkdir()
    for path in files[6:]:
        shutil.move(path, tmp_path / "study" / "part2" / path.name)
    (found,) = discover(tmp_path)
    assert found.relative.startswith("study/1.2")
    assert read(found.files).volume.shape == (8, 10, 12)


def test_one_file_as_input(tmp_path: Path) -> None:
    (found,) = discover(make_enhanced(tmp_path / "x.dcm", stored=voxels()))
    assert read(found.files).volume.shape == (8, 10, 12)


def test_a_series_that_holds_several_volumes_is_split(tmp_path: Path) -> None:
    localizer = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SOPInstanceUID": lambda k: f"1.2.{k}"}
    make_series(tmp_path / "scout", slices=1, orientation=CORONAL, change=change_of(**localizer))
    make_series(tmp_path / "scan")
    scan, scout = sorted(discover(tmp_path), key=lambda one: -len(one.files))
    assert len(scan.files) == 12
    assert code_of(list(scout.files)) == "localizer"
    assert scan.relative.rpartition("/")[0] == scout.relative.rpartition("/")[0]


@pytest.mark.parametrize(
    "phase", [{"AcquisitionNumber": lambda k: 2}, {"ImageType": lambda k: ["DERIVED", "PRIMARY", "MPR"]}]
)
def test_phases_at_one_place_are_volumes_of_their_own(tmp_path: Path, phase: dict[str, Any]) -> None:
    make_series(tmp_path / "one")
    again = change_of(SOPInstanceUID=lambda k: f"1.2.{k}", **phase)
    make_series(tmp_path / "two", stored=voxels(seed=1), change=again)
    found = discover(tmp_path)
    assert [len(one.files) for one in found] == [12, 12]
    assert len({one.relative for one in found}) == 2
    assert {float(read(one.files).volume[0, 0, 0]) for one in found} == {
        float(voxels(seed=seed)[0, 0, 0]) - 1024 for seed in (0, 1)
    }


def test_acquisitions_that_make_one_volume_stay_together(tmp_path: Path) -> None:
    """A head CT, step and shoot: every slice is an acquisition."""
    make_series(tmp_path, change=change_of(AcquisitionNumber=lambda k: k + 1))
    (found,) = discover(tmp_path)
    assert read(found.files).volume.shape == (8, 10, 12)


@pytest.mark.parametrize(
    "kind", ["1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.481.3"]
)
def test_what_is_made_of_scans_is_no_case(tmp_path: Path, kind: str) -> None:
    """Segmentations, reports, structure sets."""
    bare = {} if kind.endswith("66.4") else {"Rows": None, "Columns": None, "PixelData": None}
    make_series(tmp_path, slices=1, change=change_of(SOPClassUID=kind, **bare))
    assert discover(tmp_path) == []


def test_a_broken_file_is_never_left_out_in_silence(tmp_path: Path) -> None:
    files = make_series(tmp_path / "a")
    whole = files[11].read_bytes()
    for cut in (0, 100, 140, 300, 600, 800):
        files[11].write_bytes(whole[:cut])
        found = discover(tmp_path)
        assert len(found) == 1, cut
        with pytest.raises(CaseError):
            read(found[0].files) if found[0].problem is None else _refuse(found[0])
    make_series(tmp_path / "a", series="b", names="b{number}.dcm")
    files[11].write_bytes(b"nothing")
    found = discover(tmp_path)
    assert sorted((one.relative == "a", len(one.files)) for one in found) == [(False, 11), (False, 12), (True, 0)]
    assert found[0].problem is not None
    assert found[0].problem[0] == "not-dicom"


def _refuse(found: Found) -> None:
    assert found.problem is not None
    raise CaseError(*found.problem)


def test_links_and_pipes(tmp_path: Path) -> None:
    outside = make_series(tmp_path / "outside", slices=3)
    root = tmp_path / "in"
    make_series(root / "a", series="b")
    (root / "links").mkdir()
    for path in outside:
        (root / "links" / path.name).symlink_to(path)
    (root / "links" / "inside.dcm").symlink_to(root / "a" / "IM-0001.dcm")
    os.mkfifo(root / "a.dcm")
    found = discover(root)
    assert [(one.relative, one.problem and one.problem[0]) for one in found if one.problem] == [
        (".", "not-a-file"),
        ("links", "outside-root"),
    ]
    assert [len(one.files) for one in found if not one.problem] == [12]
    followed = [one for one in discover(root, Search(outside=True)) if not one.problem]
    assert sorted(len(one.files) for one in followed) == [3, 12]
    assert {one.relative.partition("/")[0] for one in followed} == {"a", "links"}
    files = [root / "links" / path.name for path in outside]
    assert code_of_pixels(files) == "unreadable"  # never followed when read


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = discover(tmp_path)
    assert [one.relative.split("/")[0] for one in found] == [".", "DOE^JOHN", "nifti"][1:]
    assert found[0].problem is not None
    assert found[0].problem[0] == "needs-extra"
    assert "medrobust[dicom]" in found[0].problem[1]
    assert found[1].problem is None


def test_names_that_dicom_files_have() -> None:
    sure = ("IM1.dcm", "a.DCM", "x.ima", "1.2.840.113619.2", "CT.1.2.840.113619", "MR1.2.3.4.5")
    maybe = ("IM000001", "00000001", "CT_slice")
    never = ("a.nii.gz", "a.txt", "DICOMDIR", "report.2.pdf", "v1.2")
    assert all(dicom_index.may_be(name) and dicom_index.promises(name) for name in sure)
    assert all(dicom_index.may_be(name) and not dicom_index.promises(name) for name in maybe)
    assert not any(dicom_index.may_be(name) for name in never)


# Through the plan and the command


def test_what_a_series_needs(tmp_path: Path) -> None:
    recipe = Recipe(root=small_bundle.make(tmp_path / "bundle"), trusted=True)
    files = tuple(make_series(tmp_path / "a"))
    need = need_of("a", Found(relative="a", path=tmp_path, files=files), recipe, Policy(), Attacks())
    assert need.shape == (8, 10, 12)
    cut = need_of("a", Found(relative="a", path=tmp_path, files=files[:1]), recipe, Policy(), Attacks())
    assert cut.problem == "single-slice"


def test_a_tree_of_both_through_the_command(tmp_path: Path) -> None:
    """DICOM and NIfTI, one series broken; nothing of a header comes out; the second run keeps all."""
    bundle = small_bundle.make(tmp_path / "bundle")
    root = tree(tmp_path / "in")
    broken = make_series(root / "DOE^JOHN" / "broken", series="c")
    broken[4].unlink()
    out = tmp_path / "out"
    words = ["batch", str(root), str(out), "-b", str(bundle), "--trust-bundle", "--workers", "0"]
    plan = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "4 cases: 3 to do, 0 done, 1 would be rejected" in plan.output
    assert "8 x 10 x 12" in plan.output
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 3, result.output
    assert "4 cases in OUTPUT: 3 done, 1 rejected" in result.output
    assert "missing-slice" in (out / "failures.csv").read_text()
    assert batch_tree.leaks(out) == []
    assert [word for word in batch_tree.CANARIES if word in result.output] == []
    shapes = sorted(nib.load(path).shape for path in out.glob("cases/*/seg.nii.gz"))
    assert shapes == [(8, 10, 5), (8, 10, 12), (12, 10, 11)]
    before = {path: path.stat().st_mtime_ns for path in out.glob("cases/*/case.json")}
    assert CliRunner().invoke(app, words).exit_code == 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("cases/*/case.json")} == before


def test_a_series_of_another_modality_is_no_case_for_the_bundle(tmp_path: Path) -> None:
    """A model of CT would find something in an MR scan, too."""
    bundle = small_bundle.make(tmp_path / "bundle")
    about = json.loads((bundle / "configs" / "metadata.json").read_text())
    about["network_data_format"]["inputs"]["image"]["modality"] = "CT"
    (bundle / "configs" / "metadata.json").write_text(json.dumps(about))
    make_series(tmp_path / "in" / "a", modality="CT", study="a")
    make_series(tmp_path / "in" / "b", modality="MR", study="b")
    words = ["batch", str(tmp_path / "in"), "-b", str(bundle), "--trust-bundle", "--workers", "0", "-q"]
    for name, more, code, expected in (
        ("bundle's", (), 3, ["done", "modality"]),
        ("any", ("--modality", "any"), 0, ["done", "done"]),
        ("mr", ("--modality", "MR", "--modality", "PT"), 3, ["done", "modality"]),
        ("us", ("--modality", "US"), 2, None),
    ):
        out = tmp_path / name
        result = CliRunner().invoke(app, [*words[:2], str(out), *words[2:], *more])
        assert result.exit_code == code, result.output
        if expected:
            rows = report.read_rows(out / "cases.csv")
            assert sorted(row["code"] or row["status"] for row in rows) == expected
    reasons = {row["reason"] for row in report.read_rows(tmp_path / "mr" / "failures.csv")}
    assert reasons == {"expected slices of MR, PT, got another kind of image"}
