"""The share of lesions that are not found."""

import numpy as np
import torch
from scipy.ndimage import find_objects, label
from torch import Tensor

from medrobust.metrics._class_maps import class_maps

IDEAL = 0.0
HIGHER_IS_BETTER = False
UNIT = "share"
INPUTS = "classes"


def missed_rate(prediction: Tensor, reference: Tensor, num_classes: int, *, found_share: float = 0.0) -> Tensor:
    """Share of each class's reference lesions that are missed; class maps ``(B, 1, *S)`` -> ``(B, K)`` in [0, 1].

    A lesion is a connected component, voxels that touch by a corner included. It is missed if the prediction gives
    its class to none of its voxels, or to a share below ``found_share``, in [0, 1]. Background in column 0. A class
    absent from the reference has nothing to miss and counts 0, whatever was invented.
    """
    if not 0 <= found_share <= 1:
        raise ValueError(f"expected found_share in [0, 1], got {found_share!r}; it is a share of a lesion's voxels")
    predictions, references = class_maps(prediction.cpu(), reference.cpu(), num_classes)
    rate = [
        [_rate(predicted == k, referenced == k, found_share) for k in range(num_classes)]
        for predicted, referenced in zip(predictions[:, 0].numpy(), references[:, 0].numpy(), strict=True)
    ]
    return torch.tensor(rate, dtype=torch.float32, device=prediction.device)


def _rate(predicted: np.ndarray, referenced: np.ndarray, found_share: float) -> float:
    if not referenced.any():
        return 0.0
    (box,) = find_objects(referenced.astype(np.uint8))
    lesions, number = label(referenced[box], structure=np.ones((3,) * referenced.ndim))
    size = np.bincount(lesions.ravel(), minlength=number + 1)[1:]
    found = np.bincount(lesions[predicted[box]], minlength=number + 1)[1:]
    return float(np.mean((found == 0) | (found / size < found_share)))
