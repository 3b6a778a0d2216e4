"""ADE20K's folder is read as it unpacks, in one order on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medrobust.data import ade20k
from medrobust.data.class_maps import LoadClassMap


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for section, names in (("training", (3, 1, 2)), ("validation", (1,))):
        (root / "images" / section).mkdir(parents=True)
        (root / "annotations" / section).mkdir(parents=True)
        for number in names:
            name = f"ADE_{'train' if section == 'training' else 'val'}_{number:08d}"
            Image.fromarray(np.full((4, 5, 3), 60, np.uint8)).save(root / "images" / section / f"{name}.jpg")
            label = np.array([[0, 1, 13, 150, 150]] * 4, np.uint8)
            Image.fromarray(label).save(root / "annotations" / section / f"{name}.png")
    return tmp_path


def test_pictures_come_by_name_with_their_labels(tree: Path) -> None:
    cases = ade20k.datalist(tree)
    assert [case["case"] for case in cases] == [f"ADE_train_{number:08d}" for number in (1, 2, 3)]
    assert cases == ade20k.datalist(tree / "ADEChallengeData2016", "training")
    (case,) = ade20k.datalist(tree, "validation")
    assert Path(case["label"]).relative_to(tree) == Path(
        "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    )
    assert sorted(LoadClassMap()(case)["label"].unique().tolist()) == [0, 1, 13, 150]
    assert sorted(LoadClassMap(shift=-1)(case)["label"].unique().tolist()) == [-1, 0, 12, 149]


def test_there_are_150_classes_and_the_rest() -> None:
    assert len(ade20k.CLASSES) == len(set(ade20k.CLASSES)) == 151
    known = {1: "wall", 13: "person", 21: "car", 150: "flag"}
    assert {number: ade20k.CLASSES[number] for number in known} == known


def test_what_is_wrong_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree / "ADEChallengeData2016"
    with pytest.raises(ValueError, match="section among training, validation, got 'test'"):
        ade20k.datalist(tree, "test")
    with pytest.raises(FileNotFoundError, match="set dataset_dir or MEDROBUST_ADE20K"):
        ade20k.datalist(tree / "nowhere")
    (root / "images/training/ADE_train_00000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"each of 2 pictures .* got 1 without their twin \(ADE_train_00000002"):
        ade20k.datalist(tree)
    (root / "annotations/validation/ADE_val_00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"got 1 without their twin \(ADE_val_00000001\)"):
        ade20k.datalist(tree, "validation")
    (root / "images/validation/ADE_val_00000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="expected pictures in images/validation, got none"):
        ade20k.datalist(tree, "validation")
    monkeypatch.setenv("MEDROBUST_ADE20K", str(tree))
    assert ade20k.folder() == tree
