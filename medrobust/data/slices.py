"""Axial slices of NIfTI volumes as images: right, anterior, superior; intensities scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.filebasedimages import ImageFileError

ENDINGS = (".nii", ".nii.gz")


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether a file's name is that of a NIfTI volume."""
    return str(path).lower().endswith(ENDINGS)


def load_slice(path: str | PathLike[str], index: int, *, window: tuple[float, float]) -> MetaTensor:
    """One slice (1, H, W), float32 in [0, 1], from right to left and posterior to anterior, with its volume's affine.

    Args:
        path: of a volume (X, Y, Z) in any orientation.
        index: counted from the inferior end.
        window: intensities that become 0 and 1, such as HU; what lies outside is clipped.

    Raises:
        OSError: no such file, or no volume in it.
        ValueError: not three axes, no such slice, an empty window, or NaN.
    """
    low, high = window
    if not low < high:
        raise ValueError(f"expected a window from low to high, got {window}")
    plane, affine = _plane(path, index)
    if not np.isfinite(plane).all():
        raise ValueError(f"expected finite intensities in {Path(path).name}, got NaN or infinity")
    scaled = ((plane.astype(np.float32) - low) / (high - low)).clip(0, 1)
    return _tensor(scaled, affine, path)


def load_slice_map(path: str | PathLike[str], index: int) -> MetaTensor:
    """One slice (1, H, W) of a label map, float32 of whole numbers; arguments and errors as above."""
    plane, affine = _plane(path, index)
    return _tensor(plane.astype(np.float32), affine, path)


def load_slice_mask(path: str | PathLike[str], index: int, *, values: Collection[int]) -> MetaTensor:
    """The mask (1, H, W), float32, 1 where the label map has one of ``values``; arguments and errors as above."""
    plane, affine = _plane(path, index)
    return _tensor(np.isin(plane, list(values)).astype(np.float32), affine, path)


def count(path: str | PathLike[str]) -> int:
    """How many axial slices a volume has."""
    return _volume(str(path))[0].shape[2]


def load_volume_ras(path: str | PathLike[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A volume (X, Y, Z) as right, anterior, superior, and its affine (4, 4); not to be written to."""
    return _volume(str(path))


def _plane(path: str | PathLike[str], index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    volume, affine = _volume(str(path))
    if not 0 <= index < volume.shape[2]:
        raise ValueError(f"expected a slice from 0 to {volume.shape[2] - 1} of {Path(path).name}, got {index}")
    moved = affine.copy()
    moved[:, 3] = affine @ [0, 0, index, 1]
    return volume[:, :, index], moved


def _tensor(plane: np.ndarray[Any, Any], affine: np.ndarray[Any, Any], path: str | PathLike[str]) -> MetaTensor:
    meta = {"filename_or_obj": str(path)}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(plane[None])), affine=affine, meta=meta)


# Image and mask of the case at hand, and of its neighbour: a list goes through a volume slice by slice.
@lru_cache(maxsize=4)
def _volume(path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        image: Any = nib.load(path)
        if len(image.shape) != 3:
            raise ValueError(f"expected a volume of three axes in {Path(path).name}, got {image.shape}")
        upright = nib.as_closest_canonical(image)
        volume, affine = np.asarray(upright.dataobj), np.asarray(upright.affine)
    except (ImageFileError, EOFError) as error:
        raise OSError(f"expected a whole NIfTI volume in {Path(path).name}, got: {error}") from error
    volume.setflags(write=False)
    return volume, affine
