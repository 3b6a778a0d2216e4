"""PASCAL VOC's folder is read as it unpacks, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust.data import voc
from medrobust.data.class_maps import LoadClassMap

NAMES = ("2007_000033", "2007_000032", "2008_000008")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        label = Image.fromarray(np.array([[0, 15, 255]] * 6, np.uint8).repeat(3, 1)[:, :8])
        label.putpalette([7 * value % 256 for value in range(768)])
        label.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text(f"{NAMES[0]}\n{NAMES[1]} \n\n", encoding="utf-8")
    (lists / "val.txt").write_text(f"{NAMES[2]}\n", encoding="utf-8")
    return tmp_path


def test_lists_are_read_in_their_order_from_wherever_the_folder_is(tree: Path) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    assert [case["case"] for case in voc.datalist(root, "train")] == list(NAMES[:2])
    assert voc.datalist(root, "val") == voc.datalist(root.parent, "val") == voc.datalist(tree, "val")
    (case,) = voc.datalist(tree, "val")
    assert case == {
        "image": str(root / "JPEGImages" / "2008_000008.jpg"),
        "label": str(root / "SegmentationClass" / "2008_000008.png"),
        "case": "2008_000008",
    }
    label = LoadClassMap(void=voc.VOID)(case)["label"]
    assert sorted(label.unique().tolist()) == [-1, 0, 15]
    assert voc.CLASSES[15] == "person"
    assert len(voc.CLASSES) == 21


def test_further_maps_have_a_folder_and_a_list_of_their_own(tree: Path) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    (root / "ImageSets/Segmentation/trainaug.txt").write_text(NAMES[1], encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"got 1 files missing \(SegmentationClassAug/2007_000032.png\)"):
        voc.datalist(tree, "trainaug", maps="SegmentationClassAug")
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    (case,) = voc.datalist(tree, "trainaug", maps="SegmentationClassAug")
    assert Path(case["label"]).parent.name == "SegmentationClassAug"


def test_what_is_wrong_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    with pytest.raises(FileNotFoundError, match=r"expected the list test.txt .* got train, val"):
        voc.datalist(tree, "test")
    with pytest.raises(FileNotFoundError, match="set dataset_dir or MEDROBUST_VOC"):
        voc.datalist(tree / "nowhere")
    for text, problem in (("\n", "an empty list"), (f"{NAMES[0]}\n{NAMES[0]}\n", "1 twice")):
        (root / "ImageSets/Segmentation/odd.txt").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            voc.datalist(tree, "odd")
    (root / "JPEGImages" / f"{NAMES[2]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"got 1 files missing \(JPEGImages/2008_000008.jpg\)"):
        voc.datalist(tree, "val")
    monkeypatch.setenv("MEDROBUST_VOC", str(tree))
    assert voc.folder() == tree
    monkeypatch.delenv("MEDROBUST_VOC")
    assert voc.folder() == Path("data/VOCdevkit/VOC2012")
