"""Split cases into training and validation by patient, and check a split before hours are spent on it.

Two scans of one heart, or two slices of one body, are nearly the same case: with one in training and the other in
validation, the score says how well the network remembers. Cases are dictionaries as MONAI's data lists hold them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, GroupShuffleSplit

Case = Mapping[str, Any]
FILES = ("image", "label")


def split(
    cases: Sequence[Case],
    *,
    by: str = "patient",
    folds: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
) -> list[tuple[list[Case], list[Case]]]:
    """Pairs of training and validation cases, so that no patient is in both lists of a pair.

    Args:
        cases: each with the key ``by``, in any order; every list of the result keeps it.
        by: which key tells patients apart. ``"image"`` splits by image, where no patient has two.
        folds: as many pairs, in which each patient is in validation once; the lists are of nearly equal length.
        val_fraction: instead of folds, one pair with this share of the **patients** in validation, in (0, 1).
        seed: of the shuffle of the patients.

    Raises:
        ValueError: not exactly one of ``folds`` and ``val_fraction``, cases without the key, or too few patients.
    """
    if (folds is None) == (val_fraction is None):
        raise ValueError(f"expected either folds or val_fraction, got folds={folds} and val_fraction={val_fraction}")
    without = sum(by not in case for case in cases)
    if without:
        raise ValueError(
            f"expected every case to have {by!r}, got {without} of {len(cases)} without: add it, or pass by='image' "
            "if no two cases are of one patient"
        )
    _, groups = np.unique([str(case[by]) for case in cases], return_inverse=True)
    patients = len(set(groups.tolist()))
    if folds is not None:
        if not 2 <= folds <= patients:
            raise ValueError(f"expected 2 or more folds and at most one for each of {patients} {by!r}, got {folds}")
        # GroupKFold takes groups of one size in the order of their numbers: new numbers are the shuffle.
        groups = np.random.default_rng(seed).permutation(patients)[groups]
        pairs = GroupKFold(n_splits=folds).split(groups, groups=groups)
    elif val_fraction is not None:
        if not 0 < val_fraction < 1 or math.ceil(val_fraction * patients) >= patients:
            raise ValueError(
                f"expected val_fraction in (0, 1) that leaves some of {patients} {by!r} to training, got {val_fraction}"
            )
        splitter = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
        pairs = splitter.split(groups, groups=groups)
    return [([cases[i] for i in first], [cases[i] for i in second]) for first, second in pairs]


def check(
    training: Sequence[Case], validation: Sequence[Case], *, by: str = "patient", keys: Sequence[str] = FILES
) -> None:
    """Raise if a file is missing or a patient is in both lists; to be called before a training starts.

    Files are what a case has under ``keys``: a path or several, of files or of DICOM folders. Patients
    are compared by the key ``by``; an image in both lists is found whether its cases have that key or not. Messages
    name files without their folders.

    Raises:
        ValueError: a list is empty, or the lists share patients or images; says what is missing, too.
        FileNotFoundError: files are missing, and nothing else is wrong.
    """
    lists = {"training": training, "validation": validation}
    empty = [f"no {name} cases" for name, cases in lists.items() if not cases]
    patients = [{str(case[by]) for case in cases if by in case} for cases in lists.values()]
    images = [{os.path.realpath(path) for path in _paths(cases, "image")} for cases in lists.values()]
    leaks = [
        *_sample(f"values of {by!r} in both lists", patients[0] & patients[1]),
        *_sample("images in both lists", [Path(path).name for path in images[0] & images[1]]),
    ]
    files = {path for cases in lists.values() for key in keys for path in _paths(cases, key)}
    missing = _sample("files missing", [path.name for path in files if not path.exists()])
    if not (empty or leaks or missing):
        return
    advice = ["complete the data folder or correct the paths"] if missing else []
    advice += ["split the cases by patient, as medrobust.data.splits.split does"] if empty or leaks else []
    message = (
        f"expected {len(training)} training and {len(validation)} validation cases, whole and of different patients, "
        f"got {'; '.join([*empty, *leaks, *missing])}. Before training, {' and '.join(advice)}"
    )
    raise ValueError(message) if empty or leaks else FileNotFoundError(message)


def _paths(cases: Sequence[Case], key: str) -> Iterator[Path]:
    for case in cases:
        value = case.get(key, ())
        several = (value,) if isinstance(value, str | os.PathLike) else value
        yield from (Path(one) for one in several)


def _sample(what: str, names: Collection[str]) -> list[str]:
    """One phrase with the count and the first names, or none."""
    if not names:
        return []
    first = ", ".join(sorted(names)[:3])
    return [f"{len(names)} {what} ({first}{', ...' if len(names) > 3 else ''})"]
