"""Adversarial volumes on disk: float32 NIfTI that keeps the geometry, and the way back into a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from medrobust.atomic import replacing

DESCRIPTION = "medrobust ADVERSARIAL - not for diagnosis"
"""Written into the header's free text of every adversarial volume."""


def save_volume(
    volume: Tensor,
    path: Path,
    *,
    affine: Any,
    meta: Mapping[str, Any] | None = None,
    description: str = DESCRIPTION,
    dtype: type = np.float32,
) -> None:
    """Write (C, *S) as NIfTI (channels last when there are several); as float32 bit for bit what the network saw.

    Args:
        affine: 4 x 4, voxel to mm, of the volume's own grid.
        meta: of the image it came from; its qform and sform codes and its units are kept. Where both codes are 0 the
            affine would be lost, so the sform gets code 2 (aligned).
        description: at most 79 characters of header text.
        dtype: ``numpy.uint8`` for label maps.

    Raises:
        ValueError: NaN or infinity in the volume, or an affine that is no invertible 4 x 4 matrix.
    """
    meta = meta or {}
    array: np.ndarray = volume.detach().cpu().numpy().astype(dtype)
    array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    matrix = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite voxels for {path.name}, got NaN or infinity: nothing was written")
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise ValueError(f"expected an invertible 4 x 4 affine for {path.name}, got {matrix.tolist()}")
    qform, sform = _code(meta, "qform_code"), _code(meta, "sform_code")
    if qform == sform == 0:
        sform = 2
    image = nib.Nifti1Image(array, matrix)
    image.set_qform(matrix, code=qform)
    image.set_sform(matrix, code=sform)
    image.header["xyzt_units"] = _code(meta, "xyzt_units") or 2
    image.header["descrip"] = description.encode()[:79]
    with replacing(path) as partial:
        nib.save(image, partial)


def load_volume(path: Path, like: Tensor, affine: Any) -> Tensor:
    """Read a volume that :func:`save_volume` wrote and check that it lies on the grid of ``like`` (C, *S).

    Returns:
        (C, *S) float32.

    Raises:
        FileNotFoundError, ValueError: no file, another shape, another place in space, or values that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected the adversarial volume {path.name} in {path.parent}, got no such file")
    image = nib.load(path)
    array = np.asarray(image.dataobj, dtype=np.float32)
    array = array[None] if like.shape[0] == 1 else np.moveaxis(array, -1, 0)
    if array.shape != tuple(like.shape):
        raise ValueError(
            f"expected {path.name} to have shape {tuple(like.shape)}, got {array.shape}: "
            "was it made with another preprocessing?"
        )
    if not np.allclose(image.affine, np.asarray(affine), atol=1e-3):
        raise ValueError(
            f"expected {path.name} on the grid of the clean image, got another affine: is it another case?"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite voxels in {path.name}, got NaN or infinity")
    return torch.from_numpy(np.ascontiguousarray(array))


def stem(path: str) -> str:
    """The file's name without folder and NIfTI ending."""
    name = Path(path).name
    return name.removesuffix(".gz").removesuffix(".nii")


def unused(name: str, used: set[str]) -> str:
    """``name``, numbered if it is among ``used``; it joins them. Separators of folders become underscores.

    So a file that is called after it stays in its folder.
    """
    name = re.sub(r"[/\\\0]", "_", name)
    count, candidate = 1, name
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    used.add(candidate)
    return candidate


def _code(meta: Mapping[str, Any], key: str) -> int:
    value = meta.get(key, 0)
    return int(np.asarray(value).reshape(-1)[0]) if np.size(value) else 0
