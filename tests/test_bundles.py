"""Every bundle keeps MONAI's contract and runs: train, evaluate, infer, on real scans cut small."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_net_in_out
from monai.utils import set_determinism

from medrobust.data import acdc, btcv
from medrobust.data.ct_organs import CLASSES as CT_CLASSES

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
NAMES = sorted(path.parent.name for path in BUNDLES.glob("*/configs"))
VOLUMES = [name for name in NAMES if "unetr" in name]
"""Those of 3-D networks; bundles of images, and of images and prompts, are tested in files of their own."""
CLASSES = {"acdc_unetr_pp": acdc.CLASSES, "btcv_unetr": btcv.CLASSES, "ct_organs_unetr": CT_CLASSES}
INTENSITY = {"acdc_unetr_pp": ("lowest_percentile", "highest_percentile")}
SMALL: dict[str, Any] = {"network_def#feature_size": 4, "network_def#hidden_size": 24, "network_def#num_heads": 2}
SMALLER: dict[str, dict[str, Any]] = {
    "acdc_unetr_pp": {**SMALL, "network_def#depths": [1, 1, 1, 1], "network_def#proj_size": [4, 4, 4, 4]},
    "btcv_unetr": {**SMALL, "network_def#mlp_dim": 24},
    "ct_organs_unetr": {**SMALL, "network_def#mlp_dim": 24},
}
"""What makes each network small; ``ct_organs_unetr`` runs in its own size elsewhere."""
FILES = ("LICENSE", "configs/logging.conf", "configs/metadata.json", "configs/train.yaml", "configs/evaluate.yaml")
FILES = (*FILES, "configs/inference.yaml", "docs/README.md")

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
METADATA = {
    "type": "object",
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format", "changelog", "intended_use"],
    "properties": {
        **{key: {"type": "string", "minLength": 1} for key in (*TEXTS, "copyright", "intended_use")},
        "schema": {"const": "https://project-monai.github.io/schema/meta_schema_20240725.json"},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {"type": "object", "required": ["image"], "additionalProperties": TENSOR},
                "outputs": {"type": "object", "required": ["pred"], "additionalProperties": TENSOR},
            },
        },
    },
}
"""What MONAI's metadata schema of 2024-07-25 demands, and what we demand beyond it."""

ORGANS = {1: 1, 2: 2, 3: 3, 4: 4, 15: 5, 5: 6, 6: 7, 52: 8, 63: 9, 64: 10, 7: 11, 8: 12, 9: 13}
"""TotalSegmentator's id -> BTCV's."""


def metadata(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return content


def configs(name: str, *files: str) -> list[str]:
    return [str(BUNDLES / name / "configs" / file) for file in files]


def overlays(name: str) -> list[str]:
    """The configurations that go on top of ``evaluate.yaml``."""
    return sorted(path.name for path in (BUNDLES / name / "configs").glob("attack_*.yaml"))


def workflow(name: str, *files: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    files_ = configs(name, *files)
    meta = str(BUNDLES / name / "configs" / "metadata.json")
    return ConfigWorkflow(files_, meta_file=meta, logging_file=False, workflow_type=kind, **overrides)


def run(flow: ConfigWorkflow) -> ConfigWorkflow:
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def text_numbers(path: Path) -> list[str]:
    """Scalars of a YAML file that a reader takes for numbers and the parser for text, such as ``1e-4``, ``4/255``."""
    number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"

    def walk(item: Any) -> Iterator[str]:
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        for child in children:
            yield from walk(child)
        if isinstance(item, str) and re.fullmatch(rf"\s*{number}(\s*/\s*{number})?\s*", item):
            yield item

    return list(walk(yaml.safe_load(path.read_text(encoding="utf-8"))))


@pytest.fixture(autouse=True)
def _chance_as_it_was() -> Iterator[None]:
    """A workflow seeds everything, as bundles do; the next test finds it as it was."""
    with torch.random.fork_rng():
        yield
    set_determinism(None)


@pytest.fixture(scope="module")
def btcv_tree(ct_organs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real crops of CT A in BTCV's tree, classes and numbering, with a data list of their own."""
    tree = tmp_path_factory.mktemp("btcv")
    image, structures = (nib.load(ct_organs / f"{name}.nii.gz") for name in ("ct_a", "ct_a_structures"))
    table = np.zeros(256, dtype=np.uint8)
    table[list(ORGANS)] = list(ORGANS.values())
    starts = {"0005": (37, 26, 60), "0001": (41, 30, 64)}
    for number, start in starts.items():
        box = tuple(slice(first, first + 40) for first in start)
        for source, target in ((image, f"imagesTr/img{number}"), (structures, f"labelsTr/label{number}")):
            (tree / target).parent.mkdir(exist_ok=True)
            values = np.asarray(source.slicer[box].dataobj)
            affine = source.slicer[box].affine
            values = table[values] if "label" in target else values.astype(np.int16)
            nib.save(nib.Nifti1Image(values, affine), tree / f"{target}.nii.gz")
    split = {
        section: [{"image": f"imagesTr/img{number}.nii.gz", "label": f"labelsTr/label{number}.nii.gz"}]
        for section, number in (("training", "0005"), ("validation", "0001"))
    }
    (tree / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return tree


@pytest.fixture(scope="module")
def acdc_tree(ct_organs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two crops of MR D, every second slice, in ACDC's tree and classes; three of its structures play the heart."""
    tree = tmp_path_factory.mktemp("acdc")
    image, label = (nib.load(ct_organs / f"{name}.nii.gz") for name in ("mr_d", "mr_d_label"))
    boxes = {1: (slice(0, 109), slice(0, 88), slice(0, 19, 2)), 2: (slice(6, 115), slice(3, 91), slice(1, 20, 2))}
    for number, box in boxes.items():
        name = f"patient{number:03d}"
        (tree / "training" / name).mkdir(parents=True)
        (tree / "training" / name / "Info.cfg").write_text("ED: 1\nES: 12\nNbFrame: 30\n", encoding="utf-8")
        values = np.asarray(label.slicer[box].dataobj)
        structures = np.where(values <= 3, values, 0).astype(np.uint8)
        for frame in ("frame01", "frame12"):
            stem = tree / "training" / name / f"{name}_{frame}"
            nib.save(image.slicer[box], f"{stem}.nii.gz")
            nib.save(nib.Nifti1Image(structures, image.slicer[box].affine), f"{stem}_gt.nii.gz")
    first, _, second, _ = acdc.cases(tree)
    (tree / "split.json").write_text(json.dumps({"training": [first], "validation": [second]}), encoding="utf-8")
    return tree


@pytest.fixture(scope="module")
def settings(
    ct_organs: Path, btcv_tree: Path, acdc_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What makes each bundle small: overrides for every configuration, with random weights of the small network."""
    small: dict[str, dict[str, Any]] = {
        name: {"dataset_dir": str(tree), "listing": str(tree / "split.json"), **SMALLER[name]}
        for name, tree in (("acdc_unetr_pp", acdc_tree), ("btcv_unetr", btcv_tree))
    }
    small |= {
        "ct_organs_unetr": {"dataset_dir": str(ct_organs)},
    }
    for name, overrides in small.items():
        parser = ConfigParser(yaml.safe_load(Path(configs(name, "train.yaml")[0]).read_text(encoding="utf-8")))
        parser.update({key: value for key, value in overrides.items() if key in SMALLER[name]})
        weights = tmp_path_factory.mktemp(name) / "random.pt"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(parser.get_parsed_content("network_def").state_dict(), weights)
        overrides |= {"ckpt_path": str(weights), "device": "$torch.device('cpu')", "bundle_root": str(BUNDLES / name)}
    return small


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_has_its_files_and_names_its_version(name: str) -> None:
    missing = [file for file in FILES if not (BUNDLES / name / file).is_file()]
    assert not missing
    assert metadata(name)["version"] in metadata(name)["changelog"]


@pytest.mark.parametrize("name", NAMES)
def test_metadata_keeps_the_schema(name: str) -> None:
    jsonschema.validate(metadata(name), METADATA)
    broken = metadata(name)
    broken["network_data_format"]["inputs"]["image"]["num_channels"] = "1"
    with pytest.raises(jsonschema.ValidationError, match="not of type 'integer'"):
        jsonschema.validate(broken, METADATA)


@pytest.mark.parametrize("name", VOLUMES)
def test_metadata_and_configurations_tell_the_same(name: str) -> None:
    train, infer = (
        yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in configs(name, "train.yaml", "inference.yaml")
    )
    for key in ("network_def", "spacing", "roi_size", *INTENSITY.get(name, ("hu_min", "hu_max")), "num_classes", "amp"):
        assert infer[key] == train[key], key
    assert infer["inferer"] == train["validate"]["inferer"]
    shapes = metadata(name)["network_data_format"]
    image, pred = shapes["inputs"]["image"], shapes["outputs"]["pred"]
    assert image["spatial_shape"] == pred["spatial_shape"] == train["roi_size"]
    assert pred["num_channels"] == train["num_classes"]
    assert pred["channel_def"] == {str(value): organ for value, organ in enumerate(CLASSES[name])}
    assert all(f"{value} {organ}" in metadata(name)["label_classes"] for value, organ in enumerate(CLASSES[name]))


@pytest.mark.parametrize(
    "path", sorted(BUNDLES.glob("*/configs/*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_every_number_is_a_number(path: Path) -> None:
    assert text_numbers(path) == []


def test_a_number_that_is_text_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1e-4\nb: [{c: 4/255}, '7', 1.0e-4, $4 / 255, '@a', 3]\n", encoding="utf-8")
    assert text_numbers(tmp_path / "x.yaml") == ["1e-4", "4/255", "7"]


@pytest.mark.parametrize("name", VOLUMES)
def test_the_network_takes_and_gives_what_the_metadata_says(name: str) -> None:
    meta, config = str(BUNDLES / name / "configs" / "metadata.json"), configs(name, "inference.yaml")
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    wrong = {**SMALLER[name], "network_def#out_channels": 3}
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu", **wrong)


@pytest.mark.parametrize(("name", "size"), [("btcv_unetr", 92_802_478), ("acdc_unetr_pp", 66_796_012)])
def test_the_network_has_the_published_size(name: str, size: int) -> None:
    parser = ConfigParser(yaml.safe_load(Path(configs(name, "train.yaml")[0]).read_text(encoding="utf-8")))
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert sum(value.numel() for value in network.parameters()) == size


def test_export_gives_the_same_network(settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    name, target = "ct_organs_unetr", tmp_path / "model.ts"
    weights = settings[name]["ckpt_path"]
    ckpt_export(
        "network_def",
        filepath=str(target),
        ckpt_file=weights,
        meta_file=str(BUNDLES / name / "configs" / "metadata.json"),
        config_file=configs(name, "inference.yaml"),
    )
    parser = ConfigParser(yaml.safe_load(Path(configs(name, "train.yaml")[0]).read_text(encoding="utf-8")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.rand((1, 1, *parser["roi_size"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(target))(image), network(image), rtol=1e-4, atol=1e-4)


REGIMES = {"adversarial": [], "noise": [], "vaft": ["loss_clean", "loss_adv", "loss_fr"]}
"""What every bundle can train beside clean images, and the terms that its log has."""

COMBINATIONS = [
    (name, files, kind)
    for name in VOLUMES
    for files, kind in [
        (("train.yaml",), "train"),
        (("train.yaml", "evaluate.yaml"), "train"),
        (("inference.yaml",), "infer"),
        *((("train.yaml", f"train_{regime}.yaml"), "train") for regime in REGIMES),
        *((("train.yaml", "evaluate.yaml", overlay), "train") for overlay in overlays(name)),
    ]
]


@pytest.mark.parametrize(
    ("name", "files", "kind"), COMBINATIONS, ids=lambda item: item[-1] if isinstance(item, tuple) else item
)
def test_every_configuration_has_the_properties_that_monai_expects(
    name: str, files: tuple[str, ...], kind: str, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    overrides = {**settings[name], "output_dir": str(tmp_path)}
    if kind == "train":
        overrides |= {"train#dataset#cache_rate": 0.0, "validate#dataset#cache_rate": 0.0}
    flow = workflow(name, *files, kind=kind, **overrides)
    flow.initialize()
    assert flow.check_properties() == []


def short(name: str, settings: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Overrides for an epoch of one or two iterations and a weak attack."""
    overrides = {**settings[name], "max_epochs": 1, "val_interval": 1, "crops_per_case": 1, "output_dir": str(folder)}
    overrides["val_attack#steps"] = 1
    if name == "ct_organs_unetr":
        return overrides | {"iterations_per_epoch": 2, "warmup_iterations": 0, "ema_momentum": 0.9999}
    return overrides | {"warmup_epochs": 0}


@pytest.mark.parametrize("name", VOLUMES)
def test_training_takes_a_step_and_saves_what_evaluation_loads(
    name: str, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    flow = run(workflow(name, "train.yaml", **short(name, settings, tmp_path)))
    trainer, evaluator = flow.trainer, flow.evaluator
    assert trainer.state.iteration == (2 if name == "ct_organs_unetr" else 1)
    assert np.isfinite(trainer.state.output[0]["loss"])
    metrics = evaluator.state.metrics
    assert 0 <= metrics["val_mean_dice"] <= 1
    assert 0 <= metrics["val_mean_dice_adv"] <= 1
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text(encoding="utf-8").splitlines())
    assert float(row["val_mean_dice_adv"]) == pytest.approx(metrics["val_mean_dice_adv"])
    saved, best = (torch.load(tmp_path / file, weights_only=True) for file in ("model.pt", "best.pt"))
    own = flow.network_def.state_dict()
    assert saved.keys() == best.keys() == own.keys()
    # Where a bundle keeps a running average, it is nothing but the last weights here.
    assert all(torch.allclose(saved[key], own[key], atol=1e-6) and torch.equal(best[key], own[key]) for key in own)
    started_from = torch.load(settings[name]["ckpt_path"], weights_only=True)
    assert any(not torch.equal(saved[key], started_from[key]) for key in own)


def test_the_kept_weights_are_a_running_average(settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """After one iteration, momentum 1/4: three parts of where it began, one part of where it is."""
    name = "ct_organs_unetr"
    overrides = short(name, settings, tmp_path) | {"iterations_per_epoch": 1, "ema_momentum": 0.25, "val_interval": 9}
    flow = run(workflow(name, "train.yaml", **overrides, pretrained=settings[name]["ckpt_path"]))
    first = torch.load(settings[name]["ckpt_path"], weights_only=True)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for key, now in flow.network_def.named_parameters():
        torch.testing.assert_close(saved[key], 0.75 * first[key] + 0.25 * now.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", VOLUMES)
def test_every_regime_trains_from_given_weights(
    name: str, regime: str, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    overrides = short(name, settings, tmp_path) | {"pretrained": settings[name]["ckpt_path"], "val_interval": 9}
    if regime != "noise":
        overrides |= {"train_attack#steps": 1, "train_attack#block_size": [8, 8, 8]}
    flow = run(workflow(name, "train.yaml", f"train_{regime}.yaml", **overrides))
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text(encoding="utf-8").splitlines())
    assert [key for key in row if key.startswith("loss_")] == REGIMES[regime]
    if regime == "vaft":
        parts = [float(row[key]) for key in REGIMES["vaft"]]
        weights = (1, flow.parser.get("adversarial_weight", 1), flow.parser["frequency_weight"])
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
        assert parts[2] > 0
    started_from = torch.load(settings[name]["ckpt_path"], weights_only=True)
    moved = max((now - started_from[key]).abs().max().item() for key, now in flow.network_def.named_parameters())
    assert 0 < moved < 0.1  # random weights would be further away


@pytest.mark.parametrize(
    "network",
    [
        {"_target_": "SegResNet", "in_channels": 1, "out_channels": 5, "init_filters": 8},
        {"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 5, "feature_size": 12},
        {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 5,
            "channels": [4, 8, 16],
            "strides": [2, 2],
        },
    ],
    ids=lambda network: str(network["_target_"]),
)
def test_another_network_is_one_override(
    network: dict[str, Any], settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    name = "ct_organs_unetr"
    overrides = short(name, settings, tmp_path) | {"network_def": network, "pretrained": None, "val_interval": 9}
    overrides |= {"train_attack#steps": 1, "roi_size": [64, 64, 32], "iterations_per_epoch": 1}
    flow = run(workflow(name, "train.yaml", "train_vaft.yaml", **overrides))
    assert type(flow.network_def).__name__ == network["_target_"]
    assert flow.trainer.state.iteration == 1


def test_the_last_epochs_of_the_shipped_weights_can_be_trained_again(
    settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    name = "ct_organs_unetr"
    overrides = short(name, settings, tmp_path) | {"pretrained": str(BUNDLES / name / "models" / "vaft.pt")}
    overrides |= {"train_attack#steps": 1, "iterations_per_epoch": 1, "val_interval": 9}
    flow = run(workflow(name, "train.yaml", "train_vaft.yaml", "train_vaft_finish.yaml", **overrides))
    output = flow.trainer.state.output[0]
    # The overlay's weight on attacked images, and the published one on the frequency term.
    total = output["loss_clean"] + 4 * output["loss_adv"] + output["loss_fr"]
    assert float(output["loss"]) == pytest.approx(float(total), rel=1e-5)


def test_two_processes_train_a_bundle_together(settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """As the model zoo does it: torchrun, DistributedDataParallel, one checkpoint and one log."""
    name = "ct_organs_unetr"
    files = [f"configs/{file}.yaml" for file in ("train", "train_vaft", "multi_gpu_train")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(files)]
    overrides = short(name, settings, tmp_path) | {"train_attack#steps": 1}
    for key in ("bundle_root", "device"):
        del overrides[key]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(BUNDLES.parent), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=BUNDLES / name, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text(encoding="utf-8").splitlines())
    assert row["iteration"] == "2"  # each
    # The second of two steps of each, so halfway down the cosine: the schedule ends where the training does.
    assert float(row["lr"]) == pytest.approx(0.0005)
    names = torch.load(tmp_path / "model.pt", weights_only=True).keys()
    assert not any(key.startswith("module.") for key in names)


def test_a_training_on_its_own_validation_patients_stops_before_it_starts(
    acdc_tree: Path, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    diastole, systole = acdc.cases(acdc_tree)[:2]
    (tmp_path / "split.json").write_text(
        json.dumps({"training": [diastole], "validation": [systole]}), encoding="utf-8"
    )
    overrides = {**settings["acdc_unetr_pp"], "listing": str(tmp_path / "split.json"), "output_dir": str(tmp_path)}
    with pytest.raises(RuntimeError) as caught:
        workflow("acdc_unetr_pp", "train.yaml", **overrides).initialize()
    assert "1 values of 'patient' in both lists (patient001)" in str(caught.value.__cause__)
    assert not (tmp_path / "model.pt").exists()


# CT A shows no oesophagus, so that organ's Dice is undefined and its summary over one case is empty.
@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning", "ignore:.*NaN:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Degrees of freedom:RuntimeWarning")
@pytest.mark.parametrize("name", VOLUMES)
def test_evaluation_and_inference_save_one_segmentation_on_the_scans_own_grid(
    name: str, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Two configurations that share no line of text give the same voxels, and every number lands in the tables."""
    overrides = settings[name]
    flow = run(workflow(name, "train.yaml", "evaluate.yaml", **overrides, output_dir=str(tmp_path / "evaluation")))
    scan = Path(flow.val_dataset_data[0]["image"])
    infer = {key: value for key, value in overrides.items() if key != "listing"}
    run(workflow(name, "inference.yaml", kind="infer", **infer, output_dir=str(tmp_path / "out"), pattern=scan.name))

    stem = scan.name.removesuffix(".nii.gz")
    evaluated = nib.load(tmp_path / "evaluation" / f"{stem}_seg.nii.gz")
    (found,) = (tmp_path / "out").rglob("*.nii.gz")
    assert found.relative_to(tmp_path / "out").parent == scan.relative_to(overrides["dataset_dir"]).parent
    inferred, original = nib.load(found), nib.load(scan)
    for saved in (evaluated, inferred):
        assert saved.shape == original.shape
        assert saved.get_data_dtype() == np.uint8
        np.testing.assert_allclose(saved.affine, original.affine, atol=1e-4)
    values = np.asarray(evaluated.dataobj)
    np.testing.assert_array_equal(values, np.asarray(inferred.dataobj))
    assert len(np.unique(values)) > 1

    with (tmp_path / "evaluation" / "val_mean_dice_raw.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    classes = [float(value) for key, value in row.items() if key.startswith("class")]
    assert len(classes) == len(CLASSES[name]) - 1
    assert flow.evaluator.state.metrics["val_mean_dice"] == pytest.approx(np.nanmean(classes), abs=1e-4)


def test_the_command_line_of_monai_runs_a_bundle(btcv_tree: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    overrides = {key: value for key, value in settings["btcv_unetr"].items() if key != "listing"}
    overrides |= {"output_dir": str(tmp_path), "pattern": "img0001.nii.gz"}
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(BUNDLES.parent)}
    done = subprocess.run(
        command, cwd=BUNDLES / "btcv_unetr", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "imagesTr" / "img0001_seg.nii.gz").is_file()


def test_btcvs_learning_rate_is_the_published_one() -> None:
    """Every epoch against the published recurrence (LinearWarmupCosineAnnealingLR, stepped once an epoch)."""
    parser = ConfigParser(yaml.safe_load(Path(configs("btcv_unetr", "train.yaml")[0]).read_text(encoding="utf-8")))
    parser.update({**SMALLER["btcv_unetr"], "device": "cpu"})
    parser.parse()
    schedule, optimizer = (parser.get_parsed_content(key) for key in ("lr_scheduler", "optimizer"))
    peak, warmup, epochs = 1e-4, 50, 5000
    expected, found = [0.0], []
    for e in range(1, epochs):
        if e < warmup:
            expected.append(expected[-1] + peak / (warmup - 1))
        elif e == warmup:
            expected.append(peak)
        else:
            now, before = (1 + math.cos(math.pi * (k - warmup) / (epochs - warmup)) for k in (e, e - 1))
            expected.append(now / before * expected[-1])
    for _ in range(epochs):
        found += [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    # What the published code gave when it was run.
    known = {0: 0.0, 1: 2.0408e-6, 49: 1e-4, 50: 1e-4, 1000: 9.1184e-5, 2525: 5e-5, 4999: 1.007e-11}
    assert {e: found[e] for e in known} == pytest.approx(known, rel=1e-4)


def test_btcvs_published_split_is_18_and_12_of_30_scans(tmp_path: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for number in (*range(1, 11), *range(21, 41)):
        (tmp_path / f"imagesTr/img{number:04d}.nii.gz").touch()
        (tmp_path / f"labelsTr/label{number:04d}.nii.gz").touch()
    training, validation = (btcv.datalist(tmp_path, section) for section in ("training", "validation"))
    assert (len(training), len(validation)) == (18, 12)
    images = {case["image"] for case in (*training, *validation)}
    assert images == {str(path) for path in (tmp_path / "imagesTr").iterdir()}
    assert validation[0] == {
        "image": str(tmp_path / "imagesTr/img0001.nii.gz"),
        "label": str(tmp_path / "labelsTr/label0001.nii.gz"),
    }
    (tmp_path / "labelsTr/label0040.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"18 cases.*got 1 files missing.*label0040"):
        btcv.datalist(tmp_path, "training")


def test_btcvs_door_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="set dataset_dir or MEDROBUST_BTCV"):
        btcv.datalist(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a section among training, validation, got 'test'"):
        btcv.datalist(tmp_path, "test")
    monkeypatch.setenv("MEDROBUST_BTCV", str(tmp_path))
    assert btcv.folder() == tmp_path
    monkeypatch.delenv("MEDROBUST_BTCV")
    assert btcv.folder() == Path("data/btcv")
