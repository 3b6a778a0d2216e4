"""The data list of ACDC cardiac cine MRI: end diastole and end systole of each patient, with three structures.

The scans come from https://www.creatis.insa-lyon.fr/Challenge/acdc/ after registration, one folder a patient::

    patient001/Info.cfg                     ED: 1, ES: 12, ... (which frames are end diastole and end systole)
    patient001/patient001_frame01.nii.gz    and patient001_frame01_gt.nii.gz, its label
    patient001/patient001_4d.nii.gz         the whole cine, not used here

The patients' folders may lie in ``training`` (1 to 100) and ``testing`` (101 to 150), or all in one folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from monai.data import load_decathlon_datalist

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")

PHASES = ("ED", "ES")

VALIDATION = (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)
SECTIONS: dict[str, tuple[int, ...]] = {
    "training": tuple(number for number in range(1, 101) if number not in VALIDATION),
    "validation": VALIDATION,
    "testing": tuple(range(101, 151)),
}
"""Patient numbers: UNETR++'s 80 / 20 of the training folder. Its paper reports on ``validation``: choose nothing by
looking at it. ``testing`` is the challenge's own."""

_PATIENT = re.compile(r"patient\d{3}")


def folder() -> Path:
    """Where the scans are expected: the environment variable ``MEDROBUST_ACDC``, else ``data/acdc`` where you are."""
    return Path(os.environ.get("MEDROBUST_ACDC") or Path("data") / "acdc").expanduser()


def cases(dataset_dir: str | Path) -> list[dict[str, str]]:
    """Two cases a patient, end diastole first: ``{"image": path, "label": path, "patient": "patient001"}``.

    Takes every patient below ``dataset_dir``, in the order of their numbers. Every file is checked to exist.

    Raises:
        FileNotFoundError: there is no patient, or a file of one is missing.
        ValueError: an ``Info.cfg`` does not name the frames, or a patient is there twice.
    """
    return _cases(_patients(dataset_dir))


def datalist(
    dataset_dir: str | Path, section: str = "training", listing: str | Path | None = None
) -> list[dict[str, str]]:
    """The cases of one section, every file of them checked to exist.

    Args:
        dataset_dir: folder with the patients' folders, or with ``training`` and ``testing``.
        section: ``"training"``, ``"validation"`` or ``"testing"``, or any section of ``listing``.
        listing: another split, as a Medical Segmentation Decathlon style JSON with paths relative to ``dataset_dir``.
            A case without ``patient`` gets the one that its image is named after.

    Raises:
        FileNotFoundError: a patient of the section, or a file of one, is missing.
        ValueError: there is no such section, or an ``Info.cfg`` does not name the frames.
    """
    if listing is not None:
        found = load_decathlon_datalist(listing, is_segmentation=True, data_list_key=section, base_dir=dataset_dir)
        _exist(found)
        return [{**_named_after(case["image"]), **case} for case in found]
    if section not in SECTIONS:
        raise ValueError(f"expected a section among {', '.join(SECTIONS)}, got {section!r}")
    wanted = [f"patient{number:03d}" for number in SECTIONS[section]]
    there = [patient for patient in _patients(dataset_dir) if patient.name in wanted]
    missing = sorted(set(wanted) - {patient.name for patient in there})
    if missing:
        raise FileNotFoundError(
            f"expected the {len(wanted)} patients of section {section!r}, got {len(missing)} of them missing "
            f"({_few(missing)}). Complete the folder or pass a listing of your own split"
        )
    return _cases(there)


def _patients(dataset_dir: str | Path) -> list[Path]:
    inside = (path for pattern in ("*", "training/*", "testing/*") for path in Path(dataset_dir).glob(pattern))
    found = sorted((path for path in inside if path.is_dir() and _PATIENT.fullmatch(path.name)), key=lambda p: p.name)
    if not found:
        raise FileNotFoundError(
            "expected ACDC's folders patient001, patient002, ... in the data folder, its training or its testing, got "
            "none: set dataset_dir or MEDROBUST_ACDC"
        )
    names = [path.name for path in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected every patient once, got {_few(twice)} twice: remove the other folder")
    return found


def _cases(patients: list[Path]) -> list[dict[str, str]]:
    found = [
        {
            "image": str(patient / f"{patient.name}_frame{frame:02d}.nii.gz"),
            "label": str(patient / f"{patient.name}_frame{frame:02d}_gt.nii.gz"),
            "patient": patient.name,
        }
        for patient in patients
        for frame in _frames(patient)
    ]
    _exist(found)
    return found


def _frames(patient: Path) -> list[int]:
    """Frame numbers of end diastole and end systole, counted from 1."""
    info = patient / "Info.cfg"
    if not info.is_file():
        raise FileNotFoundError(f"expected {patient.name}/Info.cfg, got no such file: copy the patient's folder whole")
    pairs = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    values = {key.strip(): value.strip() for key, _, value in pairs}
    wrong = [f"{phase}: {values.get(phase, 'nothing')}" for phase in PHASES if not values.get(phase, "").isdecimal()]
    if wrong:
        raise ValueError(
            f"expected a frame number for ED and for ES in {patient.name}/Info.cfg, got {', '.join(wrong)}: "
            "was the file altered?"
        )
    return [int(values[phase]) for phase in PHASES]


def _named_after(image: str) -> dict[str, str]:
    named = _PATIENT.match(Path(image).name)
    return {"patient": named.group()} if named else {}


def _exist(found: list[dict[str, str]]) -> None:
    files = [Path(case[key]) for case in found for key in ("image", "label") if key in case]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected {len(found)} cases with all their files, got {len(missing)} files missing ({_few(missing)}). "
            "Complete the folder, or pass a listing of the cases that you have"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
