"""Listings become cases, a case always gets the same prompt, and whatever is wrong with a list is told at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage
from PIL import Image

from medrobust.data import images
from medrobust.data.prompts import (
    Ensemble,
    Fixed,
    Overlap,
    SeededRandom,
    check,
    check_splits,
    datalist,
    overlaps,
    problems,
)

PROMPTS: dict[str, Any] = {
    "p0": "",
    "p1": "polyp",
    "p2": "round polyp",
    "p7": ["polyp which is a projecting growth", "polyp in the colon", "a small lump"],
}


def case(name: str, **prompts: Any) -> dict[str, Any]:
    return {"case": name, "image": f"{name}.png", "label": f"{name}.png", "prompts": prompts or PROMPTS}


def picture(path: Path, shape: tuple[int, ...] = (5, 7, 3), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def mask(path: Path, shape: tuple[int, int] = (5, 7), levels: tuple[int, ...] = (0, 255)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(levels, dtype=np.uint8), shape)).save(path)
    return path


def written(folder: Path, rows: Any) -> Path:
    path = folder / "test.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def row(image: str, label: str, **prompts: Any) -> dict[str, Any]:
    """One entry as MedVLSM has it, with what nobody uses."""
    unused = {"bbox": [0, 0, 3, 3], "cat": 0, "segment_id": "7", "sentences": [], "sentences_num": 1}
    return {"img_name": image, "mask_name": label, "prompts": prompts or PROMPTS, **unused}


def healthy(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    names = [f"{number}.png" for number in range(count)]
    for seed, name in enumerate(names):
        picture(folder / "images" / name, seed=seed)
        mask(folder / "masks" / name)
    rows = [row(name, name) for name in names]
    return datalist(written(folder, rows), images=folder / "images", masks=folder / "masks")


def test_entries_become_cases_named_after_their_masks(tmp_path: Path) -> None:
    """CAMUS has three masks an image, and BKAI an entry twice: each keeps a name of its own."""
    rows = [row("a.png", f"mask_{number}/a.png") for number in (1, 2)] + [row("b.jpg", "b.jpeg")] * 2
    found = datalist(written(tmp_path, rows), images=tmp_path / "images", masks="masks")
    assert [one["case"] for one in found] == ["mask_1_a", "mask_2_a", "b", "b_2"]
    assert found[1] == {
        "image": str(tmp_path / "images" / "a.png"),
        "label": str(Path("masks") / "mask_2" / "a.png"),
        "prompts": PROMPTS,
        "case": "mask_2_a",
    }


def test_names_of_cases_lead_out_of_no_folder(tmp_path: Path) -> None:
    """Files are called after cases, so a name is no path, wherever the mask lies."""
    masks = tmp_path / "elsewhere" / "masks"
    names = [
        str(masks / "deep" / "a.png"),
        str(tmp_path / "mine" / "b.png"),
        "/data/c.png",
        "../../d.png",
        "masks/e.png",
    ]
    found = datalist(written(tmp_path, [row("a.png", name) for name in names]), images=tmp_path, masks=masks)
    assert [one["case"] for one in found] == ["deep_a", "mine_b", "data_c", "d", "masks_e"]
    assert [Path(one["label"]) for one in found] == [masks / name for name in names]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "array of entries in test.json, got an empty array"),
        ("{}", r"array of entries in test.json, got JSON of another kind \(dict\)"),
        ("[", "expected JSON in test.json, got Expecting value"),
    ],
)
def test_what_is_no_listing_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "test.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        datalist(tmp_path / "test.json", images=tmp_path, masks=tmp_path)


def test_all_incomplete_entries_are_named(tmp_path: Path) -> None:
    no_mask = {"img_name": "a.png", "prompts": PROMPTS}
    rows = [no_mask, row("b.png", "b.png"), {**row("c.png", "c.png"), "prompts": {}, "img_name": 3}, "d"]
    with pytest.raises(ValueError, match="img_name, mask_name and prompts in all 4 entries") as raised:
        datalist(written(tmp_path, rows), images=tmp_path, masks=tmp_path)
    assert str(raised.value).endswith(
        "got 3 without: entry 0: a.png has no mask_name; entry 2: c.png has no img_name and no prompts; "
        "entry 3: no object"
    )


def test_a_fixed_key_gives_its_text() -> None:
    assert Fixed("p2").choose(case("a")) == [("p2", "round polyp")]
    assert Fixed("p0").choose(case("a")) == [("p0", "")]


def test_chance_is_the_seed_and_the_case() -> None:
    """1,200 cases: each key, and each text of a list, as often as another, whatever else is in the list."""
    many = [case(str(number)) for number in range(1200)]
    policy = SeededRandom(seed=3)
    drawn = {one["case"]: policy.choose(one)[0] for one in many}
    assert drawn == {one["case"]: SeededRandom(seed=3).choose(one)[0] for one in reversed(many)}
    keys = Counter(prompt.key for prompt in drawn.values())
    texts = Counter(prompt.text for prompt in drawn.values() if prompt.key == "p7")
    # Five standard deviations of a binomial count.
    assert set(keys) == {"p1", "p2", "p7"}
    assert all(abs(count - 400) < 5 * 17 for count in keys.values())
    assert set(texts) == set(PROMPTS["p7"])
    assert all(abs(count - 400 / 3) < 5 * 13 for count in texts.values())
    other = [SeededRandom(seed=4).choose(one)[0] for one in many]
    same = sum(prompt == drawn[one["case"]] for prompt, one in zip(other, many, strict=True))
    assert abs(same - 1200 * (1 / 9 + 1 / 9 + 1 / 27)) < 5 * 16


def test_the_draw_is_the_same_in_every_version() -> None:
    """Written down once: a record of last year names the prompts of today."""
    keys = [SeededRandom(seed=0).choose(case(name))[0].key for name in "abcdefgh"]
    assert keys == ["p1", "p7", "p7", "p7", "p2", "p7", "p2", "p7"]
    texts = [Fixed("p7").choose(case(name))[0].text for name in "abcdefgh"]
    assert [PROMPTS["p7"].index(text) for text in texts] == [0, 0, 0, 1, 0, 1, 1, 1]


def test_a_key_drawn_at_random_has_the_text_of_the_fixed_key() -> None:
    for number in range(40):
        (drawn,) = SeededRandom(seed=7).choose(case(str(number)))
        assert [drawn] == Fixed(drawn.key, seed=7).choose(case(str(number)))


def test_keys_can_be_chosen() -> None:
    drawn = {SeededRandom(keys=("p0", "p1")).choose(case(str(number)))[0] for number in range(30)}
    assert drawn == {("p0", ""), ("p1", "polyp")}


def test_an_ensemble_is_all_texts() -> None:
    expected = [("p1", "polyp"), ("p2", "round polyp"), *(("p7", text) for text in PROMPTS["p7"])]
    assert Ensemble().choose(case("a")) == expected
    assert Ensemble(keys=("p2", "p0")).choose(case("a")) == [("p2", "round polyp"), ("p0", "")]


@pytest.mark.parametrize("policy", [Fixed("p5", seed=2), SeededRandom(seed=1, keys=("p1", "p2")), Ensemble()])
def test_the_repr_repeats_the_policy(policy: Any) -> None:
    assert eval(repr(policy), {"Fixed": Fixed, "SeededRandom": SeededRandom, "Ensemble": Ensemble}) == policy


@pytest.mark.parametrize(
    ("policy", "prompts", "said"),
    [
        (Fixed("p12"), {}, "expected a prompt key among p0, p1, p2, p7 for case 'a', got 'p12'"),
        (SeededRandom(keys=("p12",)), {}, "got 'p12'"),
        (Ensemble(keys=("p1", "p12")), {}, "got 'p12'"),
        (Fixed("p1"), {"p1": []}, r"a text or a list of texts under 'p1' for case 'a', got \[\]"),
        (Ensemble(), {"p1": ["polyp", 3]}, r"under 'p1' for case 'a', got \['polyp', 3\]"),
        (Fixed("p1"), {"p1": None}, "got None"),
        (Ensemble(), {"p0": ""}, "prompts to choose from for case 'a', got none"),
        (SeededRandom(), {"p0": ""}, "prompts to choose from for case 'a', got none"),
    ],
)
def test_a_prompt_that_is_not_there_is_named(policy: Any, prompts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy.choose(case("a", **prompts))


def test_a_healthy_list_passes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = healthy(tmp_path)
    # Empty and full masks are masks: BUSI's normal images have the former.
    mask(Path(found[0]["label"]), levels=(0,))
    mask(Path(found[1]["label"]), levels=(255,))
    assert problems(found, SeededRandom()) == []
    check(found, Ensemble())
    with pytest.raises(ValueError, match="got an empty list"):
        check([], Ensemble())


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = healthy(tmp_path, 9)
    Path(found[0]["image"]).unlink()
    Path(found[1]["label"]).unlink()
    mask(Path(found[2]["label"]), levels=(0, 7, 255))
    mask(Path(found[3]["label"]), shape=(7, 5), levels=(0, 128, 255))
    found[4]["prompts"] = {"p1": " ".join(["the"] * 76)}
    found[5]["prompts"] = {"p2": "round polyp"}
    Path(found[6]["image"]).write_bytes(Path(found[6]["image"]).read_bytes()[:60])
    Image.fromarray(np.zeros((5, 7), dtype=np.uint16)).save(found[7]["label"])
    assert [(problem.case, problem.kind) for problem in problems(found, Fixed("p1"))] == [
        ("0", "image missing"),
        ("1", "mask missing"),
        ("2", "mask not binary"),
        ("3", "mask not binary"),
        ("3", "image and mask of different size"),
        ("4", "prompt over 77 tokens"),
        ("5", "prompt not usable"),
        ("6", "image unreadable"),
        ("7", "mask unreadable"),
    ]
    with pytest.raises(ValueError, match="expected 9 whole cases, got problems in 8: 1 image missing") as raised:
        check(found, Fixed("p1"))
    message = str(raised.value)
    assert "\n" not in message
    assert str(tmp_path) not in message
    assert "2 mask not binary (2: expected a mask of two grey levels, got 3: pass a threshold" in message
    assert "(3: (5, 7) and (7, 5) rows and columns)" in message
    assert "(4: p1 has 78, 'the the" in message
    # A threshold allows grey levels, and longer prompts may be cut.
    allowed = {problem.case for problem in problems(found, Fixed("p1"), context=None, threshold=128)}
    assert allowed == {"0", "1", "3", "5", "6", "7"}


def test_an_entry_listed_twice_is_found(tmp_path: Path) -> None:
    found = healthy(tmp_path)
    twice = [*found, {**found[1], "case": "1_2"}]
    assert problems(twice, Fixed("p1"), context=None) == [
        ("1", "listed twice", "1.png"),
        ("1_2", "listed twice", "1.png"),
    ]


def test_slices_of_volumes_are_looked_at_too(tmp_path: Path) -> None:
    def volume(name: str, array: Any) -> str:
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
        return str(tmp_path / name)

    image = volume("image.nii.gz", np.arange(120, dtype=np.int16).reshape(4, 5, 6))
    label = volume("label.nii.gz", np.ones((4, 5, 6), dtype=np.uint8))
    whole = {"image": image, "label": label, "value": 1, "prompts": PROMPTS}
    nan = np.full((4, 5, 6), np.nan, dtype=np.float32)
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(Path(image).read_bytes()[:90])
    cases = [
        {**whole, "case": "whole", "slice": 5},
        {**whole, "case": "another structure", "slice": 5, "value": 2},
        {**whole, "case": "beyond", "slice": 6},
        {**whole, "case": "nan", "slice": 0, "image": volume("nan.nii.gz", nan)},
        {**whole, "case": "cut", "slice": 0, "image": str(cut)},
        {**whole, "case": "turned", "slice": 0, "label": volume("turned.nii.gz", np.ones((5, 4, 6), dtype=np.uint8))},
        {**whole, "case": "gone", "slice": 0, "label": str(tmp_path / "gone.nii.gz")},
        {**whole, "case": "one", "slice": 1},
        {**whole, "case": "twice", "slice": 1},
    ]
    found = problems(cases, Fixed("p1"), context=None)
    assert [(problem.case, problem.kind) for problem in found] == [
        ("beyond", "image unreadable"),
        ("beyond", "mask unreadable"),
        ("nan", "image unreadable"),
        ("cut", "image unreadable"),
        ("turned", "image and mask of different size"),
        ("gone", "mask missing"),
        ("one", "listed twice"),
        ("twice", "listed twice"),
    ]
    assert found[0].detail == "expected a slice from 0 to 5 of image.nii.gz, got 6"
    assert not [problem for problem in found if str(tmp_path) in problem.detail]


def test_overlaps_are_found_by_name_and_by_content(tmp_path: Path) -> None:
    def split(name: str, **seeds: int) -> list[dict[str, Any]]:
        return [{"image": str(picture(tmp_path / name / f"{file}.png", seed=seed))} for file, seed in seeds.items()]

    def overlap(first: str, second: str, *same: str) -> Overlap:
        one, other = (Path(path).parts[0] for path in (first, second))
        return Overlap((one, other), (str(tmp_path / first), str(tmp_path / second)), same)

    train = split("train", a=1, b=2, c=3)
    splits = {"train": [*train, *train], "val": split("val", a=4, d=2, e=5), "test": split("test", c=3, f=6)}
    assert overlaps(splits) == [
        overlap("train/a.png", "val/a.png", "name"),
        overlap("train/b.png", "val/d.png", "content"),
        overlap("train/c.png", "test/c.png", "name", "content"),
    ]
    with pytest.raises(
        ValueError, match=r"got 2 in train and val \(a.png; b.png\), 1 in train and test \(c.png\): take"
    ):
        check_splits(splits)
    with pytest.raises(ValueError, match=r"got 1 in train and val \(b.png\), 1 in train and test \(c.png\): take"):
        check_splits(splits, names=False)
    check_splits({"val": splits["val"], "test": splits["test"]})
    missing = {"one": [{"image": "x/gone.png"}], "two": [{"image": "y/gone.png"}, {"image": "y/away.png"}]}
    assert overlaps(missing) == [Overlap(("one", "two"), ("x/gone.png", "y/gone.png"), ("name",))]


def test_rows_come_before_columns(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (5, 7, 3))
    with Image.open(path) as opened:
        expected = np.asarray(opened)
    assert torch.equal(images.load_image(path), torch.tensor(expected).movedim(-1, 0) / 255)
    loaded = LoadImage(reader=images.reader("RGB"), image_only=True, ensure_channel_first=True)(path)
    assert torch.equal(loaded.as_tensor().byte(), torch.tensor(expected).movedim(-1, 0))
    # A grey picture has three equal channels.
    grey = images.load_image(mask(tmp_path / "grey.png"))
    assert grey.shape == (3, 5, 7)
    assert torch.equal(grey[0], grey[2])


def test_a_broken_picture_is_an_os_error(tmp_path: Path) -> None:
    """PIL calls a PNG whose chunks have no names a syntax error."""
    path = picture(tmp_path / "a.png", (40, 50, 3))
    content = path.read_bytes()
    place = content.index(b"IDAT")
    # The pixels end after 100 bytes, and what follows is no chunk.
    unnamed = content[: place - 4] + (100).to_bytes(4, "big") + content[place : place + 104] + bytes(200)
    for broken in (unnamed, content[:100], b"", b"text"):
        path.write_bytes(broken)
        with pytest.raises(OSError, match=r"a.png|truncated"):
            images.load_image(path)


@pytest.mark.parametrize(
    ("levels", "threshold", "expected"),
    [
        ((0, 255), None, (0, 1)),
        ((0, 1), None, (0, 1)),
        ((0,), None, (0,)),
        ((9,), None, (1,)),
        ((0, 3, 128, 255), 128, (0, 0, 1, 1)),
        ((0, 3), 128, (0, 0)),
    ],
)
def test_masks_become_zero_and_one(
    tmp_path: Path, levels: tuple[int, ...], threshold: int | None, expected: tuple[int, ...]
) -> None:
    found = images.load_mask(mask(tmp_path / "a.png", levels=levels), threshold=threshold)
    assert torch.equal(found, torch.tensor(np.resize(expected, (1, 5, 7))).float())


def test_grey_masks_need_a_threshold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a.png: expected a mask of two grey levels, got 3: pass a threshold"):
        images.load_mask(mask(tmp_path / "a.png", levels=(0, 3, 255)))


def test_masks_come_back_as_they_went(tmp_path: Path) -> None:
    wanted = images.load_mask(mask(tmp_path / "a.png", levels=(255, 0, 0, 255, 255)))
    images.save_mask(wanted, tmp_path / "deep" / "b.png")
    assert torch.equal(images.load_grey(tmp_path / "deep" / "b.png"), (wanted * 255).byte())
    for bad in (wanted[0], wanted * 0.5):
        with pytest.raises(ValueError, match=r"mask \(1, H, W\) of 0 and 1 for c.png"):
            images.save_mask(bad, tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"end in .png, got c.jpg"):
        images.save_mask(wanted, tmp_path / "c.jpg")


def test_logits_are_resized_before_they_become_a_mask() -> None:
    """A ramp from -3 to 1 in 2 columns is positive from 3/4 of the way on: 3 of 8 columns. Thresholded first, 4 are."""
    logits = torch.tensor([[[[-3.0, 1.0]]]])
    # Where the centres of the 8 columns lie in the small grid.
    places = ((torch.arange(8) + 0.5) / 4 - 0.5).clamp(0, 1)
    assert images.restore(logits, (1, 8))[0, 0, 0].tolist() == (-3 + 4 * places > 0).float().tolist()
    assert images.restore(logits, (3, 8)).sum() == 9
