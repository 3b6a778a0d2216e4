"""Images at the door of the metrics that compare them."""

from monai.utils import convert_to_tensor
from torch import Tensor


def images(prediction: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both images as plain ``float32`` tensors ``(B, C, *S)``; ValueError when shapes differ."""
    if prediction.shape != reference.shape or prediction.ndim < 3 or prediction.numel() == 0:
        raise ValueError(
            f"expected two images of one shape (B, C, *S), got {tuple(prediction.shape)} and "
            f"{tuple(reference.shape)}; compare images on the same grid"
        )
    return convert_to_tensor(prediction, track_meta=False).float(), convert_to_tensor(
        reference, track_meta=False
    ).float()
