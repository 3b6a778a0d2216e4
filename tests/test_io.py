"""Volumes survive the disk: every bit, the place in space, and nothing half written."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medrobust.atomic import replacing, write_text
from medrobust.io import load_volume, save_volume, stem, unused
from medrobust.run import case_names

OBLIQUE = np.array([[0.0, -0.8, 0.1, 10], [0.9, 0.0, 0.2, -20], [0.1, 0.1, 3.0, 5], [0, 0, 0, 1]])


def volume(channels: int = 1) -> torch.Tensor:
    return torch.rand(channels, 5, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 2])
def test_round_trip(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "new" / "a.nii.gz"
    meta = {"qform_code": torch.tensor(0), "sform_code": np.array(4), "xyzt_units": 10}
    save_volume(volume(channels), path, affine=torch.tensor(OBLIQUE), meta=meta)
    assert torch.equal(load_volume(path, volume(channels), OBLIQUE), volume(channels))
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"]), int(header["xyzt_units"])) == (0, 4, 10)
    np.testing.assert_allclose(nib.load(path).affine, OBLIQUE, atol=1e-6)


def test_an_affine_is_never_lost(tmp_path: Path) -> None:
    """With both codes 0 a reader would ignore the affine."""
    path = tmp_path / "a.nii.gz"
    save_volume(volume(), path, affine=OBLIQUE, meta={"qform_code": 0, "sform_code": 0})
    np.testing.assert_allclose(nib.load(path).affine, OBLIQUE, atol=1e-6)
    assert int(nib.load(path).header["sform_code"]) == 2


@pytest.mark.parametrize(
    ("value", "affine", "message"),
    [
        (torch.full((1, 2, 2, 2), float("nan")), OBLIQUE, "finite voxels"),
        (torch.zeros(1, 2, 2, 2), np.zeros((4, 4)), "invertible 4 x 4 affine"),
        (torch.zeros(1, 2, 2, 2), np.eye(3), "invertible 4 x 4 affine"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, value: torch.Tensor, affine: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_volume(value, tmp_path / "a.nii.gz", affine=affine)
    assert list(tmp_path.iterdir()) == []


def test_volumes_of_another_grid_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    save_volume(volume(), path, affine=OBLIQUE)
    with pytest.raises(ValueError, match=r"expected a.nii.gz to have shape \(1, 5, 6, 8\)"):
        load_volume(path, torch.zeros(1, 5, 6, 8), OBLIQUE)
    with pytest.raises(ValueError, match="another affine"):
        load_volume(path, volume(), np.eye(4))
    with pytest.raises(FileNotFoundError, match=r"expected the adversarial volume b\.nii\.gz"):
        load_volume(tmp_path / "b.nii.gz", volume(), OBLIQUE)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii", "case"])
def test_stem(name: str) -> None:
    assert stem(f"/somewhere/{name}") == "case"


def test_a_file_called_after_a_case_stays_in_its_folder(tmp_path: Path) -> None:
    names = case_names(
        [{"case": "../../a", "image": "i"}, {"case": "/b\\c", "image": "i"}, {"case": "/b/c", "image": "i"}]
    )
    assert names == [".._.._a", "_b_c", "_b_c_2"]
    assert all((tmp_path / f"{name}__image.nii.gz").resolve().parent == tmp_path.resolve() for name in names)
    assert unused("a", {"a"}) == "a_2"
