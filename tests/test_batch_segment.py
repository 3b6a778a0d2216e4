"""Labels lie where the scan lies: against MONAI's own inference and inversion, for every orientation, to the bit."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import malformed
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer, sliding_window_inference
from monai.transforms import Compose, CropForegroundd, Invertd, Orientationd, Spacingd
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from oracles import SmallNet
from torch import Tensor, nn

from medrobust.batch import sampling, volumes
from medrobust.batch.faults import CaseError, RunError
from medrobust.batch.nifti import Policy, read
from medrobust.batch.regrid import regrid
from medrobust.batch.resample import is_known, regridded
from medrobust.batch.stitch import Slab, slide_axis, stitch

OBLIQUE = np.array([[0.0, -0.8, 0.1, 10], [0.9, 0.0, 0.2, -20], [0.1, 0.1, 3.0, 5], [0, 0, 0, 1]])


class Classes(nn.Module):
    """Logits whose largest is the voxel's own value, rounded: an identity model of ``count`` classes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, image: Tensor) -> Tensor:
        levels = torch.arange(self.count).reshape(1, -1, 1, 1, 1)
        return -(image - levels).abs()


def volume(*size: int) -> Tensor:
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(20, 9, 13), (9, 20, 13), (9, 9, 30), (5, 6, 7), (8, 8, 8)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_slabs_are_monais_inference_in_pieces(size: tuple[int, ...], mode: str) -> None:
    network = SmallNet().eval()
    inferer = SlidingWindowInferer(roi_size=(8, 8, 8), sw_batch_size=3, overlap=0.6, mode=mode)
    image = volume(*size)
    with torch.no_grad():
        expected = sliding_window_inference(image[None], (8, 8, 8), 3, network, overlap=0.6, mode=mode)[0]
        axis, slabs = stitch(image, network, inferer, windows=2)
        found = list(slabs)
    assert axis == slide_axis(size, (8, 8, 8))
    if max(size) > 8:
        assert size[axis] == max(size)
    assert [slab.start for slab in found] == list(
        itertools.accumulate((slab.logits.shape[axis + 1] for slab in found[:-1]), initial=0)
    )
    torch.testing.assert_close(torch.cat([slab.logits for slab in found], dim=axis + 1), expected, atol=1e-5, rtol=1e-5)
    assert max(slab.logits.shape[axis + 1] for slab in found) <= 8


def test_a_network_without_windows_is_one_slab() -> None:
    network = SmallNet().eval()
    axis, slabs = stitch(volume(6, 7, 8), network, SimpleInferer())
    (slab,) = slabs
    assert (axis, slab.start) == (0, 0)
    torch.testing.assert_close(slab.logits, network(volume(6, 7, 8)[None])[0].detach())


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("budget", [1, 1 << 26])
def test_interpolated_labels_are_those_of_monais_inversion(
    monkeypatch: pytest.MonkeyPatch, crop: bool, budget: int
) -> None:
    """Another orientation, coarser voxels, cropped: back to the scan as ``Invertd`` and argmax do it."""
    monkeypatch.setattr(sampling, "BUDGET", budget)
    scan = torch.nn.functional.avg_pool3d(volume(17, 15, 12)[None] * 8, 3, 1, 1)[0]
    scan[:, :3] = 0
    scan[..., -2:] = 0
    affine = np.array([[0.0, 1.0, 0.0, -5.0], [-0.8, 0.0, 0.0, 3.0], [0.0, 0.0, 1.5, 8.0], [0.0, 0.0, 0.0, 1.0]])
    steps = [Orientationd("image", "RAS", labels=None), Spacingd("image", (1.7, 1.3, 2.0), mode="bilinear")]
    transforms = Compose([*steps, *([CropForegroundd("image", "image", allow_smaller=True)] if crop else [])])
    data = transforms({"image": MetaTensor(scan, affine=torch.tensor(affine))})
    image = data["image"]
    logits = torch.randn(3, *image.shape[1:], generator=torch.Generator().manual_seed(1)).cumsum(
        1
    ) + 2 * image.as_subclass(Tensor)
    pred = MetaTensor(logits).copy_meta_from(image, copy_attr=False)
    inverse = Invertd("pred", transforms, orig_keys="image", nearest_interp=False)
    expected = inverse({**data, "pred": pred})["pred"].argmax(0).numpy()
    parts = [Slab(start, logits[:, :, :, start : start + 2]) for start in range(0, logits.shape[3], 2)]
    found = regrid(
        iter(parts),
        2,
        size=tuple(image.shape[1:]),
        affine=image.affine.numpy(),
        scan_shape=(17, 15, 12),
        scan_affine=affine,
        classes=3,
    )
    assert found.shape == expected.shape
    assert (found != expected).mean() < 1e-3  # ties of interpolated logits, rounded differently
    assert len(np.unique(found)) == 3


@pytest.mark.parametrize("budget", [1, 1 << 26])
@pytest.mark.parametrize("pixdim", [(1.7, 1.3, 2.0), (0.5, 0.5, 0.7), (-1.0, 1.3, -1.0), (0.8, 1.0, 1.5)])
def test_the_new_grid_is_monais(monkeypatch: pytest.MonkeyPatch, pixdim: tuple[float, ...], budget: int) -> None:
    monkeypatch.setattr(sampling, "BUDGET", budget)
    affine = np.array([[0.0, 1.0, 0.0, -5.0], [-0.8, 0.0, 0.0, 3.0], [0.0, 0.0, -1.5, 8.0], [0.0, 0.0, 0.0, 1.0]])
    image = MetaTensor(volume(17, 15, 12), affine=torch.tensor(affine))
    steps = [Orientationd("image", "RAS", labels=None), Spacingd("image", pixdim, mode="bilinear")]
    found, expected = image, {"image": image}
    for step in steps:
        assert is_known(step)
        found, expected = regridded(found, step), step(expected)
        torch.testing.assert_close(found.as_tensor(), expected["image"].as_tensor(), atol=1e-6, rtol=0)
        np.testing.assert_allclose(found.affine, expected["image"].affine, atol=1e-9)


def test_oblique_scans_are_resampled_as_monai_does() -> None:
    image = MetaTensor(volume(9, 8, 7), affine=torch.tensor(OBLIQUE))
    step = Spacingd("image", (1.0, 1.0, 2.0), diagonal=True)
    torch.testing.assert_close(
        regridded(image, step).as_tensor(), step({"image": image})["image"].as_tensor(), atol=1e-6, rtol=0
    )


def test_other_ways_to_resample_are_left_to_monai() -> None:
    for settings in ({"mode": "nearest"}, {"padding_mode": "zeros"}, {"align_corners": True}, {"scale_extent": True}):
        assert not is_known(Spacingd("image", (1.0, 1.0, 1.0), **settings))
    assert is_known(Spacingd(["label", "image"], (1.0, 1.0, 1.0), mode=["nearest", "bilinear"]))
    assert not is_known(Spacingd(["label", "image"], (1.0, 1.0, 1.0), mode=["bilinear", "nearest"]))
    assert not is_known(CropForegroundd("image", "image"))


ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)
]


def test_an_identity_model_returns_every_orientation_to_the_bit(tmp_path: Path) -> None:
    """48 orientations of an oblique, anisotropic scan, through the network's RAS grid and back, on disk."""
    assert len(ORIENTATIONS) == 48
    labels = np.random.default_rng(0).integers(0, 5, (7, 6, 5), dtype=np.uint8)
    inferer = SlidingWindowInferer(roi_size=(4, 4, 4), sw_batch_size=8, overlap=0.5)
    source = nib.Nifti1Image(labels, OBLIQUE)
    for codes in ORIENTATIONS:
        ornt = axcodes2ornt(tuple(codes))
        turned = nib.orientations.apply_orientation(labels, ornt)
        affine = source.affine @ inv_ornt_aff(ornt, labels.shape)
        raw = malformed.image(np.ascontiguousarray(turned), affine)
        path = tmp_path / "scan.nii"
        path.write_bytes(raw)
        scan = read(path, Policy(geometry="lenient"))
        image = Orientationd("image", "RAS", labels=None)(
            {"image": MetaTensor(torch.from_numpy(scan.volume)[None], affine=torch.tensor(scan.geometry.affine))}
        )["image"]
        axis, slabs = stitch(image, Classes(5), inferer)
        found = regrid(
            slabs,
            axis,
            size=tuple(image.shape[1:]),
            affine=image.affine.numpy(),
            scan_shape=scan.geometry.shape,
            scan_affine=scan.geometry.affine,
            classes=5,
        )
        np.testing.assert_array_equal(found, turned, err_msg=codes)
    assert found.dtype == np.uint8


def geometry_fields(path: Path) -> tuple[bytes, ...]:
    header = nib.load(path).header
    names = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    names = (*names, "srow_x", "srow_y", "srow_z", "xyzt_units", "dim")
    fields = [np.asarray(header[name]).tobytes() for name in names]
    return (*fields, np.asarray(header["pixdim"][:4]).tobytes())


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (2, 4)])
def test_what_is_written_lies_where_the_scan_lies(tmp_path: Path, codes: tuple[int, int]) -> None:
    scan_path, path = tmp_path / "scan.nii", tmp_path / "seg.nii.gz"
    affine = np.diag([-0.75, 1.5, 3.0, 1.0]) + np.array(
        [[0, 0, 0, 11.3], [0, 0, 0, -7.7], [0, 0, 0, 3.1], [0, 0, 0, 0]]
    )
    scan_path.write_bytes(malformed.image(affine=affine, qform_code=codes[0], sform_code=codes[1], descrip=b"DOE_JOHN"))
    scan = read(scan_path)
    labels = np.random.default_rng(0).integers(0, 9, malformed.SHAPE, dtype=np.uint8)
    digest = volumes.write(labels, path, scan.geometry)
    assert geometry_fields(path) == geometry_fields(scan_path)
    written, source = sitk.ReadImage(str(path)), sitk.ReadImage(str(scan_path))
    for name in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(written, name)() == getattr(source, name)()
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    assert len(image.header.extensions) == 0
    assert bytes(image.header["descrip"]).startswith(volumes.RESEARCH.encode())
    assert volumes.write(labels, tmp_path / "again.nii.gz", scan.geometry) == digest
    assert b"DOE_JOHN" not in path.read_bytes() + image.header.binaryblock
    np.testing.assert_array_equal(np.asarray(image.dataobj), labels)


def test_other_files_are_written_as_what_they_are(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 999, malformed.SHAPE, dtype=np.uint16)
    for name in ("NIfTI-2", "shear", "no form", "forms differ"):
        raw = malformed.READ[name][1]() if name in malformed.READ else malformed.REJECTED[name][1]()
        (tmp_path / "scan.nii").write_bytes(raw)
        scan = read(tmp_path / "scan.nii", Policy(geometry="lenient"))
        volumes.write(labels, tmp_path / "seg.nii.gz", scan.geometry)
        found = nib.load(tmp_path / "seg.nii.gz")
        np.testing.assert_array_equal(found.affine, nib.load(tmp_path / "scan.nii").affine)
        assert type(found) is type(nib.load(tmp_path / "scan.nii"))


@pytest.mark.parametrize(
    ("where", "message"), [("voxel", "other voxels"), ("affine", "another geometry"), ("half", "cannot read")]
)
def test_a_file_that_was_damaged_on_its_way_is_found(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "scan.nii").write_bytes(malformed.image())
    geometry = read(tmp_path / "scan.nii").geometry
    labels = np.ones(malformed.SHAPE, dtype=np.uint8)
    path = tmp_path / "seg.nii.gz"
    volumes.write(labels, path, geometry)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[-1 if where == "voxel" else 290] ^= 1
    path.write_bytes(path.read_bytes()[:100] if where == "half" else malformed.zipped(bytes(raw)))
    with pytest.raises(CaseError, match=message):
        volumes.verify(path, labels, geometry)


def one_voxel(logits: Tensor, classes: int) -> np.ndarray:
    size = (logits.shape[1], 1, 1)
    return regrid(
        iter([Slab(0, logits)]), 0, size=size, affine=np.eye(4), scan_shape=size, scan_affine=np.eye(4), classes=classes
    )


def test_the_smallest_type_and_the_number_of_classes() -> None:
    logits = torch.arange(257.0).reshape(257, 1, 1, 1)
    assert one_voxel(logits, 257).dtype == np.uint16
    assert one_voxel(logits, 257).item() == 256
    assert one_voxel(logits[:256], 256).dtype == np.uint8
    with pytest.raises(RunError, match="expected logits of 3 classes"):
        one_voxel(logits, 3)


def test_one_channel_is_a_sigmoid() -> None:
    logits = torch.tensor([-1.0, 0.5, 2.0, -0.1]).reshape(1, 4, 1, 1)
    assert one_voxel(logits, 2).ravel().tolist() == [0, 1, 1, 0]
