"""Attacks that may change a part of the image only: the region in words, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import small_bundle
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from oracles import VoxelLinear
from test_cli import call, values

from medrobust.attacks import FGSM
from medrobust.attacks.objectives import CrossEntropy
from medrobust.findings import FILE
from medrobust.findings import read as read_soundness
from medrobust.handlers import CraftAdversarial
from medrobust.parsing import parse_region
from medrobust.records import read_csv
from medrobust.regions import Region, body

EPS = 8 / 255
NAMES = ["background", "left kidney", "liver"]


def test_words() -> None:
    assert parse_region("body", NAMES) == Region(word="body")
    assert parse_region("label", NAMES) == Region(word="label")
    assert parse_region("left_kidney,liver", NAMES) == Region(word="left kidney, liver", classes=(1, 2))
    with pytest.raises(ValueError, match="liver"):
        parse_region("lever", NAMES)


def test_the_body_is_the_largest_bright_part_with_what_it_encloses() -> None:
    image, expected = np.full((20, 24, 6), 0.02), np.zeros((20, 24, 6), dtype=bool)
    expected[4:16, 5:20] = True
    image[expected] = 0.5
    image[8:10, 9:12, 1:5] = 0.0  # air in a bowel
    image[18:, 2:20, :] = 0.6  # the table
    np.testing.assert_array_equal(body(image), expected)
    np.testing.assert_array_equal(body(image[..., 2]), expected[..., 2])


def test_structures_and_labels() -> None:
    image, label = torch.rand(1, 1, 4, 4), torch.tensor([0, 1, 2, 2] * 4).view(1, 1, 4, 4)
    assert torch.equal(Region(word="label")(image, label), label > 0)
    assert torch.equal(Region(word="liver", classes=(2,))(image, label), label == 2)
    with pytest.raises(ValueError, match="expected voxels of the region 'spleen', got none"):
        Region(word="spleen", classes=(3,))(image, label)


@pytest.mark.parametrize("workers", [(), ("--workers", 1)])
def test_a_run_in_one_structure(tmp_path: Path, workers: tuple[object, ...]) -> None:
    bundle, out = small_bundle.make(tmp_path / "bundle", cases=1), tmp_path / "run"
    words = ["-a", f"fgsm eps={EPS} objective=CE", "-a", "vafa steps=2 block_size=4,4,4", *workers]
    words += ["--soundness", "off"]
    call("evaluate", "-b", bundle, "-o", out, "--region", "organ", *words)
    image = (nib.load(bundle / "data" / "case0.nii.gz").get_fdata() + 1000) / 2000
    label = nib.load(bundle / "data" / "case0_label.nii.gz").get_fdata() == 1
    worst = np.where(label, VoxelLinear.worst(torch.tensor(image), torch.tensor(label), EPS).numpy(), image)
    pred = worst > 0.5
    records = read_csv(out / "records.csv")
    shared = {"case": "case0", "metric": "dice", "class_name": "organ", "condition": "FGSM"}
    assert values(records, **shared) == pytest.approx([2 * (pred & label).sum() / (pred.sum() + label.sum())], abs=1e-3)
    made = nib.load(out / "volumes" / "case0__FGSM__whole-volume__adv.nii.gz")
    changed = np.abs(np.asarray(made.dataobj) - np.asarray(nib.load(out / "volumes" / "case0__image.nii.gz").dataobj))
    true = np.asarray(nib.load(out / "volumes" / "case0__label.nii.gz").dataobj) == 1
    assert changed[true].min() > 0
    assert changed[~true].max() == 0
    assert {r.attack.rpartition(" in ")[2] for r in records if r.condition != "clean"} == {"organ"}
    # The control has the attack's norm inside the region, where it alone may be.
    (norm,), (equal,) = (values(records, condition=name, metric="l2") for name in ("VAFA", "VAFA equal noise"))
    assert equal == pytest.approx(norm, rel=1e-4)
    assert " in organ" in (out / "report.html").read_text()
    again = call("evaluate", "-b", bundle, "-o", out, "--region", "organ", *words)
    assert len(read_csv(out / "records.csv")) == len(records), again
    text = call("evaluate", "-b", bundle, "-o", out, *words, code=2)
    assert "expected the region of the run" in text


def test_the_checklist_asks_inside_the_region(tmp_path: Path) -> None:
    bundle, out = small_bundle.make(tmp_path / "bundle", cases=1), tmp_path / "run"
    call("evaluate", "-b", bundle, "-o", out, "--region", "organ", "-a", "pgd eps=0.1 steps=4", "--no-pictures")
    found = read_soundness(out / FILE)
    assert found is not None
    texts = {finding.check: finding.text for finding in found.findings}
    records = read_csv(out / "records.csv")
    (dice,) = values(records, case="case0", metric="dice", class_name="organ", condition="PGD")
    # Not what an attack on every voxel would reach.
    assert f"{dice:.3f} after 4" in texts["steps"]
    assert found.attack.endswith(" in organ")


def test_what_has_no_region(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle", cases=1)
    words = ["evaluate", "-b", bundle, "-o", tmp_path / "run", "-a", "fgsm", "--region", "body"]
    assert "expected --region with attacks on whole volumes" in call(*words, "--protocol", "both", code=2)
    with pytest.raises(ValueError, match="expected a region with the whole volume"):
        CraftAdversarial(FGSM(), protocol="tiles", region_key="mask")


def test_a_handler_takes_the_region_from_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 1, 6, 6, generator=generator) * 0.5 + 0.25
    label, mask = (image > 0.5).long(), torch.rand(2, 1, 6, 6, generator=generator) < 0.5
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": image, "label": label, "mask": mask}],
        network=VoxelLinear(),
    )
    attack = FGSM(eps=EPS, objective=CrossEntropy())
    CraftAdversarial(attack, region_key="mask").attach(engine)
    seen = []

    def look(engine: SupervisedEvaluator) -> None:
        seen.append(torch.stack([case["image"] for case in engine.state.batch]))

    engine.add_event_handler(Events.ITERATION_COMPLETED, look)
    engine.run()
    moved = (seen[0] - image).abs()
    assert torch.allclose(moved, mask * EPS, atol=1e-6)
