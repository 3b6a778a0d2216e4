"""Bundles of 2-D networks run: clean and adversarial training, evaluation, attacks, inference."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
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

from medrobust.data import ade20k, ct_slice_maps, voc
from medrobust.networks.published import renamed
from medrobust.networks.segmenter import PUBLISHED
from medrobust.networks.upernet import CHECKPOINT

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
UPERNET = {"network_def#depths": [1, 1, 1, 1], "network_def#hidden_sizes": [4, 4, 8, 8], "network_def#hidden_size": 8}
SEGMENTER = {"network_def#hidden_size": 12, "network_def#num_layers": 1, "network_def#num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "upernet_convnext": UPERNET,
    "segmenter_vit": SEGMENTER,
    "ct_slices_upernet": UPERNET,
}
PICTURES = ("upernet_convnext", "segmenter_vit")
DATA = {"upernet_convnext": "voc", "segmenter_vit": "ade20k"}
CLASSES = {"upernet_convnext": voc.CLASSES, "segmenter_vit": ade20k.CLASSES, "ct_slices_upernet": ct_slice_maps.CLASSES}
SIZES = {"upernet_convnext": 60_181_610, "segmenter_vit": 26_034_350}
REGIMES = ("adversarial", "adversarial_as_published")


@pytest.fixture(autouse=True)
def _chance_as_it_was() -> Any:
    with torch.random.fork_rng():
        yield
    set_determinism(None)


def configs(name: str, *files: str) -> list[str]:
    return [str(BUNDLES / name / "configs" / file) for file in files]


def overlays(name: str) -> list[str]:
    return sorted(path.name for path in (BUNDLES / name / "configs").glob("attack_*.yaml"))


def workflow(name: str, *files: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        configs(name, *files),
        meta_file=str(BUNDLES / name / "configs" / "metadata.json"),
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


def content(name: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(configs(name, file)[0]).read_text(encoding="utf-8"))
    return found


def log(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log.csv").read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six small photographs in both data sets' trees: a bright square is class 1, its border is VOC's void."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    devkit, challenge = root / "VOC2012", root / "ADEChallengeData2016"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    for number in range(6):
        image = rng.integers(0, 90, (48, 60, 3), dtype=np.uint8)
        label = np.zeros((48, 60), np.uint8)
        label[8:40, 10 + number : 44] = 255
        label[10:38, 12 + number : 42] = 1
        image[label > 0] += 120
        section, short = ("training", "train") if number < 4 else ("validation", "val")
        name = f"ADE_{short}_{number:08d}"
        for path in (devkit / "JPEGImages" / f"{number}.jpg", challenge / "images" / section / f"{name}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        map_path = challenge / "annotations" / section / f"{name}.png"
        map_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(label == 255, 0, label).astype(np.uint8)).save(map_path)
        Image.fromarray(label).save(devkit / "SegmentationClass" / f"{number}.png")
        with (devkit / "ImageSets" / "Segmentation" / f"{short}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{number}\n")
    return {"voc": devkit, "ade20k": challenge}


def small(name: str, folder: Path, data: dict[str, Path], ct_organs: Path | None = None) -> dict[str, Any]:
    """Overrides that every configuration but inference takes."""
    found = {**SMALL[name], "output_dir": str(folder), "device": "$torch.device('cpu')"}
    if name == "ct_slices_upernet":
        return found | {"dataset_dir": str(ct_organs), "image_size": 32, "every": 28, "val_every": 10}
    return found | {"dataset_dir": str(data[DATA[name]]), "base_size": 40, "crop_size": 32, "num_workers": 0}


def short(name: str) -> dict[str, Any]:
    """Overrides for one epoch of two iterations."""
    found: dict[str, Any] = {"max_epochs": 1, "val_interval": 1, "batch_size": 2}
    if name == "ct_slices_upernet":
        return found | {"warmup_iterations": 0}
    return found | {"warmup_epochs": 0, "val_attack#steps": 1}


def weights(name: str, folder: Path, data: dict[str, Path], ct_organs: Path) -> Path:
    """Random weights of the small network."""
    parser = ConfigParser(content(name, "train.yaml"))
    parser.update(small(name, folder, data, ct_organs))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "random.pt")
    return folder / "random.pt"


@pytest.mark.parametrize("name", SMALL)
def test_metadata_and_configurations_tell_the_same(name: str) -> None:
    train, infer = (content(name, file) for file in ("train.yaml", "inference.yaml"))
    assert infer["num_classes"] == train["num_classes"] == len(CLASSES[name])
    assert infer["network_def"] == train["network_def"]
    meta = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text(encoding="utf-8"))
    image, pred = (meta["network_data_format"][key] for key in ("inputs", "outputs"))
    size = train.get("crop_size", train.get("image_size"))
    assert image["image"]["spatial_shape"] == pred["pred"]["spatial_shape"] == [size, size]
    assert image["image"]["num_channels"] == train["network_def"].get("in_channels", 3)
    assert pred["pred"]["channel_def"] == {str(value): label for value, label in enumerate(CLASSES[name])}


@pytest.mark.parametrize("name", PICTURES)
def test_the_network_has_the_published_size(name: str) -> None:
    parser = ConfigParser(content(name, "train.yaml"))
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert sum(value.numel() for value in network.parameters()) == SIZES[name]


COMBINATIONS = [
    (name, files, kind)
    for name in SMALL
    for files, kind in [
        (("train.yaml",), "train"),
        (("train.yaml", "train_adversarial.yaml"), "train"),
        (("train.yaml", "train_adversarial.yaml", "train_adversarial_as_published.yaml"), "train"),
        (("train.yaml", "evaluate.yaml"), "train"),
        (("inference.yaml",), "infer"),
        *((("train.yaml", "evaluate.yaml", overlay), "train") for overlay in overlays(name)),
    ]
]
COMBINATIONS += [
    ("ct_slices_upernet", ("train.yaml", "train_adversarial.yaml", "train_backbone.yaml"), "train"),
    ("upernet_convnext", ("train.yaml", "data_ade20k.yaml", "train_adversarial.yaml"), "train"),
    ("segmenter_vit", ("train.yaml", "data_voc.yaml", "train_adversarial.yaml"), "train"),
]


@pytest.mark.parametrize(
    ("name", "files", "kind"), COMBINATIONS, ids=lambda item: item[-1] if isinstance(item, tuple) else item
)
def test_every_configuration_has_the_properties_that_monai_expects(
    name: str, files: tuple[str, ...], kind: str, pictures: dict[str, Path], ct_organs: Path, tmp_path: Path
) -> None:
    overrides = small(name, tmp_path, pictures, ct_organs)
    overrides["ckpt_path"] = str(weights(name, tmp_path, pictures, ct_organs))
    for data in ("ade20k", "voc"):
        if f"data_{data}.yaml" in files:
            overrides["dataset_dir"] = str(pictures[data])
    if "train_backbone.yaml" in files:
        overrides["network_def#num_classes"] = 4
    if kind == "infer":
        overrides = {key: value for key, value in overrides.items() if key not in ("base_size", "num_workers", "every")}
        overrides = {key: value for key, value in overrides.items() if key != "val_every"}
    flow = workflow(name, *files, kind=kind, **overrides)
    flow.initialize()
    assert flow.check_properties() == []


@pytest.mark.parametrize("name", SMALL)
def test_a_network_trains_clean_and_adversarially_and_is_evaluated(
    name: str, pictures: dict[str, Path], ct_organs: Path, tmp_path: Path
) -> None:
    metric = "val_mean_dice" if name == "ct_slices_upernet" else "val_miou"
    flow = run(workflow(name, "train.yaml", **small(name, tmp_path / "clean", pictures, ct_organs), **short(name)))
    assert flow.trainer.state.iteration == 2
    (row,) = log(tmp_path / "clean")
    assert 0 <= float(row[f"{metric}_adv"]) <= 1
    assert ("loss_aux" in row) == (name != "segmenter_vit")

    clean = torch.load(tmp_path / "clean" / "model.pt", weights_only=True)
    moved = {}
    for regime, files in zip(REGIMES, (REGIMES[:1], REGIMES), strict=True):
        overrides = small(name, tmp_path / regime, pictures, ct_organs) | short(name)
        overrides |= {"train_attack#steps": 2, "pretrained": str(tmp_path / "clean" / "model.pt")}
        flow = run(workflow(name, "train.yaml", *(f"train_{file}.yaml" for file in files), **overrides))
        image, image_clean = (flow.trainer.state.batch[0][key].as_tensor() for key in ("image", "image_clean"))
        assert 0.01 < (image - image_clean).abs().max().item() < 4.01 / 255
        moved[regime] = {key: value - clean[key] for key, value in flow.network_def.named_parameters()}
    assert any(not torch.allclose(value, moved[REGIMES[1]][key], atol=1e-6) for key, value in moved[REGIMES[0]].items())

    overrides = small(name, tmp_path / "eval", pictures, ct_organs) | {"ckpt_path": str(tmp_path / "clean/model.pt")}
    flow = run(workflow(name, "train.yaml", "evaluate.yaml", "attack_pgd.yaml", **overrides, **{"attack#steps": 2}))
    metrics = flow.evaluator.state.metrics
    assert metrics[metric] == pytest.approx(float(log(tmp_path / "clean")[0][metric]), abs=1e-6)
    eps = 4 / 255 if name == "ct_slices_upernet" else 8 / 255
    assert metrics["val_linf_adv"] == pytest.approx(eps, abs=1e-6)


def test_a_robust_backbone_starts_a_segmentation(ct_organs: Path, tmp_path: Path) -> None:
    name = "ct_slices_upernet"
    overrides = small(name, tmp_path / "backbone", {}, ct_organs) | short(name) | {"train_attack#steps": 1}
    files = ("train.yaml", "train_adversarial.yaml", "train_backbone.yaml")
    flow = run(workflow(name, *files, **overrides))
    assert type(flow.network_def).__name__ == "UPerNetClassifier"
    item = flow.trainer.state.batch[0]
    assert item["label"].shape == (4, 32, 32)
    assert torch.equal(item["label"], item["label"][..., :1, :1].expand_as(item["label"]))
    (row,) = log(tmp_path / "backbone")
    assert "loss_aux" not in row
    backbone = torch.load(tmp_path / "backbone" / "model.pt", weights_only=True)

    overrides = small(name, tmp_path / "pir", {}, ct_organs) | short(name) | {"train_attack#steps": 1}
    overrides["pretrained_backbone"] = str(tmp_path / "backbone" / "model.pt")
    flow = workflow(name, "train.yaml", "train_adversarial.yaml", **overrides)
    flow.initialize()
    own = flow.network_def.state_dict()
    assert all(torch.equal(own[key], value) for key, value in backbone.items() if key.startswith("backbone."))


@pytest.mark.parametrize("name", PICTURES)
def test_the_other_data_set_is_one_overlay(name: str, pictures: dict[str, Path], tmp_path: Path) -> None:
    other = "ade20k" if name == "upernet_convnext" else "voc"
    overrides = small(name, tmp_path, pictures) | short(name) | {"dataset_dir": str(pictures[other]), "max_epochs": 1}
    flow = run(workflow(name, "train.yaml", f"data_{other}.yaml", **overrides))
    assert flow.trainer.state.output[0]["pred"].shape[0] == (151 if other == "ade20k" else 21)
    void = any((item["label"] == -1).any() for item in flow.evaluator.state.dataloader.dataset)
    assert void == (other == "voc")


@pytest.mark.parametrize("name", PICTURES)
def test_inference_saves_class_numbers_at_the_pictures_own_size(
    name: str, pictures: dict[str, Path], ct_organs: Path, tmp_path: Path
) -> None:
    folder = pictures["voc"] / "JPEGImages"
    overrides = {**SMALL[name], "output_dir": str(tmp_path), "dataset_dir": str(folder), "pattern": "[01].jpg"}
    overrides |= {"device": "$torch.device('cpu')", "ckpt_path": str(weights(name, tmp_path, pictures, ct_organs))}
    if name == "segmenter_vit":
        overrides["crop_size"] = 32
    flow = run(workflow(name, "inference.yaml", kind="infer", **overrides))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0.png", "1.png"]
    saved = np.asarray(Image.open(tmp_path / "1.png"))
    image = np.moveaxis(np.asarray(Image.open(folder / "1.jpg")) / np.float32(255), -1, 0)
    with torch.no_grad():
        expected = flow.network_def.eval()(torch.from_numpy(image)[None]).argmax(1)[0]
    np.testing.assert_array_equal(saved, expected.numpy())


@pytest.mark.parametrize("name", PICTURES)
def test_published_weights_are_one_overlay(
    name: str, pictures: dict[str, Path], ct_organs: Path, tmp_path: Path
) -> None:
    random = torch.load(weights(name, tmp_path, pictures, ct_organs), weights_only=True)
    rules = CHECKPOINT if name == "upernet_convnext" else PUBLISHED
    theirs = {renamed(key, rules): value for key, value in random.items()}
    assert theirs.keys() != random.keys()
    torch.save(theirs, tmp_path / "published.pth")
    overrides = small(name, tmp_path, pictures) | {"published_path": str(tmp_path / "published.pth")}
    flow = workflow(name, "train.yaml", "evaluate.yaml", "published.yaml", **overrides)
    flow.initialize()
    assert all(torch.equal(value, random[key]) for key, value in flow.network_def.state_dict().items())


def test_a_training_list_with_validation_pictures_is_refused(pictures: dict[str, Path], tmp_path: Path) -> None:
    overrides = small("upernet_convnext", tmp_path, pictures) | {"train_section": "val"}
    with pytest.raises(RuntimeError) as caught:
        workflow("upernet_convnext", "train.yaml", **overrides).initialize()
    assert "2 values of 'case' in both lists" in str(caught.value.__cause__)


def test_evaluation_and_inference_give_the_same_classes(ct_organs: Path, tmp_path: Path) -> None:
    name = "ct_slices_upernet"
    overrides = small(name, tmp_path / "eval", {}, ct_organs)
    overrides["ckpt_path"] = str(weights(name, tmp_path, {}, ct_organs))
    run(workflow(name, "train.yaml", "evaluate.yaml", **overrides))
    infer = {key: value for key, value in overrides.items() if key not in ("every", "val_every")}
    infer |= {"dataset_dir": str(ct_organs), "pattern": "ct_b.nii.gz", "output_dir": str(tmp_path / "out")}
    run(workflow(name, "inference.yaml", kind="infer", **infer))
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 20
    for file in ("ct_b_slice000_seg.nii.gz", "ct_b_slice010_seg.nii.gz"):
        evaluated, inferred = (nib.load(tmp_path / folder / file) for folder in ("eval", "out"))
        assert evaluated.shape[:2] < inferred.shape[:2] == (512, 512)
        assert set(np.unique(evaluated.dataobj)) <= set(range(5))


def test_two_processes_train_a_network_together(pictures: dict[str, Path], tmp_path: Path) -> None:
    """The public code's distributed training stopped here: the second head was unused while it attacked."""
    name = "upernet_convnext"
    files = configs(name, "train.yaml", "train_adversarial.yaml", "multi_gpu_train.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(files), "--meta_file", "None"]
    overrides = small(name, tmp_path, pictures) | short(name) | {"train_attack#steps": 2}
    del overrides["device"]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(BUNDLES.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=BUNDLES / name, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = log(tmp_path)
    assert row["iteration"] == "1"  # each
    assert not any(key.startswith("module.") for key in torch.load(tmp_path / "model.pt", weights_only=True))
