"""Read a NIfTI volume without trusting it: all of it or a reason, in bounded time and memory.

Readers in common use do not agree on broken files: some return zeros for what a cut file lacks, some ignore a wrong
checksum, some set NaN to 0, and where qform and sform differ each follows another one. Here the file is read to its
last byte, the compressed stream's checksum included, and anything that two readers might see differently is refused
(``Policy.geometry="lenient"`` accepts some of it, with a warning). The rules are tabled in ``docs/batch.md``.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.quaternions import fillpositive, quat2mat

from medrobust.batch.faults import CaseError
from medrobust.batch.stream import CHUNK, Stream

RATIO = 1032
"""DEFLATE never makes more bytes of one; a header that needs more describes a file that was cut or forged."""
TYPES = {
    2: np.uint8,
    4: np.int16,
    8: np.int32,
    16: np.float32,
    64: np.float64,
    256: np.int8,
    512: np.uint16,
    768: np.uint32,
    1024: np.int64,
    1280: np.uint64,
}
SIZES = {348: 1, 540: 2}
"""Size of a header -> version of the format."""
COLOURS, COMPLEX = (128, 2304), (32, 1792, 2048)
MOVED = 0.1
"""Two affines agree if no corner of the volume moves by more than this share of a voxel's shortest side."""
SHEAR = 1e-4
"""Largest cosine between two axes that should be orthogonal: where ITK stops to read a file."""
COPIED = (
    *("xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""Header fields that say where a volume lies, beside the first four of ``pixdim``."""


MODALITIES = ("CT", "MR", "PT")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is accepted.

    Args:
        geometry: ``"strict"`` refuses shear, forms that disagree, no form at all and units other than mm; ``"lenient"``
            accepts them with a warning, and follows the sform.
        nonfinite: ``"reject"`` NaN and infinity, or ``"replace"`` them by the volume's smallest finite value.
        voxels: most voxels of a volume.
        header: most bytes between the header and the voxels, where extensions are.
        modalities: of DICOM series, such as ``("CT",)``; empty: every one that can be read. NIfTI does not tell.
    """

    geometry: str = "strict"
    nonfinite: str = "reject"
    voxels: int = 1 << 30
    header: int = 1 << 24
    modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.geometry not in ("strict", "lenient") or self.nonfinite not in ("reject", "replace"):
            raise ValueError(
                "expected geometry strict or lenient, and nonfinite reject or replace, "
                f"got {self.geometry} and {self.nonfinite}"
            )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a volume lies: its size, its affine (voxel to mm), and the header's own fields, bit for bit."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    version: int
    pixdim: np.ndarray
    fields: dict[str, Any]
    plain: bool = True
    """Whether every reader places it alike."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm."""
        return tuple(float(side) for side in np.linalg.norm(self.affine[:3, :3], axis=0))

    def header(self, dtype: Any, description: str) -> Any:
        """A fresh header with this geometry and nothing else of the file's."""
        header = (nib.Nifti1Header if self.version == 1 else nib.Nifti2Header)()
        header.set_data_dtype(dtype)
        header.set_data_shape(self.shape)
        header["pixdim"][:4] = self.pixdim
        for name, value in self.fields.items():
            header[name] = value
        header["descrip"] = description.encode()[:79]
        header["scl_slope"], header["scl_inter"] = 1, 0
        header["vox_offset"] = 352 if self.version == 1 else 544
        header["magic"] = b"n+1" if self.version == 1 else b"n+2\0\r\n\x1a\n"
        return header


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a file's header says, checked."""

    geometry: Geometry
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    warnings: tuple[str, ...]

    @property
    def voxels(self) -> int:
        return int(np.prod(self.geometry.shape, dtype=object))


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A volume that was read to its last byte: ``volume`` (X, Y, Z) float32, and the SHA-256 of the file."""

    volume: np.ndarray
    geometry: Geometry
    sha256: str
    size: int
    warnings: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], policy: Policy | None = None) -> Scan:
    """Read a ``.nii`` or ``.nii.gz`` file; symbolic links are not followed.

    Raises:
        CaseError: the file is refused; the message holds numbers and fixed words only.
    """
    policy = policy or Policy()
    with Stream(path) as stream:
        head = _head(stream, policy)
        volume, warnings = _voxels(stream, head, policy)
        warnings += _rest(stream)
        stream.check_unchanged()
        return Scan(
            volume=volume,
            geometry=head.geometry,
            sha256=stream.digest.hexdigest(),
            size=stream.size,
            warnings=(*head.warnings, *warnings),
        )


def read_head(path: str | os.PathLike[str], policy: Policy | None = None) -> Head:
    """Only the header of a file, with all checks that need no voxels.

    Raises:
        CaseError: the file is refused.
    """
    with Stream(path) as stream:
        return _head(stream, policy or Policy())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file; raises CaseError where it cannot be read."""
    with Stream(path, sniff=False) as stream:
        stream.drain()
        return stream.digest.hexdigest()


def _head(stream: Stream, policy: Policy) -> Head:
    raw = stream.exactly(4)
    little = int.from_bytes(raw, "little") in SIZES
    size = int.from_bytes(raw, "little" if little else "big")
    if size not in SIZES:
        raise CaseError("not-nifti", "the first four bytes are no size of a NIfTI header")
    version = SIZES[size]
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    block = raw + stream.exactly(size - 4)
    header = kind(block, endianness="<" if little else ">", check=False)
    magic = bytes(block[344:348]) if version == 1 else bytes(block[4:12])
    if magic in (b"ni1\0", b"ni2\0\r\n\x1a\n"):
        raise CaseError("pair", "the voxels are in another file (.hdr and .img): join them into one .nii.gz")
    if magic != (b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n"):
        raise CaseError("not-nifti", "the header has no NIfTI mark")
    warnings: list[str] = []
    shape = _shape(header)
    code = int(header["datatype"])
    if code not in TYPES:
        what = "colour" if code in COLOURS else "complex" if code in COMPLEX else "datatype"
        raise CaseError(what, f"expected whole or real numbers as voxels, got data type {code}")
    dtype = np.dtype(TYPES[code]).newbyteorder("<" if little else ">")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        warnings.append("bitpix")
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > policy.voxels:
        raise CaseError("too-large", f"expected at most {policy.voxels} voxels, the header says {voxels}")
    offset = float(header["vox_offset"])
    least = 352 if version == 1 else 544
    if not (np.isfinite(offset) and offset == int(offset) and least <= offset <= least + policy.header):
        raise CaseError(
            "bad-offset", f"expected voxels between byte {least} and {least + policy.header}, got {offset:g}"
        )
    needed = int(offset) + voxels * dtype.itemsize
    held = stream.size * RATIO if stream.inflater else stream.size
    if needed > held:
        raise CaseError("truncated", f"the header says {needed} bytes, the file cannot hold more than {held}")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        if not np.isfinite(slope) or inter:
            warnings.append("scaling-ignored")
        slope, inter = 1.0, 0.0
    if not np.isfinite(inter):
        raise CaseError("bad-scaling", "the header's intercept is not finite")
    geometry = _geometry(header, version, shape, policy, warnings)
    return Head(geometry=geometry, dtype=dtype, offset=int(offset), slope=slope, inter=inter, warnings=tuple(warnings))


def _shape(header: Any) -> tuple[int, int, int]:
    count, *sides = (int(side) for side in header["dim"])
    if not 1 <= count <= 7 or any(side < 1 for side in sides[:count]):
        raise CaseError("bad-dims", f"expected 3 sides of at least one voxel, the header says {count}: {sides[:7]}")
    if count < 3:
        raise CaseError("flat", f"expected a volume, got {count} dimension(s)")
    if any(side != 1 for side in sides[3:count]):
        raise CaseError(
            "four-dimensional", f"expected one volume, got the sides {sides[:count]}: split the series first"
        )
    if min(sides[:3]) < 2:
        raise CaseError("flat", f"expected at least 2 voxels a side, got {sides[:3]}")
    return sides[0], sides[1], sides[2]


def _geometry(header: Any, version: int, shape: tuple[int, int, int], policy: Policy, warnings: list[str]) -> Geometry:
    def doubt(code: str, message: str) -> None:
        if policy.geometry == "strict":
            raise CaseError(code, message + " (--geometry lenient accepts it)")
        warnings.append(code)

    pixdim = np.array(header["pixdim"], dtype=np.float64)[:4]
    sides = pixdim[1:]
    if not np.isfinite(sides).all() or (sides <= 0).any():
        raise CaseError("bad-spacing", f"expected voxel sides above 0 mm, got {[float(side) for side in sides]}")
    qcode, scode = int(header["qform_code"]), int(header["sform_code"])
    if not (0 <= qcode <= 5 and 0 <= scode <= 5):
        raise CaseError("bad-form", f"expected form codes 0 to 5, got {qcode} and {scode}")
    qform = _qform(header, pixdim) if qcode else None
    sform = _sform(header) if scode else None
    affine = sform if sform is not None else qform
    plain = True
    if affine is None:
        doubt("no-form", "neither qform nor sform says where the volume lies")
        affine, plain = np.asarray(header.get_base_affine(), dtype=np.float64), False
    if not np.isfinite(affine).all():
        raise CaseError("bad-affine", "expected a finite affine, got NaN or infinity")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths < 1e-6).any() or abs(np.linalg.det(affine[:3, :3] / np.maximum(lengths, 1e-300))) < 1e-3:
        raise CaseError("singular", "the affine's axes do not span a volume")
    axes = affine[:3, :3] / lengths
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > SHEAR:
        doubt("sheared", f"expected orthogonal axes, got a cosine of {cosine:.2g}")
        plain = False
    elif qform is not None and sform is not None and (moved := displacement(qform, sform, shape)) > MOVED:
        doubt("forms-differ", f"qform and sform place a corner {moved:.3g} voxels apart")
        plain = False
    else:
        other = affine.copy()
        other[:3, :3] = axes * sides
        if (moved := displacement(other, affine, shape)) > MOVED:
            doubt("spacing-differs", f"pixdim and affine place a corner {moved:.3g} voxels apart")
            plain = False
    if int(header["xyzt_units"]) & 7 not in (0, 2):
        doubt("units", "expected millimetres, got metres, micrometres or an unknown unit")
    return Geometry(
        shape=shape,
        affine=affine,
        version=version,
        pixdim=np.array(header["pixdim"])[:4],
        fields={name: np.array(header[name]) for name in COPIED},
        plain=plain,
    )


def _sform(header: Any) -> np.ndarray:
    affine = np.eye(4)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        affine[row] = np.array(header[name], dtype=np.float64)
    return affine


def _qform(header: Any, pixdim: np.ndarray) -> np.ndarray:
    imaginary = np.array([header[f"quatern_{name}"] for name in "bcd"], dtype=np.float64)
    try:
        quaternion = fillpositive(imaginary, w2_thresh=-3 * np.finfo(np.float32).eps)
    except ValueError:
        raise CaseError("bad-form", "the qform's quaternion is longer than 1") from None
    if not np.isfinite(quaternion).all():
        raise CaseError("bad-form", "the qform's quaternion is not finite")
    affine = np.eye(4)
    handed = -1.0 if pixdim[0] < 0 else 1.0
    affine[:3, :3] = quat2mat(quaternion) * (pixdim[1:] * [1, 1, handed])
    affine[:3, 3] = [float(header[f"qoffset_{name}"]) for name in "xyz"]
    return affine


def displacement(one: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """How far two affines place the volume's corners from each other, in shortest voxel sides."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, side - 1) for side in shape))]).T
    away = np.linalg.norm((one - other)[:3] @ corners, axis=0).max()
    return float(away / np.linalg.norm(other[:3, :3], axis=0).min())


def _voxels(stream: Stream, head: Head, policy: Policy) -> tuple[np.ndarray, tuple[str, ...]]:
    stream.skip(head.offset - (348 if head.geometry.version == 1 else 540))
    count, done, carried = head.voxels, 0, b""
    flat = np.empty(count, dtype=np.float32)
    bad, low, high = 0, np.inf, -np.inf
    while done < count:
        left = (count - done) * head.dtype.itemsize - len(carried)
        piece = stream.read(min(left, CHUNK))
        if not piece:
            raise CaseError("truncated", f"expected {count} voxels, the file holds {done}")
        piece = carried + piece
        whole = len(piece) // head.dtype.itemsize
        carried = piece[whole * head.dtype.itemsize :]
        if not whole:
            continue
        part = flat[done : done + whole]
        _scale(np.frombuffer(piece, dtype=head.dtype, count=whole), head, part)
        done += whole
        finite = np.isfinite(part)
        wrong = whole - int(finite.sum())
        bad += wrong
        if wrong < whole:
            known = part[finite] if wrong else part
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    warnings: tuple[str, ...] = ()
    if bad:
        if policy.nonfinite == "reject" or bad == count:
            hint = " (--nonfinite replace accepts it)" if bad < count else ""
            raise CaseError("nonfinite", f"{bad} of {count} voxels are NaN or infinite{hint}")
        for start in range(0, count, CHUNK):
            part = flat[start : start + CHUNK]
            part[~np.isfinite(part)] = low
        warnings += (f"nonfinite-replaced:{bad}",)
    if low == high:
        warnings += ("constant",)
    return flat.reshape(head.geometry.shape, order="F"), warnings


def _scale(stored: np.ndarray, head: Head, out: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        if head.slope == 1 and head.inter == 0:
            out[:] = stored
        else:
            out[:] = stored.astype(np.float64) * head.slope + head.inter


def _rest(stream: Stream) -> tuple[str, ...]:
    """Read to the end, so that the checksum is verified; a little behind the voxels is a warning, more a refusal."""
    extra = 0
    while piece := stream.read(CHUNK):
        extra += len(piece)
        if extra > 1 << 20:
            raise CaseError("oversized", "more than 1 MB follow the voxels")
    return (*stream.warnings, *(("trailing-data",) if extra else ()))
