"""The weights that are shipped do on CT B what the documents say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medrobust.attacks import FGSM
from medrobust.bundle import Bundle
from medrobust.evaluation import Evaluation, Result, conditions
from medrobust.statistics import per_case

ROOT = Path(__file__).resolve().parent.parent / "bundles" / "ct_organs_unetr"


@pytest.fixture(scope="module")
def results(ct_organs: Path) -> dict[tuple[str, str], Result]:
    bundle = Bundle(root=ROOT, overrides={})
    evaluation = Evaluation(network=bundle.network, inferer=bundle.inferer, class_names=bundle.class_names)
    (case,) = bundle.cases("validation")
    data = bundle.preprocessing(case)
    wanted = conditions({"FGSM": FGSM(eps=8 / 255)}, ["whole volume", "tiles"])
    found = evaluation.case("ct_b", data["image"], data["label"], wanted)
    return {(result.condition.name, result.condition.protocol): result for result in found}


def dice(result: Result) -> float:
    (value,) = per_case([record for record in result.records if record.metric == "dice"]).values()
    return value


def test_clean_dice_is_the_published_one(results: dict[tuple[str, str], Result]) -> None:
    published = json.loads((ROOT / "configs" / "metadata.json").read_text())["eval_metrics"]["mean_dice_ct_b"]
    assert dice(results["clean", ""]) == pytest.approx(published, abs=2e-3)
    assert published >= 0.6


def test_noise_is_harmless_and_a_single_step_of_the_same_budget_is_not(results: dict[tuple[str, str], Result]) -> None:
    clean = dice(results["clean", ""])
    assert clean - dice(results["noise 8/255", "whole volume"]) < 0.05
    assert dice(results["FGSM", "whole volume"]) == pytest.approx(0.264, abs=0.01)


def test_tiles_overstate_robustness(results: dict[tuple[str, str], Result]) -> None:
    assert dice(results["FGSM", "tiles"]) == pytest.approx(0.398, abs=0.01)


def test_weights_fit_into_the_repository() -> None:
    assert (ROOT / "models" / "model.pt").stat().st_size <= 10_000_000
