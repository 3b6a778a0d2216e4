"""Crops, pictures by class, captions, and the texts of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medrobust.data import organ_crops
from medrobust.data.captions import caption_tokens, read_captions
from medrobust.data.class_prompts import ORGAN, ClassName, read_names, read_templates, tokens, with_prompts
from medrobust.data.labelled_pictures import LoadPicture, image_folder
from medrobust.data.organ_crops import CLASSES, LoadCrop, RandPlaced, slab
from medrobust.data.tokenizer import tokenize


@pytest.fixture(scope="module")
def crops() -> Path:
    return organ_crops.prepare()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 2 x 4 x 3 mm whose intensity says where one is: x + 1000 y, in mm; and a map with one box of liver."""
    folder = tmp_path_factory.mktemp("volume")
    x, y = np.meshgrid(np.arange(40) * 2, np.arange(30) * 4, indexing="ij")
    values = np.repeat((x + 1000 * y)[..., None], 3, 2).astype(np.int32)
    structures = np.zeros_like(values, dtype=np.uint8)
    structures[10:21, 8:13, 1] = 5
    for name, array in (("ct_b", values), ("ct_b_structures", structures)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 4.0, 3.0, 1.0])), folder / f"{name}.nii.gz")
    return folder


def test_a_crop_lies_where_its_centre_is_in_millimetres(volume: Path) -> None:
    (case,) = organ_crops.cases("test", volume)
    assert (case["name"], case["label"], case["slice"]) == ("liver", CLASSES.index("liver"), 1)
    x, y = case["centre"]
    assert 10 < x < 20
    assert y == 10  # deepest: the box is 22 mm by 20 mm, and rows are 4 mm apart
    crop = LoadCrop(window=(0, 200_000), size=4, pixel=2.0, resolution=1.0, structures=True)(case)
    values = crop["image"].as_tensor()[0].double() * 200_000
    steps = (torch.arange(4) - 1.5) * 2
    expected = (2 * x + steps)[:, None] + 1000 * (4 * y + steps)[None]
    torch.testing.assert_close(values, expected.double(), rtol=1e-5, atol=0.1)
    assert crop["structures"].unique().tolist() == [5]
    assert crop["label"].tolist() == [[[0]]]


def test_outside_the_scan_is_air_and_the_window_clips(volume: Path) -> None:
    (case,) = organ_crops.cases("test", volume)
    crop = LoadCrop(window=(0, 10_000), size=80, pixel=4.0, resolution=1.0)({**case, "centre": (0, 0)})["image"]
    assert crop[0, :38, :].eq(0).all()
    assert crop[0, 42:50, 45:].max() == 1


def test_a_finer_exam_is_averaged_to_the_resolution(volume: Path) -> None:
    (case,) = organ_crops.cases("test", volume)
    fine, coarse = (LoadCrop(window=(0, 200_000), size=1, pixel=2, resolution=r)(case)["image"] for r in (1.0, 6.0))
    torch.testing.assert_close(fine, coarse)  # the mean of a ramp is its middle


def test_placing_without_chance_is_cutting_the_centre() -> None:
    wide = torch.rand((1, 12, 12), generator=torch.Generator().manual_seed(0))
    place = RandPlaced(8, turn=0, zoom=0, move=0)
    torch.testing.assert_close(place({"image": wide})["image"], wide[:, 2:10, 2:10])
    turned = RandPlaced(8, turn=0.3, zoom=0.2, move=2).set_random_state(0)({"image": wide})["image"]
    assert turned.shape == (1, 8, 8)
    assert not torch.allclose(turned, wide[:, 2:10, 2:10])


def test_slabs_of_ct_a_are_apart() -> None:
    sections = [slab(index) for index in range(112)]
    assert sections.count("validation") == 28
    for index, section in enumerate(sections):
        if section == "training":
            near = sections[max(index - organ_crops.GAP, 0) : index + organ_crops.GAP + 1]
            assert "validation" not in near


def test_sections_hold_every_class_and_no_common_slice(crops: Path) -> None:
    found = {section: organ_crops.cases(section, crops) for section in organ_crops.EXAMS}
    for section in ("training", "validation", "test"):
        assert {case["name"] for case in found[section]} == set(CLASSES), section
    assert {case["image"] for case in found["test"]}.isdisjoint(case["image"] for case in found["training"])
    organ_crops.check(found["training"], found["validation"])
    with pytest.raises(ValueError, match="pairs of near ones"):
        organ_crops.check(found["training"], found["training"][:1])
    assert found["shift"] == organ_crops.cases("shift", crops)
    assert len({case["case"] for cases in found.values() for case in cases}) == sum(map(len, found.values()))


def test_the_centre_of_a_real_crop_is_its_structure(crops: Path) -> None:
    load = LoadCrop(window=(-200, 300), size=3, pixel=1.0, structures=True)
    for case in organ_crops.cases("validation", crops)[::9]:
        middle = int(load(case)["structures"][0, 1, 1])
        assert middle in organ_crops.TOTAL[case["name"]], case["case"]


def test_missing_crops_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"organ_crops\.prepare"):
        organ_crops.cases("test", tmp_path)
    with pytest.raises(ValueError, match="expected a section among training, validation, test, shift"):
        organ_crops.cases("ct_b", tmp_path)


def test_tokens_of_every_class_in_every_template() -> None:
    found = tokens(["liver", "portal vein"], ("CT of the {}", "{}"))
    expected, _ = tokenize(["CT of the liver", "liver", "CT of the portal vein", "portal vein"])
    assert torch.equal(found, expected.view(2, 2, 77))
    (case,) = with_prompts([{"name": "liver"}], ORGAN[:2])
    assert case["prompts"] == {"t0": "liver", "t1": "the liver"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("index.json", json.dumps({"1": ["n01443537", "goldfish"], "0": ["n01440764", "great_tench"]})),
        ("synsets.txt", "n01440764 great tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n\n"),
    ],
)
def test_lists_of_imagenet_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_names(tmp_path / name) == [ClassName("n01440764", "great tench"), ClassName("n01443537", "goldfish")]


def test_plain_lists_and_templates_are_read(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("hot dog\ncrane\n", encoding="utf-8")
    assert read_names(tmp_path / "names.txt") == [ClassName("hot dog", "hot dog"), ClassName("crane", "crane")]
    (tmp_path / "names.json").write_text('["a", "b"]', encoding="utf-8")
    assert [one.name for one in read_names(tmp_path / "names.json")] == ["a", "b"]
    (tmp_path / "templates.txt").write_text("# mine\na sketch of a {}.\n\n{}\n", encoding="utf-8")
    assert read_templates(tmp_path / "templates.txt") == ("a sketch of a {}.", "{}")


def picture(path: Path, size: tuple[int, int], left: int, right: int) -> None:
    """A picture whose left half is one grey and whose right half another; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((size[1], size[0], 3), left, dtype=np.uint8)
    values[:, size[0] // 2 :] = right
    Image.fromarray(values).save(path)


def test_a_folder_a_class(tmp_path: Path) -> None:
    picture(tmp_path / "n2" / "deep" / "b.PNG", (4, 4), 0, 0)
    picture(tmp_path / "n1" / "a.jpg", (4, 4), 0, 0)
    (tmp_path / "n1" / "notes.txt").write_text("", encoding="utf-8")
    names = [ClassName("n2", "two"), ClassName("n3", "three"), ClassName("n1", "one")]
    found = [(case["case"], case["label"], case["name"]) for case in image_folder(tmp_path, names)]
    assert found == [("n1_a", 2, "one"), ("n2_deep_b", 0, "two")]
    assert [case["label"] for case in image_folder(tmp_path)] == [0, 1]
    with pytest.raises(ValueError, match=r"got 1 others \(n2\)"):
        image_folder(tmp_path, names[1:])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        image_folder(tmp_path / "nowhere")


def test_clip_sees_the_centre_of_a_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (40, 20), 51, 204)
    loaded = LoadPicture(10)({"image": tmp_path / "a.png", "label": 3, "case": "a"})
    image = loaded["image"]
    assert image.shape == (3, 10, 10)
    assert loaded["label"].shape == (1, 1, 1)
    torch.testing.assert_close(image[:, :, :3].as_tensor(), torch.full((3, 10, 3), 0.2))
    torch.testing.assert_close(image[:, :, 7:].as_tensor(), torch.full((3, 10, 3), 0.8))
    picture(tmp_path / "small.png", (3, 5), 255, 255)
    assert LoadPicture(10)({"image": tmp_path / "small.png"})["image"].eq(1).all()


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.jpg,"A dog, running ."\na.jpg,Two dogs .\nb.jpg,A cat .\n',
        "image_name| comment_number| comment\na.jpg| 0| A dog, running .\na.jpg| 1| Two dogs .\nb.jpg| 0| A cat .\n",
        "image|caption\na.jpg|A dog, running .\na.jpg|Two dogs .\nb.jpg|A cat .\n\n",
    ],
    ids=["flickr8k", "flickr30k", "short"],
)
def test_captions_of_both_flickrs(tmp_path: Path, text: str) -> None:
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    cases = read_captions(tmp_path / "captions.csv", "images")
    assert [case["captions"] for case in cases] == [["A dog, running .", "Two dogs ."], ["A cat ."]]
    assert [case["image"] for case in cases] == [str(Path("images", name)) for name in ("a.jpg", "b.jpg")]
    input_ids, owner = caption_tokens(cases)
    assert owner == [0, 0, 1]
    assert torch.equal(input_ids, tokenize(["A dog, running .", "Two dogs .", "A cat ."])[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image|caption\na.jpg|x\nb.jpg|\nc.jpg\n", r"2 without \(line 3, line 4\)"),
        ("file|text\na|b\n", "expected the columns image and caption"),
        ("", "got an empty file"),
        ("image,caption\n", "got no lines"),
    ],
)
def test_broken_captions_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_captions(tmp_path / "captions.csv", "images")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tokens(["liver", "liver"], ORGAN), "differ, got liver"),
        (lambda: tokens([], ORGAN), "differ, got none"),
        (lambda: tokens(["liver"], ("no place",)), "one {} each, got 'no place'"),
        (lambda: tokens(["liver"], ()), "one {} each"),
        (lambda: LoadCrop(window=(1, 1)), "a window from low to high"),
        (lambda: LoadPicture(0), "a size of at least 1"),
    ],
)
def test_what_does_not_fit_is_said(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
