"""Slices of volumes and pictures as cases of image, mask and text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medrobust.data import ct_slices, slices
from medrobust.data.ct_organs import CLASSES
from medrobust.data.images import as_stored, load_image
from medrobust.data.pairs import LoadPair, Prompted, RandPrompted
from medrobust.data.tokenizer import EOT, SOT, encode

LPS = np.diag([-2.0, -3.0, 4.0, 1.0])
PROMPTS = {"p0": "", "p1": "liver", "p2": ["hepatic organ", "the liver"]}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """5 x 6 x 4 voxels that hold their own number, left-posterior-superior."""
    array = np.arange(5 * 6 * 4, dtype=np.int16).reshape(5, 6, 4)
    nib.save(nib.Nifti1Image(array, LPS), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image((array % 7).astype(np.uint8), LPS), tmp_path / "label.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_slice_is_upright_and_scaled(volume: Path) -> None:
    image = slices.load_slice(volume, 1, window=(0, 119))
    stored = np.arange(120).reshape(5, 6, 4)[::-1, ::-1, 1]
    assert np.allclose(image[0].numpy() * 119, stored)
    # The voxel at the corner keeps its place in space.
    upright = nib.as_closest_canonical(nib.load(volume)).affine
    assert np.allclose(image.affine.numpy()[:, 3], upright @ [0, 0, 1, 1])
    assert np.allclose(np.abs(np.diag(image.affine.numpy())), [2, 3, 4, 1])
    assert slices.count(volume) == 4


def test_what_lies_outside_the_window_is_clipped(volume: Path) -> None:
    image = slices.load_slice(volume, 0, window=(40, 60))
    stored = np.arange(120).reshape(5, 6, 4)[::-1, ::-1, 0]
    assert np.allclose(image[0].numpy(), ((stored - 40) / 20).clip(0, 1))


def test_a_mask_is_any_of_its_values(volume: Path) -> None:
    label = volume.with_name("label.nii.gz")
    mask = slices.load_slice_mask(label, 2, values=[1, 5])
    stored = (np.arange(120).reshape(5, 6, 4) % 7)[::-1, ::-1, 2]
    assert np.array_equal(mask[0].numpy(), (stored == 1) | (stored == 5))
    assert np.array_equal(slices.load_slice_map(label, 2)[0].numpy(), stored)


@pytest.mark.parametrize(
    ("index", "window", "message"),
    [(4, (0, 1), "slice from 0 to 3 of scan.nii.gz, got 4"), (0, (1, 1), "from low to high")],
)
def test_wrong_slices_are_refused(volume: Path, index: int, window: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slices.load_slice(volume, index, window=window)


def test_broken_volumes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    with pytest.raises(OSError, match=r"whole NIfTI volume in broken\.nii\.gz"):
        slices.load_slice(tmp_path / "broken.nii.gz", 0, window=(0, 1))
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2)), np.eye(4)), tmp_path / "four.nii.gz")
    with pytest.raises(ValueError, match="three axes"):
        slices.count(tmp_path / "four.nii.gz")
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), np.nan), np.eye(4)), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match=r"finite intensities in nan\.nii\.gz"):
        slices.load_slice(tmp_path / "nan.nii.gz", 0, window=(0, 1))


def test_a_pair_of_slices(volume: Path) -> None:
    case: dict[str, Any] = {
        "image": str(volume),
        "label": str(volume.with_name("label.nii.gz")),
        "slice": 3,
        "value": 2,
    }
    found = LoadPair(window=(0, 119))({**case, "case": "scan_slice3", "structures": case["label"]})
    assert found["image"].shape == found["label"].shape == found["structures"].shape == (1, 5, 6)
    assert torch.equal(found["label"].bool(), found["structures"] == 2)
    assert found["image"].meta["filename_or_obj"] == "scan_slice3"
    with pytest.raises(ValueError, match="window for slices"):
        LoadPair()(case)


def test_a_pair_of_pictures(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[1, 2] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "mask.png")
    found = LoadPair()({"image": str(tmp_path / "a.png"), "label": str(tmp_path / "mask.png"), "case": "a"})
    assert found["image"].shape == (3, 4, 6)
    assert found["image"][:, 1, 2].tolist() == pytest.approx([1, 0.2, 0])
    assert found["label"].nonzero().tolist() == [[0, 1, 2]]
    assert "label" not in LoadPair()({"image": str(tmp_path / "a.png")})


def test_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 6)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"one size, got \(4, 6\) and \(6, 4\)"):
        LoadPair()({"image": str(tmp_path / "a.png"), "label": str(tmp_path / "mask.png")})


def test_the_same_case_always_gets_the_same_prompt() -> None:
    case = {"case": "a", "prompts": PROMPTS}
    found = Prompted("p1")(case)
    assert (found["prompt"], found["prompt_key"]) == ("liver", "p1")
    assert found["input_ids"].tolist() == [*encode("liver"), *[EOT] * (77 - 3)]
    drawn = {Prompted("p2")({**case, "case": str(number)})["prompt"] for number in range(20)}
    assert drawn == set(PROMPTS["p2"])
    assert Prompted("p2")(case)["prompt"] == Prompted("p2")(case)["prompt"]
    with pytest.raises(ValueError, match="prompt key among p0, p1, p2 for case 'a', got 'p9'"):
        Prompted("p9")(case)


def test_training_draws_anew_but_never_the_empty_prompt() -> None:
    transform = RandPrompted()
    transform.set_random_state(seed=0)
    drawn = [transform({"case": "a", "prompts": PROMPTS})["prompt"] for _ in range(200)]
    # Two keys are as likely as each other, and so are two texts of one key.
    assert drawn.count("liver") == pytest.approx(100, abs=30)
    assert drawn.count("the liver") == pytest.approx(50, abs=25)
    assert "" not in drawn
    transform.set_random_state(seed=0)
    assert drawn[:20] == [transform({"case": "a", "prompts": PROMPTS})["prompt"] for _ in range(20)]


def test_cases_of_the_real_exams(ct_organs: Path) -> None:
    found = ct_slices.cases("validation", ct_organs)
    assert len({case["case"] for case in found}) == len(found)
    label = np.asarray(nib.load(found[0]["label"]).dataobj)
    expected = sum(
        (label[..., index] == value).sum() >= ct_slices.LEAST
        for index in range(label.shape[2])
        for value in range(1, len(CLASSES))
    )
    assert len(found) == expected
    everything = ct_slices.cases("validation", ct_organs, absent=True)
    assert len(everything) == label.shape[2] * (len(CLASSES) - 1)
    some = ct_slices.cases("validation", ct_organs, slices=(2, 4))
    assert {case["slice"] for case in some} == {2, 3}
    with pytest.raises(ValueError, match="expected slices within 0 and"):
        ct_slices.cases("validation", ct_organs, slices=(3, 99))


def test_prompts_of_the_panel_are_what_they_are_called() -> None:
    for name in CLASSES[1:]:
        prompts = ct_slices.prompts(name)
        assert set(ct_slices.PANEL) | set(ct_slices.TRAINED) <= set(prompts)
        assert prompts["name"] == name
        assert prompts["wrong"] in CLASSES[1:]
        assert prompts["wrong"] != name
        assert prompts["typo"] != name
        assert Counter(prompts["typo"]) <= Counter(name)
        trained = {prompts[key] for key in ct_slices.TRAINED}
        assert not trained & {*prompts["synonym"], prompts["typo"]}
        assert encode(prompts["name"])[0] == SOT


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_stored_is_what_a_file_gives_back(tmp_path: Path, channels: int) -> None:
    image = torch.rand(channels, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_stored(image, "png"), (image * 255).round() / 255)
    levels = (image * 255).round().byte().numpy()
    picture = Image.fromarray(levels[0] if channels == 1 else np.ascontiguousarray(np.moveaxis(levels, 0, -1)))
    picture.save(tmp_path / "a.jpg", quality=60)
    assert torch.equal(as_stored(image, "jpeg60").expand(3, -1, -1), load_image(tmp_path / "a.jpg"))
    assert (as_stored(image, "jpeg10") - image).abs().mean() > (as_stored(image, "jpeg95") - image).abs().mean()


@pytest.mark.parametrize(("shape", "form"), [((1, 4, 4), "jpeg0"), ((1, 4, 4), "tiff"), ((2, 4, 4), "png")])
def test_other_forms_and_volumes_cannot_be_stored(shape: tuple[int, ...], form: str) -> None:
    with pytest.raises(ValueError, match="to store as"):
        as_stored(torch.zeros(shape), form)
