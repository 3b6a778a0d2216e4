"""Every bundle keeps MONAI's contract and runs: train, evaluate, infer, on real scans cut small."""

from __future__ import annotations

import csv
import json
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

from medrobust.data import btcv
from medrobust.data.ct_organs import CLASSES as CT_CLASSES

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
NAMES = sorted(path.parent.name for path in BUNDLES.glob("*/configs"))
CLASSES = {"btcv_unetr": btcv.CLASSES, "ct_organs_unetr": CT_CLASSES}
SMALL = {"network_def#feature_size": 4, "network_def#hidden_size": 24, "network_def#mlp_dim": 24}
SMALL["network_def#num_heads"] = 2
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
def settings(ct_organs: Path, btcv_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What makes each bundle small: overrides for every configuration, with random weights of the small network."""
    small: dict[str, dict[str, Any]] = {
        "btcv_unetr": {"dataset_dir": str(btcv_tree), "listing": str(btcv_tree / "split.json"), **SMALL},
        "ct_organs_unetr": {"dataset_dir": str(ct_organs)},
    }
    for name, overrides in small.items():
        parser = ConfigParser(yaml.safe_load(Path(configs(name, "train.yaml")[0]).read_text(encoding="utf-8")))
        parser.update({key: value for key, value in overrides.items() if key in SMALL})
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


@pytest.mark.parametrize("name", NAMES)
def test_metadata_and_configurations_tell_the_same(name: str) -> None:
    train, infer = (
        yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in configs(name, "train.yaml", "inference.yaml")
    )
    for key in ("network_def", "spacing", "roi_size", "hu_min", "hu_max", "num_classes", "amp"):
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


@pytest.mark.parametrize("name", NAMES)
def test_the_network_takes_and_gives_what_the_metadata_says(name: str) -> None:
    meta, config = str(BUNDLES / name / "configs" / "metadata.json"), configs(name, "inference.yaml")
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    with pytest.raises(ValueError, match="output channel number"):
        verify_net_in_out(
            "network_def", meta_file=meta, config_file=config, device="cpu", **SMALL, **{"network_def#out_channels": 3}
        )


def test_the_btcv_network_has_the_published_size() -> None:
    parser = ConfigParser(yaml.safe_load(Path(configs("btcv_unetr", "train.yaml")[0]).read_text(encoding="utf-8")))
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert sum(value.numel() for value in network.parameters()) == 92_802_478


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


COMBINATIONS = [
    (name, files, kind)
    for name in NAMES
    for files, kind in [
        (("train.yaml",), "train"),
        (("train.yaml", "evaluate.yaml"), "train"),
        (("inference.yaml",), "infer"),
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


@pytest.mark.parametrize("name", NAMES)
def test_training_takes_a_step_and_saves_what_evaluation_loads(
    name: str, settings: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    overrides = {**settings[name], "max_epochs": 1, "val_interval": 1, "crops_per_case": 1, "output_dir": str(tmp_path)}
    if name == "ct_organs_unetr":
        overrides |= {"iterations_per_epoch": 2, "warmup_iterations": 0}
    else:
        overrides["warmup_epochs"] = 0
    flow = run(workflow(name, "train.yaml", **overrides))
    trainer, evaluator = flow.trainer, flow.evaluator
    assert trainer.state.iteration == (2 if name == "ct_organs_unetr" else 1)
    assert np.isfinite(trainer.state.output[0]["loss"])
    assert 0 <= evaluator.state.metrics["val_mean_dice"] <= 1
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    own = flow.network_def.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in own)
    started_from = torch.load(settings[name]["ckpt_path"], weights_only=True)
    assert any(not torch.equal(saved[key], started_from[key]) for key in own)


# CT A shows no oesophagus, so that organ's Dice is undefined and its summary over one case is empty.
@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning", "ignore:.*NaN:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Degrees of freedom:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
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
