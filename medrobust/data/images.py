"""PNG and JPEG images and masks as tensors, rows before columns, and masks back to PNG.

MONAI's ``PILReader`` turns pictures into (width, height) unless told otherwise; here everything is (C, H, W), as
transformers' vision networks expect it. Pictures have 8 bits a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data import PILReader
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from medrobust.atomic import replacing

Mode = Literal["RGB", "L"]


def reader(mode: Mode) -> PILReader:
    """For MONAI's ``LoadImage``: pictures as ``"RGB"`` (H, W, 3) or grey ``"L"`` (H, W), whatever the file holds."""
    return PILReader(converter=partial(_convert, mode=mode), reverse_indexing=False)


def load_image(path: str | PathLike[str]) -> Tensor:
    """The image (3, H, W), float32 in [0, 1].

    Raises:
        OSError: no such file, or no whole picture in it.
        ValueError: more than 8 bits a channel.
    """
    return torch.from_numpy(np.moveaxis(_levels(path, "RGB"), -1, 0) / np.float32(255))


def load_mask(path: str | PathLike[str], *, threshold: int | None = None) -> Tensor:
    """The mask (1, H, W), float32 of 0 and 1; see :func:`binarise`.

    Raises:
        OSError: no such file, or no whole picture in it.
        ValueError: more than 8 bits a channel, or more than two grey levels and no threshold.
    """
    try:
        return binarise(load_grey(path), threshold=threshold)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def load_grey(path: str | PathLike[str]) -> Tensor:
    """Grey levels (1, H, W) from 0 to 255, uint8.

    Raises:
        OSError: no such file, or no whole picture in it.
        ValueError: more than 8 bits a channel.
    """
    return torch.from_numpy(_levels(path, "L")[None])


def binarise(grey: Tensor, *, threshold: int | None = None) -> Tensor:
    """Grey levels 0 to 255 in any shape to float32 of 0 and 1.

    Without a threshold, the brighter of two levels is 1; where there is one level only, 0 is an empty mask and any
    other a full one. With it, levels from ``threshold`` up are 1: masks that went through JPEG need that.

    Raises:
        ValueError: more than two grey levels and no threshold.
    """
    if threshold is None:
        levels = grey.unique()
        if len(levels) > 2:
            raise ValueError(
                f"expected a mask of two grey levels, got {len(levels)}: pass a threshold such as 128 if it was a JPEG"
            )
        threshold = max(int(levels.max()), 1) if len(levels) else 1
    return (grey >= threshold).float()


def restore(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Mask (B, 1, H, W) of 0 and 1 at the original ``size`` (H, W) from logits (B, 1, h, w) of one sigmoid channel.

    Logits are resized before they become a mask: the other way round, its edge has the steps of the small grid.
    """
    return (interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False) > 0).float()


def save_mask(mask: Tensor, path: str | PathLike[str]) -> None:
    """Write a mask (1, H, W) of 0 and 1 as PNG of 0 and 255, whole or not at all.

    Raises:
        ValueError: another shape or other values, or a name that does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a mask's name to end in .png, got {path.name}: JPEG would blur its edge")
    if mask.ndim != 3 or mask.shape[0] != 1 or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"expected a mask (1, H, W) of 0 and 1 for {path.name}, got {tuple(mask.shape)}: binarise it")
    picture = Image.fromarray(mask[0].mul(255).byte().cpu().numpy())
    with replacing(path) as partial_file:
        picture.save(partial_file)


def as_stored(image: Tensor, form: str) -> Tensor:
    """What is read back of an image (1 or 3, H, W) in [0, 1] after it was stored with 8 bits a channel.

    Args:
        form: ``"png"`` rounds to 1/255 and no more; ``"jpeg75"`` also compresses with that quality, 1 to 100.

    Raises:
        ValueError: another form, or no picture.
    """
    quality = form.removeprefix("jpeg")
    if form != "png" and not (form.startswith("jpeg") and quality.isdigit() and 1 <= int(quality) <= 100):
        raise ValueError(f"expected to store as png or jpeg1 to jpeg100, got {form!r}")
    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f"expected a picture (1 or 3, H, W) to store as {form}, got {tuple(image.shape)}")
    levels = (image.detach().cpu() * 255).round().byte()
    if form == "png":
        return (levels / 255).to(image)
    file = BytesIO()
    picture = levels[0].numpy() if len(levels) == 1 else np.moveaxis(levels.numpy(), 0, -1)
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="jpeg", quality=int(quality))
    read = np.array(Image.open(file))
    return (torch.from_numpy(read[None] if read.ndim == 2 else np.moveaxis(read, -1, 0)) / 255).to(image)


def _levels(path: str | PathLike[str], mode: Mode) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as picture:
            return np.array(_convert(picture, mode))
    except (SyntaxError, Image.DecompressionBombError) as error:
        # PIL's words for some broken PNG files, and for more pixels than anyone means.
        raise OSError(f"expected a whole picture in {Path(path).name}, got: {error}") from error


def _convert(picture: Image.Image, mode: Mode) -> Image.Image:
    # PIL would clip 16 bits to 255 instead of scaling them.
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"expected 8 bits a channel, got PIL's mode {picture.mode}: scale the picture to 0 to 255")
    return picture.convert(mode)
