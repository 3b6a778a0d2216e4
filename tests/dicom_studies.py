"""Synthetic DICOM series whose every voxel has a known place and value; names, ids and dates are canaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import batch_tree
import numpy as np
from pydicom import Dataset
from pydicom import Sequence as Items
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (0.965925826, 0.258819045, 0.0, -0.24321035, 0.90767337, -0.34202014)
"""Rows turned by 15 degrees, columns tipped by 20: orthonormal to nine digits, as scanners write it."""
CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
SHAPE, SPACING, ORIGIN = (10, 8), (0.8, 0.6, 2.5), (-12.5, 20.25, -300.0)


def voxels(slices: int = 12, shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Stored values (slices, rows, columns), int16, of a series that nobody chose."""
    return np.random.default_rng(seed).integers(0, 2000, (slices, *shape)).astype(np.int16)


def uid_of(*words: object) -> str:
    """A UID that is always the same for the same words."""
    return str(generate_uid(entropy_srcs=[str(word) for word in words]))


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


def common(modality: str, patient: str, study: str, series: str) -> Dataset:
    """What all instances of a series share."""
    found = Dataset()
    found.PatientName, found.PatientID = patient, batch_tree.CANARIES[2]
    found.PatientBirthDate, found.PatientSex = batch_tree.CANARIES[1], "O"
    found.StudyDate, found.StudyTime, found.StudyID = "20200102", "030405", "7"
    found.AccessionNumber, found.ReferringPhysicianName = batch_tree.CANARIES[3], patient
    found.StudyInstanceUID = uid_of("study", study)
    found.SeriesInstanceUID = uid_of("series", study, series)
    found.FrameOfReferenceUID = uid_of("frame", study)
    found.PositionReferenceIndicator = ""
    found.SeriesNumber, found.AcquisitionNumber = 3, 1
    found.Manufacturer, found.StudyDescription = "", batch_tree.CANARIES[3]
    found.Modality = modality
    return found


def make_series(
    folder: Path,
    *,
    slices: int = 12,
    shape: tuple[int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = ORIGIN,
    tilt: float = 0.0,
    modality: str = "CT",
    patient: str = batch_tree.CANARIES[0],
    study: str = "one",
    series: str = "a",
    stored: np.ndarray | None = None,
    slope: float | Sequence[float] = 1.0,
    intercept: float = -1024.0,
    transfer_syntax: str = ExplicitVRLittleEndian,
    names: str = "IM-{number:04}.dcm",
    change: Callable[[Dataset, int], None] | None = None,
) -> list[Path]:
    """Write a classic series, one file a slice, and return the files in order of the slices' normal.

    Args:
        shape: rows, columns.
        spacing: between rows, between columns, between slices, in mm.
        orientation: cosines of a row, then of a column, in patient coordinates (LPS).
        origin: centre of the first voxel, in mm (LPS).
        tilt: degrees by which the stack leans over the slices' normal, along the columns (a gantry's tilt).
        patient, study, series: words that the names and UIDs are made of.
        stored: values before scaling (slices, rows, columns); int16 or uint16.
        slope: of all slices, or one for each.
        names: file names; ``{number}`` counts from 1, ``{uid}`` is the instance's.
        change: called with each dataset and its index before it is written; a value that it sets wins.
    """
    stored = voxels(slices, shape) if stored is None else stored
    folder.mkdir(parents=True, exist_ok=True)
    step = normal_of(orientation) * spacing[2]
    step = step + np.asarray(orientation[3:]) * np.tan(np.deg2rad(tilt)) * spacing[2]
    paths = []
    for index, plane in enumerate(stored):
        one = common(modality, patient, study, series)
        one.SOPClassUID = CLASSES.get(modality, "1.2.840.10008.5.1.4.1.1.7")
        one.SOPInstanceUID = uid_of("instance", study, series, index)
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.InstanceNumber = index + 1
        one.ImageOrientationPatient = [float(f"{value:.9g}") for value in orientation]
        one.ImagePositionPatient = [float(f"{value:.9g}") for value in np.asarray(origin) + index * step]
        one.PixelSpacing, one.SliceThickness = [spacing[0], spacing[1]], spacing[2]
        one.RescaleSlope = float(slope[index]) if isinstance(slope, Sequence) else float(slope)
        one.RescaleIntercept = intercept
        fill(one, plane)
        if change is not None:
            change(one, index)
        path = folder / names.format(number=index + 1, uid=one.SOPInstanceUID)
        save(one, path, transfer_syntax)
        paths.append(path)
    return paths


def make_enhanced(
    path: Path,
    *,
    stored: np.ndarray,
    spacing: tuple[float, float, float] = SPACING,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = ORIGIN,
    order: Sequence[int] | None = None,
    slope: float = 1.0,
    intercept: float = -1024.0,
    study: str = "one",
    series: str = "enhanced",
    transfer_syntax: str = ExplicitVRLittleEndian,
    change: Callable[[Dataset], None] | None = None,
) -> Path:
    """Write one multi-frame CT; ``order`` says which slice each frame is, else they are in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(range(len(stored))) if order is None else list(order)
    one = common("CT", batch_tree.CANARIES[0], study, series)
    one.SOPClassUID, one.SOPInstanceUID = EnhancedCTImageStorage, uid_of("instance", study, series)
    one.ImageType, one.InstanceNumber = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 1
    one.NumberOfFrames = len(order)
    shared = Dataset()
    shared.PixelMeasuresSequence = Items([_item(PixelSpacing=list(spacing[:2]), SliceThickness=spacing[2])])
    shared.PlaneOrientationSequence = Items([_item(ImageOrientationPatient=list(orientation))])
    scale: dict[str, Any] = {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU"}
    shared.PixelValueTransformationSequence = Items([_item(**scale)])
    one.SharedFunctionalGroupsSequence = Items([shared])
    one.PerFrameFunctionalGroupsSequence = Items()
    for index in order:
        place = np.asarray(origin) + index * spacing[2] * normal_of(orientation)
        frame = Dataset()
        frame.PlanePositionSequence = Items([_item(ImagePositionPatient=[float(f"{value:.9g}") for value in place])])
        one.PerFrameFunctionalGroupsSequence.append(frame)
    fill(one, np.stack([stored[index] for index in order]))
    if change is not None:
        change(one)
    save(one, path, transfer_syntax)
    return path


def fill(one: Dataset, array: np.ndarray) -> None:
    """Give a dataset its pixels: (rows, columns) or (frames, rows, columns)."""
    one.Rows, one.Columns = array.shape[-2:]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
    one.PixelRepresentation = int(array.dtype.kind == "i")
    one.PixelData = array.astype(array.dtype.newbyteorder("<")).tobytes()


def save(one: Dataset, path: Path, transfer_syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a dataset as a DICOM file, compressed if the syntax is."""
    made = FileDataset(str(path), one, file_meta=FileMetaDataset(), preamble=bytes(128))
    made.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if UID(transfer_syntax).is_encapsulated:
        made.compress(transfer_syntax, generate_instance_uid=False)
    else:
        made.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    made.save_as(path, enforce_file_format=True)


def _item(**values: Any) -> Dataset:
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return found
