"""A tree of studies for the batch's tests, and how two OUTPUT folders are compared."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import small_bundle

CANARIES = ("DOE^JOHN", "19700101", "CANARY-MRN-42", "canary-secret")
VOLATILE = ("attempt", "attempts", "measured")
SHEARED = np.array([[0.0, 2.0, 0.9, -5.0], [1.5, 0.0, 0.0, 3.0], [0.0, 0.0, 3.0, 8.0], [0.0, 0.0, 0.0, 1.0]])


def make(root: Path, sound: int = 5, broken: bool = True) -> Path:
    """``sound`` studies of different sizes and three broken ones; names and headers hold canaries."""
    rng = np.random.default_rng(0)
    for number in range(sound):
        folder = root / f"DOE^JOHN_{number}" / "study_19700101" / f"1.2.3.{number}"
        folder.mkdir(parents=True)
        array = rng.integers(-1000, 1000, (12, 10 + number % 3, 11), dtype=np.int16)
        write(folder / "CANARY-MRN-42.nii.gz", array)
    if broken:
        for name in ("cut", "nan", "shear"):
            (root / f"DOE^JOHN_{name}").mkdir()
        path = root / "DOE^JOHN_cut" / "ct.nii.gz"
        write(path, rng.integers(-1000, 1000, (12, 12, 12), dtype=np.int16))
        path.write_bytes(path.read_bytes()[:-700])
        array = np.zeros((12, 12, 12), dtype=np.float32)
        array[5, 5, 5] = np.nan
        write(root / "DOE^JOHN_nan" / "ct.nii", array)
        write(root / "DOE^JOHN_shear" / "ct.nii.gz", np.zeros((12, 12, 12), dtype=np.int16), SHEARED)
    return root


def write(path: Path, array: np.ndarray, affine: np.ndarray = small_bundle.AFFINE) -> None:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=0 if affine is SHEARED else 1, strip_shears=True)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["db_name"], image.header["aux_file"] = (
        b"CANARY-MRN-42",
        b"DOE^JOHN",
        b"19700101",
    )
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"canary-secret"))
    nib.save(image, path)


def contents(output: Path) -> dict[str, str | bytes]:
    """Every file of an OUTPUT outside ``.state``, without what differs from run to run (times, tries, memory)."""
    found: dict[str, str | bytes] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if not path.is_file() or name.startswith(".state/") or name in ("report.html",):
            continue
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            dropped = (*VOLATILE, "seconds", "peak_mb")
            found[name] = json.dumps({key: value for key, value in content.items() if key not in dropped})
        elif name in ("cases.csv", "failures.csv"):
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            dropped = ("seconds", "peak_mb", "attempts")
            found[name] = str([{key: value for key, value in row.items() if key not in dropped} for row in rows])
        else:
            found[name] = path.read_bytes()
    return found


def leaks(folder: Path) -> list[str]:
    """Files that hold a canary, in their name, their bytes or what is compressed in them."""
    found = []
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if data[:2] == b"\x1f\x8b":
            data += gzip.decompress(data)
        text = path.relative_to(folder).as_posix().encode() + data
        found += [f"{path.name}: {word}" for word in CANARIES if word.encode() in text]
    return found
