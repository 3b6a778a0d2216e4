"""Read a DICOM series as one volume, without trusting it: all of it or a reason, slice by slice.

Headers pass the gate (``dicom_grid``) before a pixel is decoded. Then each file is read once: the bytes that are hashed
are the bytes that are decoded. Values are those of the rescale slope and intercept of each slice (Hounsfield units for
CT); what a scanner put outside its field of view (pixel padding) stays as it is, with a warning.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID, RLELossless

from medrobust.batch.dicom_codestream import check
from medrobust.batch.dicom_grid import Grid, grid_of
from medrobust.batch.dicom_header import LARGEST, Instance, broken, instance_of, quiet, read_header, transfer_syntax
from medrobust.batch.faults import CaseError
from medrobust.batch.nifti import Head, Policy, Scan
from medrobust.batch.nifti import sha256_of as sha256_of_file
from medrobust.batch.stream import CHUNK, Stream

TRAILING = 1 << 20


def read(files: Sequence[Path], policy: Policy | None = None) -> Scan:
    """Read the files of one series, in any order; links are not followed.

    An instance that is there twice, with the same pixels at the same place, counts once.

    Raises:
        CaseError: the series is refused; the message holds numbers and fixed words only.
    """
    policy = policy or Policy()
    instances, grid = gate(files, policy)
    uids = list(instances)
    places: dict[str, list[tuple[int, int]]] = {uid: [] for uid in uids}
    for slot, (index, frame) in enumerate(grid.order):
        places[uids[index]].append((frame, slot))
    volume = np.empty(grid.geometry.shape, dtype=np.float32, order="F")
    hashes: list[str] = []
    warnings: dict[str, None] = dict.fromkeys(grid.warnings)
    size = 0
    for uid, (instance, paths) in instances.items():
        pixels = ""
        for path in paths:
            blob, digest = _blob(path, instance)
            hashes.append(digest)
            size += len(blob)
            found = _parsed(blob, instance)
            del blob
            own = hashlib.sha256(found.PixelData).hexdigest() if len(paths) > 1 else ""
            if pixels and own != pixels:
                raise CaseError("duplicate-slice", "two files are the same instance with different pixels")
            if path is paths[0]:
                with quiet():
                    _fill(volume, found, instance, places[uid], warnings)
            pixels = own
    low, high = _finite(volume, policy, warnings)
    if low == high:
        warnings["constant"] = None
    return Scan(volume=volume, geometry=grid.geometry, sha256=_joined(hashes), size=size, warnings=tuple(warnings))


def read_head(files: Sequence[Path], policy: Policy | None = None) -> Head:
    """Only the headers of a series, with all checks that need no voxels.

    Raises:
        CaseError: the series is refused.
    """
    _, grid = gate(files, policy or Policy())
    return Head(
        geometry=grid.geometry, dtype=np.dtype(np.float32), offset=0, slope=1.0, inter=0.0, warnings=grid.warnings
    )


def sha256_of(files: Sequence[Path]) -> str:
    """What a series is known by: the SHA-256 of its files' SHA-256, whatever they are called and how often they are.

    Raises:
        CaseError: a file cannot be read.
    """
    return _joined([sha256_of_file(path) for path in files])


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


def gate(files: Sequence[Path], policy: Policy) -> tuple[dict[str, tuple[Instance, list[Path]]], Grid]:
    """Each instance with the files that hold it, and the grid that they make."""
    if not files:
        raise CaseError("empty", "expected the files of a series, got none")
    found: dict[str, tuple[Instance, list[Path]]] = {}
    for path in files:
        one = read_header(path)
        known, paths = found.setdefault(one.uid, (one, []))
        if one != known:
            raise CaseError("duplicate-slice", "two files are the same instance with different headers")
        paths.append(path)
    return found, grid_of([one for one, _ in found.values()], policy)


def _blob(path: Path, instance: Instance) -> tuple[bytes, str]:
    most = 2 * _expected(instance) + LARGEST + TRAILING
    with Stream(path, sniff=False) as stream:
        if stream.size > most:
            raise CaseError("oversized", f"expected at most {most} bytes of file, got {stream.size}")
        blob = b"".join(iter(lambda: stream.read(CHUNK), b""))
        stream.check_unchanged()
        return blob, stream.digest.hexdigest()


def _parsed(blob: bytes, instance: Instance) -> Dataset:
    """The data set with its pixels, seen to be the one that passed the gate."""
    try:
        with quiet():
            syntax = transfer_syntax(blob)
            found = pydicom.dcmread(io.BytesIO(blob))
            same = instance_of(found, syntax) == instance
            whole = isinstance(found.get("PixelData"), bytes)
    except (CaseError, MemoryError):
        raise
    except Exception as error:
        raise broken(error) from None
    if not same:
        raise CaseError("changed", "the file was written to while it was read", kind="failed")
    if not whole:
        raise CaseError("truncated", "a file ends before its pixels do")
    return found


def _expected(instance: Instance) -> int:
    """Bytes of pixels when they are not compressed."""
    return instance.rows * instance.columns * instance.frames * max(instance.allocated, 8) // 8


def _fill(
    volume: np.ndarray,
    found: Dataset,
    instance: Instance,
    places: Sequence[tuple[int, int]],
    warnings: dict[str, None],
) -> None:
    """Put an instance's frames into their slots."""
    if not UID(instance.syntax).is_encapsulated:
        extra = len(found.PixelData) - _expected(instance)
        if extra < 0:
            raise CaseError("truncated", f"expected {_expected(instance)} bytes of pixels, the file lacks {-extra}")
        if extra > TRAILING:
            raise CaseError("oversized", "more than 1 MB follow the pixels")
        if extra > 1:
            warnings["trailing-data"] = None
    slots = dict(places)
    done = 0
    for frame, plane in enumerate(_decoded(found, instance)):
        if frame not in slots or plane.shape != (instance.rows, instance.columns):
            raise CaseError("bad-dicom", "the pixels are not the rows, columns and frames that the header says")
        scaling = instance.planes[frame]
        with np.errstate(all="ignore"):
            volume[:, :, slots[frame]] = (plane.astype(np.float64) * scaling.slope + scaling.inter).T
        if instance.padding is not None:
            low, high = instance.padding
            if ((plane >= low) & (plane <= high)).any():
                warnings["padding"] = None
        done += 1
    if done != len(slots):
        raise CaseError("truncated", f"expected {len(slots)} frames, got {done}")


def _decoded(found: Dataset, instance: Instance) -> Iterator[np.ndarray]:
    try:
        if UID(instance.syntax).is_encapsulated and instance.syntax != RLELossless:
            check(found.PixelData, instance.rows, instance.columns, instance.frames)
        yield from iter_pixels(found, raw=True)
    except (CaseError, MemoryError):
        raise
    except Exception as error:
        raise CaseError("corrupt", f"the pixels cannot be decoded ({type(error).__name__})") from None


def _finite(volume: np.ndarray, policy: Policy, warnings: dict[str, None]) -> tuple[float, float]:
    """Smallest and largest value; slopes can make infinities of whole numbers."""
    bad, low, high = 0, np.inf, -np.inf
    for plane in volume.T:
        finite = np.isfinite(plane)
        bad += plane.size - int(finite.sum())
        if finite.any():
            low, high = min(low, float(plane[finite].min())), max(high, float(plane[finite].max()))
    if bad:
        if policy.nonfinite == "reject" or bad == volume.size:
            raise CaseError("nonfinite", f"{bad} of {volume.size} voxels are NaN or infinite")
        volume[~np.isfinite(volume)] = low
        warnings[f"nonfinite-replaced:{bad}"] = None
    return low, high
