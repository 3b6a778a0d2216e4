"""Class maps come out as the file has them, and stay on the picture through resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medrobust.data import ct_slice_maps
from medrobust.data.class_maps import LoadClassMap, Presence, RandShortSided, SaveClassMap
from medrobust.data.slices import load_volume_ras


def written(folder: Path, classes: np.ndarray, mode: str) -> dict[str, str]:
    """A picture whose red is its row, and its map; palette colours are unlike the numbers."""
    rows = np.broadcast_to(np.arange(classes.shape[0], dtype=np.uint8)[:, None], classes.shape)
    Image.fromarray(np.stack([rows, rows * 0, rows * 0], -1)).save(folder / "image.png")
    label = Image.fromarray(classes.astype(np.uint8))
    if mode == "P":
        label.putpalette([255 - value // 3 for value in range(768)])
    label.convert(mode).save(folder / "label.png")
    return {"image": str(folder / "image.png"), "label": str(folder / "label.png"), "case": "one"}


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_map_has_the_numbers_of_its_file(tmp_path: Path, mode: str) -> None:
    classes = np.array([[0, 1, 255], [20, 7, 0]])
    case = written(tmp_path, classes, mode)
    found = LoadClassMap(void=255)(case)
    assert found["label"][0].tolist() == [[0, 1, -1], [20, 7, 0]]
    assert found["image"].shape == (3, 2, 3)
    assert found["image"][0, 1, 0] == pytest.approx(1 / 255)
    assert found["image"].meta["filename_or_obj"] == "one"
    assert LoadClassMap(void=255, becomes=0)(case)["label"][0].tolist() == [[0, 1, 0], [20, 7, 0]]
    assert LoadClassMap(shift=-1)(case)["label"][0].tolist() == [[-1, 0, 254], [19, 6, -1]]


def test_a_map_in_colours_is_refused(tmp_path: Path) -> None:
    case = written(tmp_path, np.zeros((4, 4)), "RGB")
    with pytest.raises(ValueError, match=r"class numbers \(a grey or palette PNG\) in label.png, got PIL's mode RGB"):
        LoadClassMap()(case)


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    case = written(tmp_path, np.zeros((4, 4)), "L")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(case["label"])
    with pytest.raises(ValueError, match="image and mask of one size"):
        LoadClassMap()(case)


def test_the_shorter_side_gets_its_size_and_the_map_stays_on_the_picture() -> None:
    image = torch.zeros(3, 40, 64)
    image[:, 10:30, 20:40] = 1
    item = {"image": image, "label": image[:1] * 7}
    found = RandShortSided(80, (1, 1))(item)
    assert found["image"].shape == (3, 80, 128)
    assert sorted(found["label"].unique().tolist()) == [0, 7]
    assert torch.equal(found["label"][0] == 7, found["image"][0] > 0.5)

    rand = RandShortSided(40, (0.5, 2.0))
    rand.set_random_state(seed=0)
    sides = [rand(item)["image"].shape[1] for _ in range(200)]
    assert 20 <= min(sides) < 24
    assert 76 < max(sides) <= 80
    assert np.mean(sides) == pytest.approx(50, abs=4)
    with pytest.raises(ValueError, match="two factors above 0"):
        RandShortSided(40, (2.0, 0.5))


def test_presence_says_which_classes_a_map_has() -> None:
    label = torch.tensor([[[0, 2, 2], [0, 0, 3]]])
    found = Presence(5)({"label": label})["label"]
    assert found.shape == (4, 2, 3)
    assert found[:, 0, 0].tolist() == [0, 1, 1, 0]
    assert (found == found[:, :1, :1]).all()
    assert Presence(5, least=2)({"label": label})["label"][:, 0, 0].tolist() == [0, 1, 0, 0]


def test_a_saved_map_reads_back(tmp_path: Path) -> None:
    pred = torch.tensor([[[0, 150], [3, 255]]])
    image = MetaTensor(torch.zeros(3, 2, 2), meta={"filename_or_obj": "folder/photo.jpg"})
    SaveClassMap(tmp_path)({"image": image, "pred": pred})
    assert np.asarray(Image.open(tmp_path / "photo.png")).tolist() == pred[0].tolist()
    with pytest.raises(ValueError, match=r"classes .* from 0 to 255"):
        SaveClassMap(tmp_path)({"image": image, "pred": pred - 1})


def test_maps_of_like_named_images_do_not_replace_each_other(tmp_path: Path) -> None:
    save = SaveClassMap(tmp_path)
    for value, folder in enumerate(("one", "two", "one")):
        image = MetaTensor(torch.zeros(3, 2, 2), meta={"filename_or_obj": f"{folder}/photo.jpg"})
        save({"image": image, "pred": torch.full((1, 2, 2), value)})
    found = {path.name: np.asarray(Image.open(path)).max() for path in tmp_path.iterdir()}
    assert found == {"photo.png": 2, "photo_2.png": 1}


def test_slices_have_all_structures_of_their_exam(ct_organs: Path) -> None:
    cases = ct_slice_maps.cases("validation", ct_organs, every=8)
    assert [case["slice"] for case in cases] == [0, 8, 16]
    assert cases[1]["case"] == "ct_b_slice008"
    found: dict[str, Any] = LoadClassMap(window=(-500, 500))(cases[1])
    whole, _ = load_volume_ras(cases[1]["label"])
    np.testing.assert_array_equal(found["label"][0].numpy(), whole[:, :, 8])
    assert len(found["label"].unique()) == len(ct_slice_maps.CLASSES) == 5
    with pytest.raises(ValueError, match="every of 1 or more, got 0"):
        ct_slice_maps.cases("validation", ct_organs, every=0)
