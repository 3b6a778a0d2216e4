"""Images with a map of all classes instead of one structure's mask: pictures of VOC and ADE20K, slices of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Randomizable, Transform
from PIL import Image
from torch import Tensor

from medrobust.atomic import replacing
from medrobust.attacks.objectives import IGNORED
from medrobust.data.pairs import Data, LoadPair
from medrobust.data.slices import load_slice_map
from medrobust.io import unused

MODES = ("P", "L")
"""PIL's modes whose bytes are class numbers. VOC's maps have a palette: their colours are for people."""


class LoadClassMap(LoadPair):
    """Paths to ``image``, as :class:`LoadPair` has it, and ``label`` (1, H, W), float32 of whole class numbers.

    Args:
        window: intensities of a volume that become 0 and 1; only slices need it.
        void: class number in the file that stands for no class; VOC has 255.
        becomes: what those pixels become; -1 (``IGNORED``) has no say in losses, attacks and counts.
        shift: added to all others; with -1, what was class 0 has no say.

    Raises at call:
        OSError, ValueError: a file that is missing, no map, or not on the image's grid.
    """

    def __init__(
        self,
        *,
        window: tuple[float, float] | None = None,
        void: int | None = None,
        becomes: int = IGNORED,
        shift: int = 0,
    ) -> None:
        super().__init__(window=window)
        self.void = void
        self.becomes = becomes
        self.shift = shift

    def label(self, data: Mapping[str, Any]) -> MetaTensor:
        """The map alone."""
        path = data["label"]
        if "slice" in data:
            found = load_slice_map(path, data["slice"])
        else:
            classes = torch.from_numpy(_classes(path)[None]).float()
            found = MetaTensor(classes, affine=torch.eye(4, dtype=torch.float64), meta={"filename_or_obj": str(path)})
        shifted = (found + self.shift).clamp(min=IGNORED)
        return shifted if self.void is None else torch.where(found == self.void, float(self.becomes), shifted)


class RandShortSided(Randomizable, Transform):
    """Resize image (bilinear) and label (nearest) so that the shorter side has ``size`` pixels times a random factor.

    Published networks were trained on factors from 0.5 to 2; ``scales=(1, 1)`` is what they are evaluated on.

    Args:
        size: of the shorter side, before the factor.
        scales: smallest and largest factor, drawn uniformly.
    """

    def __init__(self, size: int, scales: tuple[float, float] = (0.5, 2.0)) -> None:
        if size < 1 or not 0 < scales[0] <= scales[1]:
            raise ValueError(f"expected a size and two factors above 0, the smaller first, got {size} and {scales}")
        self.size = size
        self.scales = (float(scales[0]), float(scales[1]))

    def __call__(self, data: Mapping[str, Any]) -> Data:
        image = data["image"]
        height, width = image.shape[1:]
        factor = self.size * self.R.uniform(*self.scales) / min(height, width)
        size = max(round(height * factor), 1), max(round(width * factor), 1)
        found = dict(data)
        found["image"] = _resized(image, size, "bilinear").clamp(0, 1)
        if "label" in data:
            found["label"] = _resized(data["label"], size, "nearest")
        return found


class Presence(Transform):
    """The map (1, H, W) of classes as what a classifier is asked: ``label`` (K - 1, H, W), 1 in all of channel k - 1
    where class k is anywhere in the map. So an attack on it is one on a segmentation with overlapping classes.

    Args:
        num_classes: K, background included.
        least: pixels below which a class does not count as present.
    """

    def __init__(self, num_classes: int, *, least: int = 1) -> None:
        self.num_classes = num_classes
        self.least = least

    def __call__(self, data: Mapping[str, Any]) -> Data:
        label = data["label"]
        pixels = [int((label == value).sum()) for value in range(1, self.num_classes)]
        there = torch.tensor([float(count >= self.least) for count in pixels]).view(-1, 1, 1)
        return {**data, "label": there.expand(-1, *label.shape[1:]).contiguous()}


class SaveClassMap(Transform):
    """Write predictions (1, H, W) of class numbers 0 to 255 as grey PNG, named after their images.

    A name that images in several folders share gets a number.

    Args:
        output_dir: folder of the files ``<image's name>.png``.
        key: of the prediction.
    """

    def __init__(self, output_dir: str | Path, *, key: str = "pred") -> None:
        self.output_dir = Path(output_dir)
        self.key = key
        self._names: dict[str, str] = {}

    def __call__(self, data: Mapping[str, Any]) -> Data:
        classes = data[self.key].as_subclass(Tensor)
        if classes.ndim != 3 or len(classes) != 1 or classes.min() < 0 or classes.max() > 255:
            raise ValueError(f"expected classes (1, H, W) from 0 to 255 in {self.key}, got {tuple(classes.shape)}")
        source = str(data["image"].meta["filename_or_obj"])
        if source not in self._names:
            self._names[source] = unused(Path(source).stem, set(self._names.values()))
        path = self.output_dir / f"{self._names[source]}.png"
        with replacing(path) as partial:
            Image.fromarray(classes[0].byte().cpu().numpy()).save(partial)
        return dict(data)


def _classes(path: str | PathLike[str]) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as picture:
            if picture.mode not in MODES:
                raise ValueError(
                    f"expected a map of class numbers (a grey or palette PNG) in {Path(path).name}, got PIL's mode "
                    f"{picture.mode}: colours and 16 bits are not read, so write the class numbers with 8 bits"
                )
            return np.array(picture)
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"expected a whole picture in {Path(path).name}, got: {error}") from error


def _resized(tensor: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    antialias = {"antialias": True} if mode == "bilinear" else {}
    return F.interpolate(tensor[None], size, mode=mode, **antialias)[0]
