"""The archive is pinned, nothing but the named files leaves it, and the real scans are what the docs say."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrobust.data import ct_organs as dataset
from medrobust.data.archive import SourceArchive, extract


def archive(path: Path, files: dict[str, bytes], link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(entry)
    return path


def test_extract_takes_the_named_files_only(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", {"a/x": b"1", "../evil": b"2", "a/y": b"3"})
    extract(source, {"a/x": tmp_path / "out" / "x"})
    assert (tmp_path / "out" / "x").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_extract_refuses_links_and_misses(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", {}, link="a/x")
    with pytest.raises(ValueError, match="regular file"):
        extract(source, {"a/x": tmp_path / "x"})
    with pytest.raises(ValueError, match="a/z"):
        extract(source, {"a/z": tmp_path / "z"})


def test_a_cached_archive_needs_no_network_and_a_wrong_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive(tmp_path / "thing-1.0.tar.gz", {"a": b"1"})
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert SourceArchive(name="thing", version="1.0", sha256=digest).fetch(tmp_path) == source
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"expected pip to download thing 1\.0"):
        SourceArchive(name="thing", version="1.0", sha256="0" * 64).fetch(tmp_path / "elsewhere")


def test_real_exams(ct_organs: Path) -> None:
    (training,) = dataset.cases("training", ct_organs)
    (validation,) = dataset.cases("validation", ct_organs)
    (shift,) = dataset.cases("shift", ct_organs)
    for case, shape in ((training, (122, 101, 112)), (validation, (512, 512, 20)), (shift, (117, 91, 20))):
        image, label = nib.load(case["image"]), nib.load(case["label"])
        assert image.shape == label.shape == shape
        assert set(np.unique(np.asarray(label.dataobj))) == set(range(len(dataset.CLASSES)))
    # Image and mask of CT B have their axes the other way round; in space they lie on each other.
    ct_b = nib.as_closest_canonical(nib.load(validation["image"]))
    mask = nib.as_closest_canonical(nib.load(validation["label"]))
    np.testing.assert_allclose(ct_b.affine, mask.affine, atol=1e-3)
    mean = {name: ct_b.get_fdata()[mask.get_fdata() == i].mean() for i, name in enumerate(dataset.CLASSES)}
    assert mean["liver"] == pytest.approx(89, abs=2)
    assert mean["aorta"] == pytest.approx(177, abs=2)
    assert mean["bones"] > 200


def test_no_patient_data_is_left(ct_organs: Path) -> None:
    (case,) = dataset.cases("validation", ct_organs)
    header = nib.load(case["image"]).header
    assert bytes(header["descrip"]).strip(b"\x00") in (b"", b"5.0.10")
    assert not header.extensions


def test_missing_data_set_and_section(tmp_path: Path, ct_organs: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `medrobust data`"):
        dataset.cases("training", tmp_path)
    with pytest.raises(ValueError, match="choose training, validation or shift"):
        dataset.cases("test", ct_organs)


def test_an_older_preparation_is_done_again(tmp_path: Path, ct_organs: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "spleen"}}')
    dataset.prepare(tmp_path)
    for name in ("dataset.json", "ct_a_label.nii.gz"):
        assert (tmp_path / name).read_bytes() == (ct_organs / name).read_bytes()
