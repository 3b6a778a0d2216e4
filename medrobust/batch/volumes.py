"""Label maps and adversarial volumes as NIfTI: the input's geometry bit for bit, read back by two other readers."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from medrobust.batch.faults import CaseError
from medrobust.batch.nifti import MOVED, Geometry, Policy, displacement, read

RESEARCH = "medrobust research only - not for diagnosis"
ADVERSARIAL = "medrobust ADVERSARIAL - not for diagnosis"


def write(volume: np.ndarray, path: Path, geometry: Geometry, *, description: str = RESEARCH) -> str:
    """Write (X, Y, Z) as .nii.gz, flush it to the disk, read it back; returns the file's SHA-256.

    The same volume gives the same bytes: the archive holds no time and no name.

    Raises:
        CaseError: the file that was read back is another one.
    """
    if volume.shape != geometry.shape:
        raise CaseError("grid", f"expected a map of shape {geometry.shape}, got {volume.shape}", kind="failed")
    stored = volume.dtype.newbyteorder("<")
    header = geometry.header(stored, description)
    with path.open("wb") as file:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0) as archive:
            archive.write(header.binaryblock + b"\0\0\0\0")
            for start in range(0, volume.shape[2], 16):
                slab = volume[:, :, start : start + 16]
                archive.write(np.asarray(slab, dtype=stored).tobytes(order="F"))
        file.flush()
        os.fsync(file.fileno())
    verify(path, volume, geometry)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(path: Path, volume: np.ndarray, geometry: Geometry) -> None:
    """See with two readers that a file holds ``volume`` at the place that ``geometry`` says.

    They are nibabel and SimpleITK; where SimpleITK cannot read such a file (NIfTI-2, shear), the strict loader.

    Raises:
        CaseError: it does not.
    """
    try:
        _verify(path, volume, geometry)
    except (CaseError, MemoryError):
        raise
    except Exception as error:
        message = f"a reader cannot read what was written ({type(error).__name__})"
        raise CaseError("read-back", message, kind="failed") from error


def _verify(path: Path, volume: np.ndarray, geometry: Geometry) -> None:
    image = nib.load(path, keep_file_open=True)  # else every slab would be decompressed from the start
    header = image.header
    same = all(np.array_equal(header[name], value, equal_nan=True) for name, value in geometry.fields.items())
    if not same or not np.array_equal(header["pixdim"][:4], geometry.pixdim) or image.shape != geometry.shape:
        raise CaseError("read-back", "nibabel reads another geometry than was written", kind="failed")
    if geometry.plain and not np.allclose(image.affine, geometry.affine, atol=1e-5):
        raise CaseError("read-back", "nibabel reads another affine than was written", kind="failed")
    for start in range(0, volume.shape[2], 64):
        if not np.array_equal(image.dataobj[:, :, start : start + 64], volume[:, :, start : start + 64]):
            raise CaseError("read-back", "nibabel reads other voxels than were written", kind="failed")
    if geometry.version == 1 and geometry.plain:
        _verify_itk(path, volume, geometry)
    elif not np.array_equal(read(path, Policy(geometry="lenient")).volume, volume):
        raise CaseError("read-back", "the strict loader reads other voxels than were written", kind="failed")


def _verify_itk(path: Path, volume: np.ndarray, geometry: Geometry) -> None:
    image = sitk.ReadImage(str(path))
    if not np.array_equal(sitk.GetArrayViewFromImage(image), volume.T):
        raise CaseError("read-back", "SimpleITK reads other voxels than were written", kind="failed")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # ITK's x and y point the other way
    if displacement(affine, geometry.affine, geometry.shape) > 2 * MOVED:
        raise CaseError("read-back", "SimpleITK places the file elsewhere", kind="failed")
