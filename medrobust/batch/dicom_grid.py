"""The gate of a DICOM series: whether its slices are one volume, in which order, and where it lies.

Everything is decided on headers. Voxel axes are columns, rows, slices: (i, j, k) lies at the first slice's position
plus i times the column spacing along a row, j times the row spacing down a column, k steps along the slices' normal
(right-handed). Patient coordinates of DICOM (LPS) become those of NIfTI (RAS). Nothing is resampled, and no geometry is
repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from pydicom._uid_dict import UID_dictionary
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, JPEGExtended12Bit

from medrobust.batch.dicom_header import VOLUMES, Instance, Plane, finite
from medrobust.batch.faults import CaseError
from medrobust.batch.nifti import COPIED, MODALITIES, MOVED, Geometry, Policy

SPACING, ANGLE = 0.01, 0.1
"""Largest deviation of a gap from the others (a share of it), and of the stack from the slices' normal (degrees)."""
UNIT = 2e-3
"""How far cosines may be from unit length and right angles: they are written with as little as three digits."""
HALF = 0.5
"""No slice may lie further than this from its place on the grid, in shortest voxel sides."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A volume made of slices.

    Attributes:
        order: for each slice along the normal, which instance, and which frame of it (from 0).
        geometry: as a NIfTI file would have it; both forms with code 1.
    """

    order: tuple[tuple[int, int], ...]
    geometry: Geometry
    warnings: tuple[str, ...]


def grid_of(instances: Sequence[Instance], policy: Policy) -> Grid:
    """See that instances, each given once, are one volume.

    Raises:
        CaseError: they are not; see the table in ``docs/batch.md``.
    """
    _one_kind(instances, policy)
    rows, columns = instances[0].rows, instances[0].columns
    flat = [(index, frame) for index, one in enumerate(instances) for frame in range(len(one.planes))]
    planes = [instances[index].planes[frame] for index, frame in flat]
    if rows * columns * len(planes) > policy.voxels:
        raise CaseError(
            "too-large", f"expected at most {policy.voxels} voxels, the headers say {rows * columns * len(planes)}"
        )
    if len(planes) < 2:
        raise CaseError("single-slice", "expected a volume, got one slice")
    if min(rows, columns) < 2:
        raise CaseError("flat", f"expected at least 2 voxels a side, got {rows} rows and {columns} columns")
    axes, sides = _plane_axes(planes)
    places = np.array([plane.position for plane in planes])
    order = np.argsort(places @ axes[:, 2], kind="stable")
    step = _step(places[order] @ axes[:, 2])
    lean = places[order[-1]] - places[order[0]]
    along = float(lean @ axes[:, 2])
    angle = float(np.rad2deg(np.arctan2(np.linalg.norm(lean - along * axes[:, 2]), along)))
    if angle > ANGLE:
        raise CaseError("tilted", f"expected slices stacked along their normal, got {angle:.2f} degrees off it")
    lps = np.eye(4)
    lps[:3, :3] = axes * [*sides, step]
    lps[:3, 3] = places[order[0]]
    ideal = lps[:3, 3] + np.arange(len(order))[:, None] * lps[:3, 2]
    moved = float(np.linalg.norm(places[order] - ideal, axis=1).max() / min(*sides, step))
    if moved > HALF:
        raise CaseError("irregular-spacing", f"expected slices on a grid, got one {moved:.2g} voxels off it")
    warnings = (*(("slices-moved",) if moved > MOVED else ()), *(() if instances[0].series else ("no-series-uid",)))
    return Grid(
        order=tuple(flat[index] for index in order),
        geometry=_geometry(lps, (columns, rows, len(order))),
        warnings=(*warnings, *_numbers(instances)),
    )


def _one_kind(instances: Sequence[Instance], policy: Policy) -> None:
    first = instances[0]
    wanted = policy.modalities or MODALITIES
    for one in instances:
        if one.sop_class not in VOLUMES or one.modality not in wanted:
            raise CaseError("modality", f"expected slices of {', '.join(wanted)}, got another kind of image")
        if "LOCALIZER" in one.image_type:
            raise CaseError("localizer", "expected a scan, got a localizer")
        if one.rows < 1 or one.columns < 1:
            raise CaseError("truncated", "a file ends before its header says how many rows and columns it has")
        if one.samples != 1 or one.photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise CaseError("colour", "expected one grey value a voxel, got colour or a palette")
        if one.lut:
            raise CaseError("bad-scaling", "expected a rescale slope and intercept, got a lookup table")
        if one.frames != len(one.planes) or not (one.multiframe or one.frames == 1):
            raise CaseError("bad-dicom", f"the header says {one.frames} frames and places {len(one.planes)}")
        same = (one.study, one.series, one.frame_of_reference, one.modality, one.sop_class)
        if same != (first.study, first.series, first.frame_of_reference, first.modality, first.sop_class):
            raise CaseError("mixed-series", "expected one series, got slices of several")
        if (one.rows, one.columns) != (first.rows, first.columns):
            raise CaseError(
                "mixed-size",
                f"expected {first.rows} rows and {first.columns} columns, got {one.rows} and {one.columns}",
            )
        if not decodable(one.syntax):
            raise CaseError(
                "compressed",
                "no decoder for this compression is installed: pip install python-gdcm, or decompress the files first",
            )
    if first.multiframe and len(instances) > 1:
        raise CaseError("mixed-series", f"expected one multi-frame file, got {len(instances)}")


def decodable(syntax: str) -> bool:
    """Whether pixels written this way can be decoded here."""
    if UID_dictionary.get(syntax, ("", ""))[1] != "Transfer Syntax":
        return False
    uid = UID(syntax)
    if not uid.is_encapsulated:
        return True
    try:
        able = set(get_decoder(uid).available_plugins)
    except NotImplementedError:
        return False
    return bool(able & {"pylibjpeg"} if uid == JPEGExtended12Bit else able)  # the others decode 8 of its 12 bits


def _plane_axes(planes: Sequence[Plane]) -> tuple[np.ndarray, tuple[float, float]]:
    """Orthonormal axes as columns (along a row, down a column, normal), and the sides in these two directions."""
    first = planes[0]
    for plane in planes:
        if (len(plane.position), len(plane.orientation), len(plane.spacing)) != (3, 6, 2):
            raise CaseError("no-geometry", "a slice does not say where it lies (position, orientation, pixel spacing)")
        if not finite((*plane.position, *plane.orientation, *plane.spacing)) or np.abs(plane.position).max() > 1e6:
            raise CaseError("no-geometry", "the place of a slice is no finite number of mm")
        if min(plane.spacing) <= 1e-4 or max(plane.spacing) >= 1e4:
            raise CaseError("bad-spacing", f"expected voxel sides above 0 mm, got {list(plane.spacing)}")
        if not finite((plane.slope, plane.inter)) or plane.slope == 0:
            raise CaseError("bad-scaling", "the rescale slope is 0, or not finite")
        if not np.allclose(plane.spacing, first.spacing, rtol=1e-3):
            raise CaseError("mixed-size", "expected the same pixel spacing in all slices")
        if max(_turn(plane.orientation, first.orientation)) > ANGLE:
            raise CaseError("mixed-series", "expected parallel slices, got some that are turned")
    along, down = (np.array(half) for half in (first.orientation[:3], first.orientation[3:]))
    off = np.array([np.linalg.norm(along) - 1, np.linalg.norm(down) - 1, along @ down])
    if np.abs(off).max() > UNIT:
        raise CaseError("bad-affine", "expected rows and columns at right angles, each a direction of length 1")
    along = along / np.linalg.norm(along)
    down = down - (down @ along) * along
    down = down / np.linalg.norm(down)
    axes = np.stack([along, down, np.cross(along, down)], axis=1)
    return axes, (first.spacing[1], first.spacing[0])


def _turn(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """About how many degrees rows and columns are turned."""
    apart = np.reshape(np.subtract(one, other), (2, 3))
    rows, columns = np.rad2deg(np.linalg.norm(apart, axis=1))
    return float(rows), float(columns)


def _step(heights: np.ndarray) -> float:
    """The slices' distance, of their sorted heights."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if gaps.min() < max(SPACING * usual, 1e-3):
        raise CaseError("duplicate-slice", f"expected one slice a place, got {len(heights)} of which some share theirs")
    shares = gaps / usual
    if (np.abs(shares - 1) > SPACING).any():
        missing = np.round(shares)
        if (np.abs(shares - missing) < 5 * SPACING).all() and missing.min() >= 1 and missing.max() > 1:
            raise CaseError("missing-slice", f"{int(missing.sum()) - len(gaps)} slices are missing between others")
        raise CaseError(
            "irregular-spacing", f"expected even gaps, got {gaps.min():.4g} to {gaps.max():.4g} mm between slices"
        )
    return float(heights[-1] - heights[0]) / len(gaps)


def _numbers(instances: Sequence[Instance]) -> tuple[str, ...]:
    """A series that lost its first or last slices looks like a shorter one; its numbers may tell."""
    numbers = sorted({int(one.number) for one in instances if one.number.isdecimal() and len(one.number) < 9})
    whole = len(numbers) == len(instances) and numbers[-1] - numbers[0] == len(numbers) - 1 and numbers[0] <= 1
    return () if whole or len(instances) == 1 else ("numbers-missing",)


def _geometry(lps: np.ndarray, shape: tuple[int, int, int]) -> Geometry:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    return Geometry(
        shape=shape,
        affine=np.asarray(header.get_sform(), dtype=np.float64),
        version=1,
        pixdim=np.array(header["pixdim"])[:4],
        fields={name: np.array(header[name]) for name in COPIED},
    )
