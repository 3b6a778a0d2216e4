"""Two real CT exams and one MR exam with organ masks, from the TotalSegmentator source archive (Apache-2.0).

``CT A`` (abdomen and pelvis, no contrast agent, 3 mm) is for training, ``CT B`` (another exam: contrast agent, arms
down, 20 slices of 2 mm, a DICOM series) for evaluation, ``MR D`` (abdominal MR) as a modality shift. All reference
masks are the output of TotalSegmentator, not of a human: numbers against them measure agreement with that model.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from medrobust.atomic import replacing, write_text
from medrobust.data.archive import SourceArchive, cache_folder, extract

ARCHIVE = SourceArchive(
    name="totalsegmentator",
    version="2.18.0",
    sha256="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
)
INSIDE = "totalsegmentator-2.18.0/tests/reference_files"
SLICES = 20

CLASSES = ("background", "liver", "aorta", "bones", "back muscles")
"""Structures that one scan can teach and that both CT exams show."""

STRUCTURES: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "aorta": (52,),
    "bones": (*range(25, 51), *range(69, 79), *range(91, 117)),
    "back muscles": (86, 87),
}
"""Ids of TotalSegmentator's ``total`` task that make up each class (bones: sacrum, spine, limbs, hips, skull, ribs)."""

MR_STRUCTURES: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "aorta": (23,),
    "bones": (18, 19, *range(30, 40)),
    "back muscles": (46, 47),
}
"""The same for the ``total_mr`` task (other ids): sacrum, vertebrae, limbs, hips."""


def folder() -> Path:
    """Where the prepared data set lies."""
    return cache_folder() / "ct_organs"


def prepare(target: Path | None = None) -> Path:
    """Fetch the archive (38 MB, once) and write ``dataset.json`` with its NIfTI files; return the folder.

    Images keep their own grid and Hounsfield units. A second call does nothing and needs no network.
    """
    target = target or folder()
    listing = target / "dataset.json"
    if listing.is_file() and json.loads(listing.read_text(encoding="utf-8")) == _dataset():
        return target
    archive = ARCHIVE.fetch(cache_folder() / "archives")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".prepare-") as work:
        raw = Path(work)
        slices = [f"example_ct_dicom/{name}" for name in _dicom_names(archive)]
        names = ["example_ct.nii.gz", "example_seg_fast_force_split.nii.gz", "example_seg_dicom.nii.gz", *slices]
        names += ["example_mr_sm.nii.gz", "example_seg_mr.nii.gz"]
        extract(archive, {f"{INSIDE}/{name}": raw / name for name in names})
        _copy(raw / "example_ct.nii.gz", target / "ct_a.nii.gz")
        _copy(raw / "example_seg_fast_force_split.nii.gz", target / "ct_a_structures.nii.gz", np.uint8)
        _merge(raw / "example_seg_fast_force_split.nii.gz", target / "ct_a_label.nii.gz", STRUCTURES)
        _read_series(raw / "example_ct_dicom", target / "ct_b.nii.gz")
        _merge(raw / "example_seg_dicom.nii.gz", target / "ct_b_label.nii.gz", STRUCTURES)
        _copy(raw / "example_mr_sm.nii.gz", target / "mr_d.nii.gz")
        _merge(raw / "example_seg_mr.nii.gz", target / "mr_d_label.nii.gz", MR_STRUCTURES)
    write_text(target / "dataset.json", json.dumps(_dataset(), indent=2) + "\n")
    return target


def dicom_slices(target: Path) -> list[Path]:
    """Write the DICOM series that CT B was made of (20 files, JPEG 2000) into ``target``; fetched once."""
    archive = ARCHIVE.fetch(cache_folder() / "archives")
    names = _dicom_names(archive)
    target.mkdir(parents=True, exist_ok=True)
    extract(archive, {f"{INSIDE}/example_ct_dicom/{name}": target / name for name in names})
    return [target / name for name in names]


def cases(section: str, dataset_dir: str | Path | None = None) -> list[dict[str, str]]:
    """The data list of one section (``training``, ``validation`` or ``shift``), with absolute paths.

    Raises:
        FileNotFoundError: the data set was not prepared yet.
    """
    root = Path(dataset_dir) if dataset_dir else folder()
    listing = root / "dataset.json"
    if not listing.is_file():
        raise FileNotFoundError(f"expected the prepared data set in {root}, got no dataset.json: run `medrobust data`")
    found = json.loads(listing.read_text(encoding="utf-8"))
    if section not in found:
        raise ValueError(f"expected a section of {listing.name}, got {section!r}: choose training, validation or shift")
    return [{key: str(root / value) for key, value in case.items()} for case in found[section]]


def _dataset() -> dict[str, Any]:
    ct_a = {"image": "ct_a.nii.gz", "label": "ct_a_label.nii.gz", "structures": "ct_a_structures.nii.gz"}
    return {
        "name": "ct_organs",
        "description": "Real CT and MR exams; reference masks were made by TotalSegmentator",
        "licence": "Apache-2.0 (TotalSegmentator 2.18.0, tests/reference_files)",
        "labels": {str(index): name for index, name in enumerate(CLASSES)},
        "training": [ct_a],
        "validation": [{"image": "ct_b.nii.gz", "label": "ct_b_label.nii.gz"}],
        "shift": [{"image": "mr_d.nii.gz", "label": "mr_d_label.nii.gz"}],
    }


def _dicom_names(archive: Path) -> list[str]:
    prefix = f"{INSIDE}/example_ct_dicom/"
    with tarfile.open(archive, "r:gz") as tar:
        names = sorted(
            entry.name.removeprefix(prefix) for entry in tar if entry.isreg() and entry.name.startswith(prefix)
        )
    if len(names) != SLICES:
        raise ValueError(f"expected {SLICES} DICOM slices in {archive.name}, got {len(names)}: was it altered?")
    return names


def _copy(source: Path, target: Path, dtype: type = np.int16) -> None:
    image = nib.load(source)
    _write(np.asarray(image.dataobj), image.affine, target, dtype)


def _merge(source: Path, target: Path, structures: dict[str, tuple[int, ...]]) -> None:
    image = nib.load(source)
    table = np.zeros(256, dtype=np.uint8)
    for value, name in enumerate(CLASSES):
        table[list(structures.get(name, ()))] = value
    _write(table[np.asarray(image.dataobj).astype(np.uint8)], image.affine, target, np.uint8)


def _read_series(series: Path, target: Path) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    volume = reader.Execute()
    for key in volume.GetMetaDataKeys():
        volume.EraseMetaData(key)
    with replacing(target) as partial:
        sitk.WriteImage(sitk.Cast(volume, sitk.sitkInt16), str(partial))


def _write(array: np.ndarray, affine: np.ndarray, target: Path, dtype: type) -> None:
    image = nib.Nifti1Image(np.ascontiguousarray(array, dtype=dtype), affine)
    image.header.set_xyzt_units("mm")
    with replacing(target) as partial:
        nib.save(image, partial)
