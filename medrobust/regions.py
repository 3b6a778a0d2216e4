"""Where an attacker may change an image, in words: the body, whatever is labelled, or structures by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

BODY, LABEL = "body", "label"


@dataclass(frozen=True, kw_only=True)
class Region:
    """A region of each case.

    Args:
        word: what reports call it: ``"body"``, ``"label"`` (every structure), or names of structures.
        classes: of those structures; empty for the two words.
    """

    word: str
    classes: tuple[int, ...] = ()

    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """Image (1, C, *S), reference (1, 1, *S) of classes -> (1, 1, *S) bool.

        Raises:
            ValueError: the case has no such voxel.
        """
        if self.word == BODY:
            found = torch.from_numpy(body(image[0].mean(0).cpu().numpy())).to(image.device)[None, None]
        elif self.word == LABEL:
            found = reference > 0
        else:
            found = torch.isin(reference, torch.tensor(self.classes, device=reference.device))
        if not found.any():
            raise ValueError(f"expected voxels of the region {self.word!r}, got none: leave this case out")
        return found


def body(image: np.ndarray) -> np.ndarray:
    """The largest bright part of an image (*S), with what it encloses in each plane of the last axis (air in a bowel).

    Brightness is told apart by Otsu's threshold.
    """
    found = sitk.GetArrayFromImage(sitk.OtsuThreshold(sitk.GetImageFromArray(image.astype(np.float32)), 0, 1)) > 0
    parts = sitk.ConnectedComponent(sitk.GetImageFromArray(found.astype(np.uint8)))
    largest = sitk.GetArrayFromImage(sitk.RelabelComponent(parts)) == 1
    planes = largest[..., None] if largest.ndim == 2 else largest
    filled = [_without_holes(planes[..., index]) for index in range(planes.shape[-1])]
    return np.stack(filled, -1).reshape(image.shape)


def _without_holes(plane: np.ndarray) -> np.ndarray:
    mask = sitk.BinaryFillhole(sitk.GetImageFromArray(np.ascontiguousarray(plane).astype(np.uint8)))
    return np.asarray(sitk.GetArrayFromImage(mask) > 0)
