"""The weights of ct_slices_upernet do on every fourth slice of CT B what the documents say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medrobust.attacks import PGD
from medrobust.bundle import Bundle
from medrobust.inferers import bind
from medrobust.metrics.dice import dice

ROOT = Path(__file__).resolve().parent.parent / "bundles" / "ct_slices_upernet"
PUBLISHED = json.loads((ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))["eval_metrics"]
KEY = "mean_dice_ct_b_every_4th_slice"

pytest.importorskip("transformers")


def mean_dice(dataset: Path, weights: str, attack: PGD | None = None) -> float:
    bundle = Bundle(root=ROOT, overrides={"dataset_dir": str(dataset)}, weights=ROOT / "models" / weights)
    model = bind(bundle.network, bundle.inferer)
    found = []
    for case in bundle.cases("validation"):
        data = bundle.preprocessing(case)
        image, label = data["image"][None].as_tensor(), data["label"][None].as_tensor().long()
        if attack is not None:
            image = attack(model, image, label)
        with torch.no_grad():
            found.append(dice(model(image).max(1, keepdim=True).indices, label, 5)[0, 1:].mean().item())
    assert len(found) == 5
    return sum(found) / len(found)


def test_clean_dice_is_the_published_one(ct_organs: Path) -> None:
    assert mean_dice(ct_organs, "model.pt") == pytest.approx(PUBLISHED[KEY], abs=2e-3)
    assert mean_dice(ct_organs, "robust.pt") == pytest.approx(PUBLISHED[f"{KEY}_robust"], abs=2e-3)


def test_pir_at_keeps_what_clean_training_loses(ct_organs: Path) -> None:
    attack = PGD(eps=4 / 255, steps=5)
    clean, robust = (mean_dice(ct_organs, weights, attack) for weights in ("model.pt", "robust.pt"))
    assert robust > PUBLISHED[f"{KEY}_robust_pgd_4_255"] - 0.005  # 20 steps take at least as much as 5
    assert robust > clean + 0.1


def test_weights_fit_into_the_repository() -> None:
    assert all(path.stat().st_size <= 10_000_000 for path in (ROOT / "models").iterdir())
