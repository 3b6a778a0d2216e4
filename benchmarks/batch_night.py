"""``medrobust batch`` against bare MONAI bundle inference over the same files, and the search through 10,000 files.

Both segment the same volumes (CT A with 488 x 404 x 224 voxels, as large as a clinical exam) with the shipped UNETR,
one at a time, in the same run, turn about. Time of a volume is what a run of many takes more than a run of few, so that
starting up does not count. Memory is the largest sum over all processes of a run, shared pages counted once (PSS).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medrobust.batch.discovery import discover
from medrobust.data import ct_organs

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "ct_organs_unetr"
FEW, MANY = 1, 3
FINER = (4, 4, 2)
FILES = 10_000


def volumes(folder: Path, count: int) -> None:
    """Write CT A, finer, with other noise in each."""
    scan = nib.load(ct_organs.folder() / "ct_a.nii.gz")
    array = np.asarray(scan.dataobj, dtype=np.float32)
    for axis, times in enumerate(FINER):
        array = array.repeat(times, axis)
    affine = scan.affine @ np.diag([*(1 / times for times in FINER), 1.0])
    for number in range(count):
        noise = np.random.default_rng(number).normal(0, 10, array.shape)
        image = nib.Nifti1Image(np.clip(array + noise, -1024, 3071).astype(np.int16), affine)
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        image.header.set_xyzt_units("mm")
        path = folder / f"patient{number}" / "ct.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(image, path)


def measured(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and the largest memory in MB of a command with all its processes."""
    begin, peak = time.perf_counter(), 0.0
    with (folder / "log").open("ab") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=BUNDLE) as run:
        while run.poll() is None:
            peak = max(peak, sum(_pss(process) for process in _family(run.pid)))
            time.sleep(0.1)
    if run.returncode:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return time.perf_counter() - begin, peak


def _family(root: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, left = [root], [root]
    while left:
        parent = left.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        left += children
    return found


def _pss(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def compare(folder: Path, rounds: int) -> None:
    """Print seconds a volume, volumes an hour and memory of both, and the ratios."""
    data = {count: folder / f"in{count}" for count in (FEW, MANY)}
    for count, place in data.items():
        volumes(place, count)
    bare = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    bare += ["--meta_file", "None", "--pattern", "ct.nii.gz"]
    ours = [sys.executable, "-W", "ignore", "-m", "medrobust", "batch"]
    seconds: dict[str, list[float]] = {"bare": [], "batch": []}
    peaks: dict[str, list[float]] = {"bare": [], "batch": []}
    for turn in range(rounds):
        taken: dict[str, dict[int, float]] = {"bare": {}, "batch": {}}
        for count in (FEW, MANY):
            out = folder / "out"
            words = {
                "bare": [*bare, "--dataset_dir", str(data[count]), "--output_dir", str(out)],
                "batch": [*ours, str(data[count]), str(out), "-b", ".", "--private", str(folder / "private"), "-q"],
            }
            for name in ("bare", "batch") if turn % 2 == 0 else ("batch", "bare"):
                taken[name][count], peak = measured(words[name], folder)
                peaks[name].append(peak)
                made = len(list(out.rglob("*seg.nii.gz")))
                if made != count:
                    raise RuntimeError(f"expected {count} segmentations by {name}, got {made}")
                shutil.rmtree(out)
        for name, times in taken.items():
            seconds[name].append((times[MANY] - times[FEW]) / (MANY - FEW))
    print(f"{rounds} rounds, {MANY - FEW} volumes each, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)")
    for name in ("bare", "batch"):
        each = statistics.median(seconds[name])
        print(f"{name:6} {each:7.2f} s a volume, {3600 / each:6.0f} volumes an hour, {max(peaks[name]):6.0f} MB")
    ratio = statistics.median(b / a for a, b in zip(seconds["bare"], seconds["batch"], strict=True))
    print(f"batch / bare: time {ratio:.3f}, memory {max(peaks['batch']) / max(peaks['bare']):.2f}")


def search(folder: Path) -> None:
    """Print the seconds that it takes to find 10,000 files in a tree of patients, studies and series."""
    for number in range(FILES):
        place = folder / f"patient{number // 100}" / f"study{number // 10 % 10}" / f"series{number % 10}"
        place.mkdir(parents=True)
        (place / "ct.nii.gz").touch()
    begin = time.perf_counter()
    found = discover(folder)
    print(f"{len(found)} NIfTI files found in {time.perf_counter() - begin:.2f} s")


def search_dicom(folder: Path) -> None:
    """The same for 100 series of 100 slices, of which every header is read."""
    for number in range(FILES):
        series, index = divmod(number, 100)
        one = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=bytes(128))
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, f"1.2.3.{series}.{index}"
        one.StudyInstanceUID = one.SeriesInstanceUID = one.FrameOfReferenceUID = f"1.2.4.{series}"
        one.Modality, one.ImageType, one.InstanceNumber = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], index
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * index]
        one.PixelSpacing, one.Rows, one.Columns = [1, 1], 4, 4
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 0
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelData = 16, 16, 15, bytes(32)
        path = folder / f"patient{series // 10}" / f"series{series}" / f"{index}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        one.save_as(path, enforce_file_format=True)
    begin = time.perf_counter()
    found = discover(folder)
    print(f"{FILES} DICOM files found, {len(found)} series, in {time.perf_counter() - begin:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    ct_organs.prepare()
    with tempfile.TemporaryDirectory() as folder:
        search(Path(folder) / "tree")
        search_dicom(Path(folder) / "dicom")
        compare(Path(folder), rounds)


if __name__ == "__main__":
    main()
