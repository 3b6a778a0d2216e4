"""Bundles of images and prompts run: train, adapters, evaluate, attack, infer, on real slices."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism
from PIL import Image

from medrobust.data import ct_slices
from medrobust.data.pairs import LoadPair
from medrobust.networks.clipseg import CLIPSeg

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
TINY = {
    "text_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 16,
        "image_size": 32,
    },
    "projection_dim": 16,
    "extract_layers": [1, 2, 3],
    "reduce_dim": 8,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "use_complex_transposed_convolution": True,
}
PROMPTS = {"p0": "", "p1": "liver", "p2": ["hepatic organ", "the liver"]}


@pytest.fixture(autouse=True)
def _chance_as_it_was() -> Any:
    with torch.random.fork_rng():
        yield
    set_determinism(None)


@pytest.fixture(scope="module")
def polyps(ct_organs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real slices as coloured PNG of one exam, with listings as MedVLSM has them; the liver plays the polyp."""
    root = tmp_path_factory.mktemp("polyps")
    for folder in ("anns", "images", "masks"):
        (root / folder).mkdir()
    cases = [case for case in ct_slices.cases("shift", ct_organs) if case["structure"] == "liver"]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for number, case in enumerate(cases[:6]):
        pair = LoadPair(window=(0, 692))(case)
        image, mask = ((pair[key][0].numpy() * 255).astype(np.uint8) for key in ("image", "label"))
        Image.fromarray(np.stack([image, image // 2, 255 - image], -1)).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        row = {"img_name": f"{number}.png", "mask_name": f"{number}.png", "prompts": PROMPTS}
        rows[("train", "train", "train", "val", "test", "test")[number]].append(row)
    for split, entries in rows.items():
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


def polyp_settings(polyps: Path, out: Path) -> dict[str, Any]:
    network = {
        "_target_": "medrobust.networks.adapters.DenseCLIPSeg",
        "base": TINY,
        "variant": "vl",
        "bottleneck": 4,
    }
    return {
        "dataset_dir": str(polyps),
        "output_dir": str(out),
        "device": "$torch.device('cpu')",
        "network_def": network,
        "image_size": 32,
        "batch_size": 2,
        "num_workers": 0,
        "max_epochs": 2,
    }


def workflow(name: str, *files: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    folder = BUNDLES / name / "configs"
    return ConfigWorkflow(
        [str(folder / file) for file in files],
        meta_file=str(folder / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(BUNDLES / name),
        **overrides,
    )


def run(flow: ConfigWorkflow) -> ConfigWorkflow:
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_adapters_train_on_listings_and_the_base_stays_bit_for_bit(polyps: Path, tmp_path: Path) -> None:
    flow = workflow("clipseg_polyp", "train.yaml", **polyp_settings(polyps, tmp_path))
    flow.initialize()
    before = {key: value.clone() for key, value in flow.network_def.state_dict().items()}
    flow.run()
    after = flow.network_def.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if key.startswith("clipseg.")]
    assert changed <= {key for key in after if "adapters" in key}
    first, second = rows(tmp_path / "log.csv")
    assert float(second["val_loss"]) > 0
    assert 0 <= float(first["val_mean_dice"]) <= 1


@pytest.mark.parametrize("overlay", ["train_adversarial", "train_vaft", "train_noise"])
def test_listings_train_against_attacks(polyps: Path, tmp_path: Path, overlay: str) -> None:
    overrides = polyp_settings(polyps, tmp_path) | {"max_epochs": 1}
    if overlay != "train_noise":
        overrides |= {"train_attack#steps": 1}
    flow = run(workflow("clipseg_polyp", "train.yaml", f"{overlay}.yaml", **overrides))
    assert flow.trainer.state.iteration == 2
    (row,) = rows(tmp_path / "log.csv")
    assert ("loss_fr" in row) == (overlay == "train_vaft")


def test_test_images_are_attacked_and_masks_saved_at_their_own_size(polyps: Path, tmp_path: Path) -> None:
    overrides = polyp_settings(polyps, tmp_path)
    parser = ConfigParser({"network_def": overrides["network_def"]})
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    overrides |= {"ckpt_path": str(tmp_path / "model.pt"), "attack#steps": 2}
    for key in ("batch_size", "max_epochs"):
        del overrides[key]
    flow = run(workflow("clipseg_polyp", "train.yaml", "evaluate.yaml", "attack_pgd.yaml", **overrides))
    metrics = flow.evaluator.state.metrics
    assert metrics["val_linf_adv"] == pytest.approx(8 / 255, abs=1e-6)
    for number in (4, 5):
        mask = np.asarray(Image.open(tmp_path / f"{number}.png"))
        assert mask.shape == np.asarray(Image.open(polyps / "images" / f"{number}.png")).shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        assert (tmp_path / "adversarial" / f"{number}_adv.nii.gz").is_file()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_published_attacks_move_each_channel_by_eps_of_its_own_unit(polyps: Path, tmp_path: Path, name: str) -> None:
    overrides = polyp_settings(polyps, tmp_path)
    torch.save(
        ConfigParser({"network_def": overrides["network_def"]}).get_parsed_content("network_def").state_dict(),
        tmp_path / "model.pt",
    )
    overrides |= {"ckpt_path": str(tmp_path / "model.pt"), "eps_normalised": 0.01}
    for key in ("batch_size", "max_epochs"):
        del overrides[key]
    flow = run(
        workflow("clipseg_polyp", "train.yaml", "evaluate.yaml", f"attack_{name}_as_published.yaml", **overrides)
    )
    output = flow.evaluator.state.output[0]
    image, image_adv = (output[key].as_tensor().double() for key in ("image", "image_adv"))
    assert image.shape == (3, 32, 32)
    moved = (image_adv - image).abs()
    away = (image > 0.01) & (image < 0.99)
    for channel, std in enumerate((0.229, 0.224, 0.225)):
        assert moved[channel].max().item() == pytest.approx(0.01 * std, abs=1e-6)
        # Forty steps of 2 / 255 reach the edge of so small a ball wherever the sign of the gradient stays.
        at_edge = (moved[channel][away[channel]] > 0.0099 * std).double().mean().item()
        assert at_edge > (0.9 if name == "fgsm" else 0.3)


@pytest.mark.parametrize(
    "path",
    [path for word in ("train", "attack_*") for path in sorted(BUNDLES.glob(f"*clipseg*/configs/{word}.yaml"))],
    ids=lambda path: f"{path.parts[-3]} {path.name}",
)
def test_false_positives_on_a_normal_image_count(path: Path) -> None:
    """One perfect lesion and one normal image that is all lesion: a Dice of 0.5, not of 1."""
    lesion = torch.zeros(1, 4, 4)
    lesion[:, 1:3] = 1
    found = 0
    for metric in _dice_metrics(yaml.safe_load(path.read_text())):
        found += 1
        parser = ConfigParser(
            {"metric": {**metric, "output_transform": "$lambda output: output", "save_details": False}}
        )
        handler = parser.get_parsed_content("metric")
        handler.update([[lesion, torch.ones(1, 4, 4)], [lesion, torch.zeros(1, 4, 4)]])
        assert float(handler.compute()) == pytest.approx(0.5)
    assert found


def _dice_metrics(node: Any) -> Iterator[dict[str, Any]]:
    """Every MONAI Dice in a configuration."""
    if isinstance(node, dict):
        if node.get("_target_") == "MeanDice" or "DiceMetric" in str(node.get("metric_fn")):
            yield node
            return
        node = list(node.values())
    for part in node if isinstance(node, list) else []:
        yield from _dice_metrics(part)


def test_a_leaking_split_stops_before_training(polyps: Path, tmp_path: Path) -> None:
    listings = tmp_path / "anns"
    listings.mkdir()
    for split in ("train", "val"):
        (listings / f"{split}.json").write_text((polyps / "anns" / "train.json").read_text())
    overrides = polyp_settings(polyps, tmp_path) | {"listings": str(listings)}
    with pytest.raises(RuntimeError) as caught:
        workflow("clipseg_polyp", "train.yaml", **overrides).initialize()
    assert "splits without a common image, got 3 in train and val" in str(caught.value.__cause__)


def test_every_overlay_of_data_and_networks_names_what_exists() -> None:
    """The big networks need weights that are elsewhere, so their settings are looked up, not built."""
    folder = BUNDLES / "clipseg_polyp" / "configs"
    train = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    found = sorted([*folder.glob("data_*.yaml"), *folder.glob("network_*.yaml")])
    assert len(found) == 21
    for path in found:
        overlay = yaml.safe_load(path.read_text(encoding="utf-8"))
        own = {key for key in overlay if not key.startswith("+")}
        assert own <= set(train), path.name
        target = overlay.get("network_def", {}).get("_target_")
        if target:
            module, _, name = target.removesuffix(".from_pretrained").rpartition(".")
            assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.fixture(scope="module")
def slices_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("base") / "model.pt"
        torch.save(CLIPSeg(TINY, trainable="all").state_dict(), path)
    return path


def slice_settings(ct_organs: Path, out: Path) -> dict[str, Any]:
    return {
        "dataset_dir": str(ct_organs),
        "output_dir": str(out),
        "device": "$torch.device('cpu')",
        "base": TINY,
        "image_size": 32,
        "val_slices": [10, 11],
    }


def test_slices_train_the_whole_network_with_their_prompts(ct_organs: Path, tmp_path: Path) -> None:
    overrides = slice_settings(ct_organs, tmp_path) | {"slices": [50, 54], "max_epochs": 1, "val_interval": 1}
    overrides["warmup_iterations"] = 0
    flow = workflow("ct_slices_clipseg", "train.yaml", **overrides)
    flow.initialize()
    before = {key: value.clone() for key, value in flow.network_def.named_parameters()}
    flow.run()
    moved = {key for key, value in flow.network_def.named_parameters() if not torch.equal(value, before[key])}
    for part in ("text_model.encoder", "vision_model.encoder", "decoder"):
        assert any(part in key for key in moved), part
    assert flow.trainer.state.iteration == 1
    assert len(flow.evaluator.state.dataloader.dataset) == 4


def test_adapters_learn_another_modality_and_are_saved_alone(
    ct_organs: Path, slices_base: Path, tmp_path: Path
) -> None:
    overrides = slice_settings(ct_organs, tmp_path) | {
        "slices": [8, 10],
        "pretrained": str(slices_base),
        "max_epochs": 1,
        "val_interval": 1,
        "warmup_iterations": 0,
        "network_def#bottleneck": 4,
    }
    flow = run(workflow("ct_slices_clipseg", "train.yaml", "train_adapters.yaml", **overrides))
    base = torch.load(slices_base, weights_only=True)
    after = flow.network_def.state_dict()
    assert all(torch.equal(after[key], value) for key, value in base.items())
    evaluated = slice_settings(ct_organs, tmp_path / "eval") | {
        "base_path": str(slices_base),
        "ckpt_path": str(tmp_path / "adapters.safetensors"),
        "network_def#network#bottleneck": 4,
    }
    again = run(workflow("ct_slices_clipseg", "train.yaml", "evaluate.yaml", "adapters.yaml", **evaluated))
    assert all(torch.equal(value, after[key]) for key, value in again.network_def.state_dict().items())
    assert again.evaluator.state.metrics["val_mean_dice"] == pytest.approx(
        flow.evaluator.state.metrics["val_mean_dice"], abs=1e-6
    )


def test_evaluation_and_inference_give_the_same_masks(ct_organs: Path, slices_base: Path, tmp_path: Path) -> None:
    overrides = slice_settings(ct_organs, tmp_path / "eval") | {"ckpt_path": str(slices_base)}
    run(workflow("ct_slices_clipseg", "train.yaml", "evaluate.yaml", **overrides))
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "mr_d.nii.gz").write_bytes((ct_organs / "mr_d.nii.gz").read_bytes())
    infer = {key: value for key, value in overrides.items() if key != "val_slices"}
    infer |= {"dataset_dir": str(scans), "output_dir": str(tmp_path / "out"), "window": [0.0, 692.0]}
    run(workflow("ct_slices_clipseg", "inference.yaml", kind="infer", **infer))
    saved = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert len(saved) == nib.load(scans / "mr_d.nii.gz").shape[2]
    assert nib.load(saved[0]).shape[:2] == nib.load(scans / "mr_d.nii.gz").shape[:2]
    evaluated = sorted(path.name for path in (tmp_path / "eval").glob("*_seg.nii.gz"))
    assert len(evaluated) == 4
    assert evaluated[0].startswith("ct_b_slice010_")
