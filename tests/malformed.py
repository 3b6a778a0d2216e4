"""A corpus of NIfTI files with one thing wrong (or merely odd) each, and what the strict loader says of it."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (6, 5, 4)
AFFINE = np.array([[0.0, -2.0, 0.0, 10.0], [1.5, 0.0, 0.0, -20.0], [0.0, 0.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE) * 7 - 300


def image(array: np.ndarray = VOXELS, affine: np.ndarray = AFFINE, kind: Any = nib.Nifti1Image, **fields: Any) -> bytes:
    """The bytes of an uncompressed file; ``fields`` overwrite what the header says."""
    made = kind(array, affine, dtype=array.dtype)
    made.set_qform(affine, code=1)
    made.set_sform(affine, code=1)
    made.header.set_xyzt_units("mm")
    return patch(made.to_bytes(), **fields)


def patch(raw: bytes, order: str = "<", **fields: Any) -> bytes:
    """Change fields of the header in the bytes of a file, unchecked."""
    header = np.frombuffer(raw[:348], dtype=nib.nifti1.header_dtype.newbyteorder(order)).copy()
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, one in value.items():
                header[name][0][index] = one
        else:
            header[name] = value
    return header.tobytes() + raw[348:]


def zipped(raw: bytes) -> bytes:
    return gzip.compress(raw, mtime=0)


def big_endian() -> bytes:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_shape(SHAPE)
    header.set_data_dtype(VOXELS.dtype.newbyteorder(">"))
    header.set_qform(AFFINE, code=1)
    header.set_sform(AFFINE, code=1)
    header["vox_offset"], header["magic"], header["scl_slope"] = 352, b"n+1", 1
    return header.binaryblock + b"\0\0\0\0" + VOXELS.astype(">i2").tobytes(order="F")


def bomb(trailing: int = 1 << 25) -> bytes:
    """Voxels as they should be, then zeros without end, in a small archive."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(image()) + packer.compress(bytes(trailing)) + packer.flush()


def floats(value: float) -> np.ndarray:
    array = VOXELS.astype(np.float32)
    array[2, 2, 2] = value
    return array


def sheared(amount: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 2] = amount
    return affine


def rgb() -> bytes:
    return image(np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


NAN, INF = float("nan"), float("inf")

REJECTED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    # name: (ending, bytes, code)
    "no bytes": (".nii", lambda: b"", "empty"),
    "no bytes, gz": (".nii.gz", lambda: b"", "empty"),
    "text": (".nii", lambda: b"<html>not found</html>" * 40, "not-nifti"),
    "text, gz": (".nii.gz", lambda: zipped(b"<html>not found</html>" * 40), "not-nifti"),
    "noise": (".nii", lambda: np.random.default_rng(0).bytes(5000), "not-nifti"),
    "three bytes": (".nii", lambda: image()[:3], "truncated"),
    "half a header": (".nii", lambda: image()[:200], "truncated"),
    "a header only": (".nii", lambda: image()[:352], "truncated"),
    "a header only, gz": (".nii.gz", lambda: zipped(image()[:352]), "truncated"),
    "one byte short": (".nii", lambda: image()[:-1], "truncated"),
    "one byte short, gz": (".nii.gz", lambda: zipped(image()[:-1]), "truncated"),
    "gz without its last byte": (".nii.gz", lambda: zipped(image())[:-1], "truncated"),
    "gz without its checksum": (".nii.gz", lambda: zipped(image())[:-8], "truncated"),
    "gz cut in half": (".nii.gz", lambda: (lambda raw: raw[: len(raw) // 2])(zipped(image())), "truncated"),
    "wrong checksum": (".nii.gz", lambda: (lambda raw: raw[:-8] + b"\1\2\3\4" + raw[-4:])(zipped(image())), "corrupt"),
    "wrong length": (".nii.gz", lambda: zipped(image())[:-1] + b"\7", "corrupt"),
    "gz named .nii": (".nii", lambda: zipped(image()), "misnamed"),
    "plain named .nii.gz": (".nii.gz", image, "misnamed"),
    "a pair's header": (".nii", lambda: image(magic=b"ni1"), "pair"),
    "no mark": (".nii", lambda: image(magic=b"abc"), "not-nifti"),
    "header of another size": (".nii", lambda: image(sizeof_hdr=349), "not-nifti"),
    "70 TB": (".nii", lambda: image(dim={1: 32767, 2: 32767, 3: 32767}), "too-large"),
    "70 TB, gz": (".nii.gz", lambda: zipped(image(dim={1: 32767, 2: 32767, 3: 32767})), "too-large"),
    "1 GB in 600 bytes": (".nii.gz", lambda: zipped(image(dim={1: 1000, 2: 1000, 3: 1000})), "truncated"),
    "a bomb behind the voxels": (".nii.gz", bomb, "oversized"),
    "2 MB behind the voxels": (".nii", lambda: image() + bytes(1 << 21), "oversized"),
    "offset behind the end": (".nii", lambda: image(vox_offset=1e6), "truncated"),
    "offset in the header": (".nii", lambda: image(vox_offset=100), "bad-offset"),
    "offset NaN": (".nii", lambda: image(vox_offset=NAN), "bad-offset"),
    "offset 2 GB": (".nii", lambda: image(vox_offset=2.0e9), "bad-offset"),
    "negative side": (".nii", lambda: image(dim={2: -5}), "bad-dims"),
    "no slices": (".nii", lambda: image(dim={3: 0}), "bad-dims"),
    "no dimensions": (".nii", lambda: image(dim={0: 0}), "bad-dims"),
    "nine dimensions": (".nii", lambda: image(dim={0: 9}), "bad-dims"),
    "two dimensions": (".nii", lambda: image(dim={0: 2}), "flat"),
    "one slice": (".nii", lambda: image(VOXELS[:, :, :1]), "flat"),
    "one voxel": (".nii", lambda: image(VOXELS[:1, :1, :1]), "flat"),
    "a time series": (".nii", lambda: image(np.stack([VOXELS] * 3, -1)), "four-dimensional"),
    "a vector field": (".nii", lambda: image(np.stack([VOXELS] * 3, -1)[:, :, :, None]), "four-dimensional"),
    "colour": (".nii", rgb, "colour"),
    "complex": (".nii", lambda: image(VOXELS.astype(np.complex64)), "complex"),
    "unknown data type": (".nii", lambda: image(datatype=77), "datatype"),
    "intercept NaN": (".nii", lambda: image(scl_slope=2, scl_inter=NAN), "bad-scaling"),
    "spacing 0": (".nii", lambda: image(pixdim={3: 0}), "bad-spacing"),
    "spacing NaN": (".nii", lambda: image(pixdim={2: NAN}), "bad-spacing"),
    "spacing negative": (".nii", lambda: image(pixdim={1: -1.5}), "bad-spacing"),
    "code 77": (".nii", lambda: image(sform_code=77), "bad-form"),
    "quaternion too long": (".nii", lambda: image(quatern_b=3.0), "bad-form"),
    "quaternion NaN": (".nii", lambda: image(quatern_b=NAN), "bad-form"),
    "sform NaN": (".nii", lambda: image(srow_x={1: NAN}), "bad-affine"),
    "sform infinite": (".nii", lambda: image(srow_z={3: INF}), "bad-affine"),
    "sform singular": (".nii", lambda: image(srow_z={2: 0.0}), "singular"),
    "sform all zero": (".nii", lambda: image(srow_x=0, srow_y=0, srow_z=0), "singular"),
    "NaN": (".nii", lambda: image(floats(NAN)), "nonfinite"),
    "infinite": (".nii", lambda: image(floats(-INF)), "nonfinite"),
    "all NaN": (".nii", lambda: image(np.full(SHAPE, NAN, np.float32)), "nonfinite"),
    "beyond float32": (".nii", lambda: image(VOXELS.astype(np.float64) * 1e300), "nonfinite"),
    "no form": (".nii", lambda: image(qform_code=0, sform_code=0), "no-form"),
    "shear": (".nii", lambda: image(affine=sheared(0.5), qform_code=0), "sheared"),
    "forms differ": (".nii", lambda: image(qoffset_x=25.0), "forms-differ"),
    "spacing differs": (".nii", lambda: image(pixdim={1: 2.5}, qform_code=0), "spacing-differs"),
    "metres": (".nii", lambda: image(xyzt_units=1), "units"),
}

LENIENT = {"no form", "shear", "forms differ", "spacing differs", "metres"}
"""What ``geometry="lenient"`` accepts."""

READ: dict[str, tuple[str, Callable[[], bytes], set[str]]] = {
    # name: (ending, bytes, warnings); all hold VOXELS
    "plain": (".nii", image, set()),
    "gz": (".nii.gz", lambda: zipped(image()), set()),
    "gz in two streams": (".nii.gz", lambda: zipped(image()[:700]) + zipped(image()[700:]), set()),
    "big endian": (".nii", big_endian, set()),
    "NIfTI-2": (".nii", lambda: image(kind=nib.Nifti2Image), set()),
    "float64": (".nii", lambda: image(VOXELS.astype(np.float64)), set()),
    "float32": (".nii.gz", lambda: zipped(image(VOXELS.astype(np.float32))), set()),
    "one time point": (".nii", lambda: image(VOXELS[..., None]), set()),
    "only a qform": (".nii", lambda: image(sform_code=0), set()),
    "only a sform": (".nii", lambda: image(qform_code=0), set()),
    "slope NaN": (".nii", lambda: image(scl_slope=NAN), {"scaling-ignored"}),
    "slope 0": (".nii", lambda: image(scl_slope=0, scl_inter=0), set()),
    "slope 0, intercept 5": (".nii", lambda: image(scl_slope=0, scl_inter=5), {"scaling-ignored"}),
    "bitpix": (".nii", lambda: image(bitpix=32), {"bitpix"}),
    "garbage behind the archive": (".nii.gz", lambda: zipped(image()) + b"garbage", {"trailing-garbage"}),
    "bytes behind the voxels": (".nii", lambda: image() + b"12345", {"trailing-data"}),
}
