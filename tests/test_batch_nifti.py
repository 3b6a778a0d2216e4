"""Nothing in a file is believed: broken ones are refused with their reason, sound ones are read to the bit."""

from __future__ import annotations

import gzip
import itertools
import os
import resource
import time
from pathlib import Path

import malformed
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medrobust.batch.faults import CaseError
from medrobust.batch.nifti import Policy, read, read_head, sha256_of

CANARY = "DOE_JOHN_19700101"


def put(folder: Path, ending: str, raw: bytes) -> Path:
    path = folder / f"{CANARY}{ending}"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", malformed.REJECTED)
def test_broken_files_are_refused_with_their_reason(tmp_path: Path, name: str) -> None:
    ending, raw, code = malformed.REJECTED[name]
    path = put(tmp_path, ending, raw())
    with pytest.raises(CaseError) as caught:
        read(path)
    assert (caught.value.code, caught.value.kind) == (code, "rejected")
    assert CANARY not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", sorted(malformed.LENIENT))
def test_the_lenient_rule_takes_doubtful_geometry_with_a_warning(tmp_path: Path, name: str) -> None:
    ending, raw, code = malformed.REJECTED[name]
    path = put(tmp_path, ending, raw())
    scan = read(path, Policy(geometry="lenient"))
    assert code in scan.warnings
    np.testing.assert_allclose(scan.geometry.affine, nib.load(path).affine, atol=1e-5)
    np.testing.assert_array_equal(scan.volume, malformed.VOXELS)


def test_the_lenient_rule_still_refuses_what_is_broken(tmp_path: Path) -> None:
    for name in malformed.REJECTED.keys() - malformed.LENIENT:
        ending, raw, code = malformed.REJECTED[name]
        with pytest.raises(CaseError, match=f"{code}:"):
            read(put(tmp_path, ending, raw()), Policy(geometry="lenient"))


@pytest.mark.parametrize("name", malformed.READ)
def test_odd_files_are_read_as_nibabel_reads_them(tmp_path: Path, name: str) -> None:
    ending, raw, warnings = malformed.READ[name]
    path = put(tmp_path, ending, raw())
    scan = read(path)
    assert set(scan.warnings) == warnings
    np.testing.assert_array_equal(scan.volume, malformed.VOXELS)
    np.testing.assert_allclose(scan.geometry.affine, malformed.AFFINE, atol=1e-6)
    if name not in ("bitpix", "garbage behind the archive"):  # which nibabel does not open
        reference = nib.load(path)
        np.testing.assert_array_equal(scan.volume, np.squeeze(np.asarray(reference.dataobj)))
        np.testing.assert_allclose(scan.geometry.affine, reference.affine, atol=1e-6)
    assert scan.sha256 == sha256_of(path)
    assert read_head(path).geometry.shape == malformed.SHAPE


def test_scaled_values_are_those_of_nibabel(tmp_path: Path) -> None:
    path = put(tmp_path, ".nii", malformed.image(scl_slope=0.37, scl_inter=-12.5))
    np.testing.assert_array_equal(read(path).volume, nib.load(path).get_fdata(dtype=np.float64).astype(np.float32))


def test_nonfinite_voxels_are_replaced_only_when_asked(tmp_path: Path) -> None:
    array = malformed.floats(float("nan"))
    array[0, 0, 0] = np.inf
    scan = read(put(tmp_path, ".nii", malformed.image(array)), Policy(nonfinite="replace"))
    assert scan.warnings == ("nonfinite-replaced:2",)
    expected = array.copy()
    expected[~np.isfinite(array)] = -300 + 7  # voxel 0 was the smallest
    np.testing.assert_array_equal(scan.volume, expected)


def test_a_constant_volume_is_flagged(tmp_path: Path) -> None:
    assert read(put(tmp_path, ".nii", malformed.image(np.ones_like(malformed.VOXELS)))).warnings == ("constant",)


def test_every_cut_of_an_archive_is_found(tmp_path: Path) -> None:
    """Common readers return zeros for the slices that a cut archive lacks."""
    whole = malformed.zipped(malformed.image())
    for end in range(2, len(whole)):
        with pytest.raises(CaseError, match="truncated:"):
            read(put(tmp_path, ".nii.gz", whole[:end]))


def test_every_flipped_byte_of_the_voxels_is_found(tmp_path: Path) -> None:
    raw = gzip.compress(malformed.image(np.random.default_rng(0).integers(0, 99, (6, 5, 4), dtype=np.int16)), mtime=0)
    accepted = 0
    for index in range(10, len(raw)):
        bad = bytearray(raw)
        bad[index] ^= 0x55
        try:
            read(put(tmp_path, ".nii.gz", bytes(bad)))
            accepted += 1
        except CaseError:
            pass
    assert accepted == 0


def test_folders_pipes_and_links_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nii")
    (tmp_path / "b.nii").mkdir()
    with pytest.raises(CaseError, match="not-a-file:"):
        read(tmp_path / "a.nii")
    with pytest.raises(CaseError, match="not-a-file:"):
        read(tmp_path / "b.nii")
    path = put(tmp_path, ".nii", malformed.image())
    (tmp_path / "c.nii").symlink_to(path)
    for name in ("c.nii", "missing.nii", "nul\0.nii"):
        with pytest.raises(CaseError, match="unreadable:"):
            read(tmp_path / name)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, ".nii", malformed.image())
    real = os.fstat
    calls = itertools.count()

    def fstat(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if next(calls) == 1:
            os.utime(path, ns=(0, found.st_mtime_ns + 1))
            found = real(descriptor)
        return found

    monkeypatch.setattr("medrobust.batch.nifti.os.fstat", fstat)
    with pytest.raises(CaseError, match="changed:"):
        read(path)


def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    path = put(tmp_path, ".nii.gz", malformed.bomb(1 << 28))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CaseError, match="oversized:"):
        read(path)
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("fields", [{"geometry": "loose"}, {"nonfinite": "ignore"}])
def test_a_policy_that_does_not_exist(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected geometry strict or lenient"):
        Policy(**fields)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_give_a_volume_or_a_reason(tmp_path: Path, data: st.DataObject) -> None:
    """A header with bytes changed at random, cut anywhere, in an archive or not."""
    raw = bytearray(malformed.image())
    for where in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6)):
        raw[where] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
    packed = data.draw(st.booleans())
    path = put(tmp_path, ".nii.gz" if packed else ".nii", malformed.zipped(cut) if packed else cut)
    policy = Policy(geometry=data.draw(st.sampled_from(["strict", "lenient"])))
    refused = ""
    try:
        scan = read(path, policy)
    except CaseError as error:
        refused = str(error)
    if refused:
        assert CANARY not in refused
        return
    assert scan.volume.shape == scan.geometry.shape
    assert scan.volume.dtype == np.float32
    assert np.isfinite(scan.volume).all()
    assert np.isfinite(scan.geometry.affine).all()
    assert abs(np.linalg.det(scan.geometry.affine)) > 0
