"""The data list of PASCAL VOC 2012's segmentation challenge: photographs with 20 kinds of objects.

The files come from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and are left as they unpack::

    VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
    VOCdevkit/VOC2012/SegmentationClass/2007_000032.png     class numbers under a palette; 255 is an object's border
    VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt      names without endings: 1464; val.txt: 1449

The additional maps of SBD, as class numbers in PNG, go into a folder beside the second, with a list beside the third:
``datalist(folder, "trainaug", maps="SegmentationClassAug")``.
"""

from __future__ import annotations

import os
from pathlib import Path

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

VOID = 255
"""Borders of objects and what is hard to tell. It has no say; the public code of PIR-AT counts it as background."""


def folder() -> Path:
    """Where the data are expected: the environment variable ``MEDROBUST_VOC``, else ``data/VOCdevkit/VOC2012`` here."""
    return Path(os.environ.get("MEDROBUST_VOC") or Path("data") / "VOCdevkit" / "VOC2012").expanduser()


def datalist(
    dataset_dir: str | Path, section: str = "train", *, maps: str = "SegmentationClass"
) -> list[dict[str, str]]:
    """Cases ``{"image": path, "label": path, "case": "2007_000032"}`` in the list's order, every file checked to exist.

    Args:
        dataset_dir: the folder ``VOC2012``, or one above it.
        section: name of a list in ``ImageSets/Segmentation``. SBD's own lists hold pictures of VOC's validation, as
            the published training of PIR-AT does: use one without them.
        maps: folder of the labels.

    Raises:
        FileNotFoundError: no such list, or a file of a case is missing.
        ValueError: the list is empty or names a picture twice.
    """
    root = _root(Path(dataset_dir))
    listing = root / "ImageSets" / "Segmentation" / f"{section}.txt"
    if not listing.is_file():
        there = sorted(path.stem for path in listing.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"expected the list {listing.name} in ImageSets/Segmentation, got {', '.join(there) or 'no list at all'}: "
            "name one of them, or put the list there"
        )
    names = [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        problem = f"{len(names) - len(set(names))} twice" if names else "an empty list"
        raise ValueError(f"expected each picture once in {listing.name}, got {problem}: repair the list")
    found = [
        {
            "image": str(root / "JPEGImages" / f"{name}.jpg"),
            "label": str(root / maps / f"{name}.png"),
            "case": name,
        }
        for name in names
    ]
    missing = [path for case in found for path in (case["image"], case["label"]) if not Path(path).is_file()]
    if missing:
        few = ", ".join("/".join(Path(path).parts[-2:]) for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"expected {len(found)} cases of {listing.name} with all their files, got {len(missing)} files missing "
            f"({few}). Complete the folder; maps of another folder need maps="
        )
    return found


def _root(dataset_dir: Path) -> Path:
    for inside in (dataset_dir, dataset_dir / "VOC2012", dataset_dir / "VOCdevkit" / "VOC2012"):
        if (inside / "JPEGImages").is_dir():
            return inside
    raise FileNotFoundError(
        "expected the folder VOC2012 with JPEGImages, SegmentationClass and ImageSets, got none in the data folder: "
        "set dataset_dir or MEDROBUST_VOC"
    )
