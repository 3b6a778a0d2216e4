"""The bundle of zero-shot classification trains, hardens, evaluates, compares and answers, on real crops."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.utils import set_determinism
from PIL import Image

from medrobust.data import organ_crops
from medrobust.records import read_csv
from medrobust.zero_shot_report import summary

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "clip_zero_shot"
CONFIGS = BUNDLE / "configs"
FINE = ("train_noise", "train_adversarial", "train_fare")
SMALL = {
    "base#text_config#hidden_size": 8,
    "base#text_config#num_hidden_layers": 1,
    "base#vision_config#hidden_size": 16,
    "base#vision_config#num_hidden_layers": 2,
    "base#vision_config#patch_size": 24,
}


@pytest.fixture(autouse=True)
def _chance_as_it_was() -> Any:
    with torch.random.fork_rng():
        yield
    set_determinism(None)


@pytest.fixture(scope="module")
def crops() -> Path:
    return organ_crops.prepare()


def workflow(crops: Path, out: Path, *files: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    shared = {"output_dir": str(out), "device": "$torch.device('cpu')", "dataset_dir": str(crops), **SMALL}
    return ConfigWorkflow(
        [str(CONFIGS / f"{file}.yaml") for file in files],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(BUNDLE),
        **{**shared, **overrides},
    )


def run(flow: ConfigWorkflow) -> ConfigWorkflow:
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def short(**overrides: Any) -> dict[str, Any]:
    """Few crops, one epoch, weak attacks."""
    few = {"train#cases": "$class_prompts.with_prompts(organ_crops.cases(@section, @dataset_dir)[::23], @templates)"}
    few |= {"max_epochs": 1, "val_interval": 1, "warmup_iterations": 0, "batch_size": 8, "val_every": 14}
    return {**few, "val_attack#steps": 1, **overrides}


@pytest.fixture(scope="module")
def trained(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    with torch.random.fork_rng():
        run(workflow(crops, out, "train", **short()))
    set_determinism(None)
    return out / "model.pt"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_training_from_chance_logs_clean_and_robust_accuracy(trained: Path) -> None:
    (row,) = rows(trained.parent / "log.csv")
    assert float(row["loss"]) > 0
    assert 0 <= float(row["val_top1_adv"]) <= float(row["val_top5"]) <= 1
    assert {path.name for path in trained.parent.iterdir()} == {"best.pt", "last.pt", "log.csv", "model.pt"}


@pytest.mark.parametrize("overlay", FINE)
def test_fine_tuning_leaves_the_texts_alone(crops: Path, trained: Path, tmp_path: Path, overlay: str) -> None:
    settings = short(pretrained=str(trained)) | ({} if overlay == "train_noise" else {"train_attack#steps": 1})
    run(workflow(crops, tmp_path, "train", overlay, **settings))
    before, after = (torch.load(path, weights_only=True) for path in (trained, tmp_path / "model.pt"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith(("clip.vision_model.", "clip.visual_projection.")) for name in changed)


def test_adapters_are_fine_tuned_on_a_base_that_stays(crops: Path, trained: Path, tmp_path: Path) -> None:
    settings = short(pretrained=str(trained), trainable="adapters", adapters=4) | {"train_attack#steps": 1}
    run(workflow(crops, tmp_path, "train", "train_adversarial", **settings))
    before, after = (torch.load(path, weights_only=True) for path in (trained, tmp_path / "model.pt"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"attn_adapters", "mlp_adapters"}


def test_every_attack_is_an_overlay_on_the_evaluation(crops: Path, trained: Path, tmp_path: Path) -> None:
    shared = {"ckpt_path": str(trained), "val_every": 14}
    clean = run(workflow(crops, tmp_path / "clean", "train", "evaluate", **shared)).evaluator.state.metrics
    assert set(clean) == {"val_top1", "val_top5"}
    for overlay in sorted(path.stem for path in CONFIGS.glob("attack_*.yaml")):
        weaker = {"attack#steps": 2} if overlay in ("attack_pgd", "attack_apgd") else {}
        flow = run(workflow(crops, tmp_path / overlay, "train", "evaluate", overlay, **shared, **weaker))
        metrics = flow.evaluator.state.metrics
        assert metrics["val_top1"] == clean["val_top1"], overlay
        assert metrics["val_top1_adv"] <= metrics["val_top5_adv"], overlay
        if overlay != "attack_gaussian_noise":
            assert 3.9 / 255 < metrics["val_linf_adv"] < 4.001 / 255, overlay
    assert (tmp_path / "clean" / "val_top1_raw.csv").is_file()


def test_the_comparison_is_the_evaluation_and_the_csv_holds_it(crops: Path, trained: Path, tmp_path: Path) -> None:
    shared = {"val_every": 14, "steps": 2, "apgd_steps": 3, "eps": [0.0157]}
    run(workflow(crops, tmp_path, "train", "compare", compared={"base": str(trained)}, **shared))
    (clean,) = (row for row in summary(read_csv(tmp_path / "records.csv")) if row.attack == "clean")
    flow = workflow(crops, tmp_path / "eval", "train", "evaluate", ckpt_path=str(trained), val_every=14)
    metrics = run(flow).evaluator.state.metrics
    assert (clean.top1, clean.top5) == pytest.approx((metrics["val_top1"], metrics["val_top5"]), abs=1e-6)
    assert (tmp_path / "table.md").is_file()
    assert (tmp_path / "curves.png").is_file()


def test_pictures_of_a_folder_are_named(crops: Path, trained: Path, tmp_path: Path) -> None:
    for number in range(2):
        levels = np.full((60, 50), 90 * number, dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(levels).save(tmp_path / "pictures" / f"{number}.png")
    settings = {"dataset_dir": str(tmp_path / "pictures"), "ckpt_path": str(trained)}
    run(workflow(crops, tmp_path, "inference", kind="infer", **settings))
    answers = rows(tmp_path / "answers.csv")
    assert [row["case"] for row in answers] == ["0", "1"]
    for row in answers:
        shares = [float(row[f"share_{place}"]) for place in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
        assert {row[f"class_{place}"] for place in range(1, 6)} <= set(organ_crops.CLASSES)


def test_metadata_and_configurations_tell_the_same() -> None:
    train, infer, meta = (
        yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
        for name in ("train.yaml", "inference.yaml", "metadata.json")
    )
    for key in ("base", "image_size", "class_names", "templates", "amp"):
        assert infer[key] == train[key], key
    shapes = meta["network_data_format"]
    assert shapes["inputs"]["image"]["spatial_shape"] == [train["image_size"]] * 2
    pred = shapes["outputs"]["pred"]
    assert list(pred["channel_def"].values()) == list(organ_crops.CLASSES)
    assert pred["num_channels"] == len(organ_crops.CLASSES)
    verify_net_in_out(
        "network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.yaml"),
        device="cpu",
    )


@pytest.mark.parametrize(
    "files", [("train",), ("train", "evaluate"), ("inference",), *((("train", one)) for one in FINE)]
)
def test_every_configuration_has_the_properties_that_monai_expects(
    crops: Path, trained: Path, tmp_path: Path, files: tuple[str, ...]
) -> None:
    kind = "infer" if files == ("inference",) else "train"
    settings: dict[str, Any] = {"ckpt_path": str(trained)}
    if kind == "train":
        settings |= {"train#dataset#cache_rate": 0.0, "validate#dataset#cache_rate": 0.0, "pretrained": str(trained)}
    else:
        settings |= {"dataset_dir": str(tmp_path)}
    flow = workflow(crops, tmp_path, *files, kind=kind, **settings)
    flow.initialize()
    assert flow.check_properties() == []
