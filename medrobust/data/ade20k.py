"""The data list of ADE20K in the form of the scene parsing benchmark: photographs of places, 150 classes.

The files come from http://sceneparsing.csail.mit.edu/ and are left as they unpack::

    ADEChallengeData2016/images/training/ADE_train_00000001.jpg         20210 of them
    ADEChallengeData2016/images/validation/ADE_val_00000001.jpg         2000
    ADEChallengeData2016/annotations/training/ADE_train_00000001.png    class numbers 1 to 150; 0 is anything else

The published networks of PIR-AT have 151 classes: what is 0 is a class of its own, learned and counted. The benchmark's
rule is 150 classes where 0 has no say: ``LoadClassMap(shift=-1)`` makes labels of that form, for ``CLASSES[1:]``.
"""

from __future__ import annotations

import os
from pathlib import Path

SECTIONS = ("training", "validation")

CLASSES = (
    "other",
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet"),
    *("sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water"),
    *("painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk"),
    *("rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard"),
    *("chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path"),
    *("stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase"),
    *("blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm"),
    *("kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light"),
    *("truck", "tower", "chandelier", "awning", "streetlight", "booth", "television", "airplane", "dirt track"),
    *("apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van"),
    *("ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel"),
    *("basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank"),
    *("trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture"),
    *("hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor"),
    *("bulletin board", "shower", "radiator", "glass", "clock", "flag"),
)
"""The first of each class's names in the benchmark, behind what is none of them."""


def folder() -> Path:
    """Where the data are: the environment variable ``MEDROBUST_ADE20K``, else ``data/ADEChallengeData2016`` here."""
    return Path(os.environ.get("MEDROBUST_ADE20K") or Path("data") / "ADEChallengeData2016").expanduser()


def datalist(dataset_dir: str | Path, section: str = "training") -> list[dict[str, str]]:
    """Cases ``{"image": path, "label": path, "case": "ADE_train_00000001"}`` by name, so alike on every machine.

    Args:
        dataset_dir: the folder ``ADEChallengeData2016``, or the one above it.
        section: ``"training"`` or ``"validation"``.

    Raises:
        FileNotFoundError: no pictures, or a picture or a label without the other.
        ValueError: there is no such section.
    """
    if section not in SECTIONS:
        raise ValueError(f"expected a section among {', '.join(SECTIONS)}, got {section!r}")
    root = _root(Path(dataset_dir))
    images = {path.stem: path for path in (root / "images" / section).glob("*.jpg")}
    labels = {path.stem: path for path in (root / "annotations" / section).glob("*.png")}
    if not images:
        raise FileNotFoundError(f"expected pictures in images/{section}, got none: unpack the whole archive")
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        few = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        raise FileNotFoundError(
            f"expected a label for each of {len(images)} pictures of {section} and no other, got {len(alone)} without "
            f"their twin ({few}). Complete the folder"
        )
    return [{"image": str(images[name]), "label": str(labels[name]), "case": name} for name in sorted(images)]


def _root(dataset_dir: Path) -> Path:
    for inside in (dataset_dir, dataset_dir / "ADEChallengeData2016"):
        if (inside / "images").is_dir():
            return inside
    raise FileNotFoundError(
        "expected the folder ADEChallengeData2016 with images and annotations, got none in the data folder: set "
        "dataset_dir or MEDROBUST_ADE20K"
    )
