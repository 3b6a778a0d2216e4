"""Pictures sorted into one folder a class, and how CLIP looks at a picture: shorter side resized, centre cut out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from PIL import Image

from medrobust.data import images
from medrobust.data.class_prompts import ClassName

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def image_folder(root: str | PathLike[str], names: Sequence[ClassName] | None = None) -> list[dict[str, Any]]:
    """Cases ``{"image", "label", "name", "case"}`` of every picture in ``root/<class>/``, deeper folders included.

    Args:
        root: folder of one folder a class, such as ImageNet's ``val/n01440764/ILSVRC2012_val_00000293.JPEG``.
        names: classes by number, as ``class_prompts.read_names`` gives them; folders that are there but not in the list
            are an error, those that are missing are not (a subset is one). ``None``: every folder, sorted, is a class.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without a class, or no picture at all.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of one folder a class, got {root.name}, which does not exist")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = [ClassName(folder, folder.replace("_", " ")) for folder in folders] if names is None else list(names)
    numbers = {one.folder: number for number, one in enumerate(classes)}
    unknown = [folder for folder in folders if folder not in numbers]
    if unknown:
        raise ValueError(
            f"expected folders called as the {len(classes)} classes, got {len(unknown)} others "
            f"({', '.join(unknown[:3])})"
        )
    found = [
        {
            "image": str(path),
            "label": numbers[folder],
            "name": classes[numbers[folder]].name,
            "case": "_".join(path.relative_to(root).with_suffix("").parts),
        }
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if not found:
        raise ValueError(f"expected pictures in the folders of {root.name}, got none ending in {', '.join(ENDINGS)}")
    return found


class LoadPicture(Transform):
    """Case to ``image`` (3, S, S) in [0, 1], and its number, if it has one, to ``label`` (1, 1, 1) int64.

    The shorter side becomes S by bicubic interpolation and the centre is kept, as CLIP was trained. An attack then
    works on this S x S image, whatever the file's size; its values are multiples of 1/255.

    Raises at call:
        OSError, ValueError: a file that is missing or no picture of 8 bits.
    """

    def __init__(self, size: int = 224) -> None:
        if size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {size}")
        self.size = size

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        levels = (images.load_image(data["image"]) * 255).round().byte().numpy()
        picture = Image.fromarray(np.moveaxis(levels, 0, -1))
        short = min(picture.size)
        width, height = (max(round(side * self.size / short), self.size) for side in picture.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        cut = np.asarray(resized.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255
        name = str(data.get("case", data["image"]))
        image = MetaTensor(torch.from_numpy(np.moveaxis(cut, -1, 0).copy()), meta={"filename_or_obj": name})
        found = {**data, "image": image}
        if "label" in data:
            found["label"] = torch.tensor(int(data["label"])).view(1, 1, 1)
        return found
