"""A bundle that nobody vouched for runs nothing of its own: hostile ones are refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.networks.nets import UNet

from medrobust.batch import trust
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.recipe import Recipe

NETWORK = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [2, 4], "strides": [2]}
CONFIG: dict[str, Any] = {
    "roi": [8, 8, 8],
    "network_def": {"_target_": "UNet", **NETWORK},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "monai.transforms.EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
            {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -1000.0, "a_max": 1000.0}
            | {"b_min": 0.0, "b_max": 1.0, "clip": True},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@roi", "sw_batch_size": 2, "overlap": 0.5},
}


def make(root: Path, **changes: Any) -> Path:
    """A plain bundle that the gate lets through, unless ``changes`` spoil it."""
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs" / "batch.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}, sort_keys=False))
    channels = {"0": "background", "1": "organ"}
    data_format = {"inputs": {"image": {"num_channels": 1}}, "outputs": {"pred": {"channel_def": channels}}}
    (root / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": data_format}))
    torch.save(UNet(**NETWORK).state_dict(), root / "models" / "model.pt")
    return root


def test_a_plain_bundle_is_built_without_trust(tmp_path: Path) -> None:
    recipe = Recipe(root=make(tmp_path / "b"))
    recipe.check()
    weights = torch.load(tmp_path / "b" / "models" / "model.pt", weights_only=True)
    network = recipe.network()
    assert not network.training
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert recipe.inferer.roi_size == [8, 8, 8]
    assert [type(one).__name__ for one in recipe.transforms][-1] == "ScaleIntensityRanged"
    assert recipe.class_names == ["background", "organ"]


HOSTILE: dict[str, dict[str, Any]] = {
    "expression": {"x": "$__import__('os').system('touch {canary}')"},
    "expression in a list": {"x": [1, {"y": ["$open('{canary}', 'w')"]}]},
    "subprocess": {"x": {"_target_": "subprocess.call", "args": ["touch", "{canary}"]}},
    "subprocess as the network": {"network_def": {"_target_": "subprocess.call", "args": ["touch", "{canary}"]}},
    "builtins": {"x": {"_target_": "builtins.exec", "source": "open('{canary}', 'w')"}},
    "another of MONAI's": {"x": {"_target_": "monai.bundle.ConfigWorkflow"}},
    "a lambda transform": {"x": {"_target_": "Lambdad", "keys": "image", "func": "$print"}},
    "requires": {"x": {"_requires_": "$open('{canary}', 'w')", "_target_": "UNet"}},
    "disabled": {"x": {"_target_": "UNet", "_disabled_": False}},
    "mode": {"x": {"_target_": "UNet", "_mode_": "callable"}},
    "imports": {"imports": ["$import os"]},
    "run": {"run": ["@network_def"]},
    "macro": {"x": "%/etc/passwd"},
    "target in a list": {"x": {"_target_": ["subprocess.call"]}},
    "nowhere": {"x": "@nothing"},
    "weights outside": {"ckpt_path": "../../model.pt"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configurations_run_nothing(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    changes = yaml.safe_load(yaml.safe_dump(HOSTILE[name]).replace("{canary}", str(canary)))
    with pytest.raises(RunError, match="not trusted") as caught:
        Recipe(root=make(tmp_path / "b", **changes)).check()
    assert caught.value.exit_code == Exit.USAGE
    assert not canary.exists()


TEXTS = {
    "python tag": "network_def: !!python/object/apply:os.system ['touch canary']\npreprocessing: 1\ninferer: 1\n",
    "alias bomb": "a: &a [1, 1]\nb: &b [*a, *a]\nnetwork_def: [*b, *b]\npreprocessing: 1\ninferer: 1\n",
    "deep": "network_def: " + "[" * 100_000 + "\npreprocessing: 1\ninferer: 1\n",
    "huge": "network_def: 1\n#" + "x" * (1 << 18),
    "a list": "- 1\n- 2\n",
    "not YAML": "a: [1\n",
    "too little": "network_def: 1\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    root = make(tmp_path / "b")
    (root / "configs" / "batch.yaml").write_text(TEXTS[name])
    with pytest.raises(RunError, match="not trusted"):
        trust.read_plain(root)


@pytest.mark.parametrize("name", ["scripts/net.py", "models/model.ts", "helper.so", "x/y.pkl"])
def test_bundles_that_bring_code_are_refused(tmp_path: Path, name: str) -> None:
    root = make(tmp_path / "b")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("")
    with pytest.raises(RunError, match="brings code"):
        trust.read_plain(root)


def test_a_link_out_of_the_bundle_and_a_loop_of_references(tmp_path: Path) -> None:
    root = make(tmp_path / "b")
    (root / "link").symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="a link out of it"):
        trust.read_plain(root)
    with pytest.raises(RunError, match="leads back to itself"):
        trust.build({"a": "@b", "b": ["@a"]}, "a")
    with pytest.raises(RunError, match="UNet does not take these settings"):
        trust.build({"a": {"_target_": "UNet", "nonsense": 1}}, "a")


def test_weights_that_want_to_run_code_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "b")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "canary"), "w")

    torch.save({"state_dict": Evil()}, root / "models" / "model.pt")
    with pytest.raises(ValueError, match="expected"):
        Recipe(root=root).network()
    assert not (tmp_path / "canary").exists()


def test_a_bundle_without_a_plain_configuration_needs_trust(tmp_path: Path) -> None:
    root = make(tmp_path / "b")
    (root / "configs" / "batch.yaml").rename(root / "configs" / "train.yaml")
    with pytest.raises(RunError, match=r"expected the plain configuration .* \(--trust-bundle"):
        Recipe(root=root).check()


def test_another_bundle_has_another_hash(tmp_path: Path) -> None:
    one, same = (Recipe(root=make(tmp_path / name)) for name in "ab")
    same.weights_path.write_bytes(one.weights_path.read_bytes())
    assert one.digest == same.digest
    other = Recipe(root=make(tmp_path / "c", roi=[4, 4, 4]))
    other.weights_path.write_bytes(one.weights_path.read_bytes())
    assert other.digest != one.digest
    torch.save(UNet(**NETWORK).state_dict(), tmp_path / "new.pt")
    assert Recipe(root=one.root, weights=tmp_path / "new.pt").digest != one.digest


def test_the_shipped_bundle_needs_no_trust_and_says_what_its_other_configurations_say(root: Path) -> None:
    folder = root / "bundles" / "ct_organs_unetr"
    Recipe(root=folder).check()
    plain, train = (yaml.safe_load((folder / "configs" / f"{name}.yaml").read_text()) for name in ("batch", "train"))

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return train[value[1:]] if isinstance(value, str) and value[1:] in train and value[0] == "@" else value

    for name, wanted in (
        ("network_def", train["network_def"]),
        ("preprocessing", train["validate"]["preprocessing"]),
        ("inferer", train["validate"]["inferer"]),
    ):
        assert filled(plain[name]) == filled(wanted)
