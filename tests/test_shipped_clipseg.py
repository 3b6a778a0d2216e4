"""The weights of ct_slices_clipseg do on held-out slices what the documents say; adapters leave the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medrobust.attacks import FGSM, RandomNoise
from medrobust.bundle import Bundle
from medrobust.inferers import bind
from medrobust.metrics.dice import dice

ROOT = Path(__file__).resolve().parent.parent / "bundles" / "ct_slices_clipseg"
PUBLISHED = json.loads((ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))["eval_metrics"]
ADAPTERS = ROOT / "configs" / "adapters.yaml"

pytest.importorskip("transformers")


def bundle(dataset: Path, *overlays: Path, prompt: str = "name") -> Bundle:
    return Bundle(root=ROOT, overrides={"dataset_dir": str(dataset), "prompt": prompt}, overlays=overlays)


def mean_dice(source: Bundle, attack: Any = None) -> float:
    found = []
    for case in source.cases("validation"):
        data = source.preprocessing(case)
        image, label = data["image"][None].as_tensor(), data["label"][None].as_tensor()
        model = bind(source.network, source.inferer, input_ids=data["input_ids"][None])
        if attack is not None:
            image = attack(model, image, label)
        with torch.no_grad():
            pred = (model(image) > 0).float()
        found.append(dice(pred, label, 2)[0, 1].item())
    return sum(found) / len(found)


def test_the_base_segments_what_the_prompt_names(ct_organs: Path) -> None:
    assert mean_dice(bundle(ct_organs)) == pytest.approx(PUBLISHED["mean_dice_ct_b"], abs=2e-3)
    assert mean_dice(bundle(ct_organs, prompt="wrong")) < 0.05


def test_adapters_read_mr_and_fall_to_one_step_but_not_to_noise(ct_organs: Path) -> None:
    adapted = bundle(ct_organs, ADAPTERS)
    clean = mean_dice(adapted)
    assert clean == pytest.approx(PUBLISHED["mean_dice_mr_d_adapters"], abs=2e-3)
    assert mean_dice(adapted, RandomNoise(eps=4 / 255)) > clean - 0.02
    assert mean_dice(adapted, FGSM(eps=4 / 255)) < clean - 0.1
    plain = bundle(ct_organs).network.state_dict()
    under = {name: tensor for name, tensor in adapted.network.state_dict().items() if name in plain}
    assert under.keys() == plain.keys()
    assert all(torch.equal(under[name], plain[name]) for name in plain)


def test_weights_fit_into_the_repository() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "models").iterdir()) <= 10_000_000
