"""Ensembles: members, worst cases from records, cases that are broken already, and a real run that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import SmallNet, VoxelLinear, data

from medrobust import sea
from medrobust.attacks import APGD, PGD, SoftDice
from medrobust.ensembles import ensembles
from medrobust.evaluation import Condition, Evaluation, conditions
from medrobust.parsing import parse_attack, parse_ensemble
from medrobust.records import CLEAN, Record
from medrobust.report import html, markdown

NAMES = ["background", "liver", "aorta"]


def test_presets_are_the_published_ones() -> None:
    first, second = sea.members("sea-v1", eps=4 / 255), sea.members("sea-v2", eps=4 / 255)
    assert [type(a.objective).__name__ for a in first.values()] == [
        "MaskedCE",
        "SegPGDLoss",
        "JensenShannon",
        "MaskedSpherical",
    ]
    assert [type(a.objective).__name__ for a in second.values()] == ["BalancedMaskedCE", "MaskedCE", "JensenShannon"]
    for attack in [*first.values(), *second.values()]:
        assert isinstance(attack, APGD)
        assert attack.as_published
        assert [steps for _, steps in attack.stages()] == [90, 90, 120]
        assert attack.random_start
    # 300 gradients a member: 1200 and 900 an image.
    assert (sea.gradients(list(first.values())), sea.gradients(list(second.values()))) == (1200, 900)
    tracks = {type(a.setting("track")).__name__ for a in second.values()}
    assert tracks == {"CrossEntropy"}


@pytest.mark.parametrize(("budget", "count", "steps"), [("fast", 2, 40), ("standard", 3, 100), ("full", 5, 300)])
def test_budgets(budget: str, count: int, steps: int) -> None:
    members = sea.members(eps=2 / 255, budget=budget)
    assert len(members) == count
    assert sea.gradients(list(members.values())) == count * steps
    assert {a.threat for a in members.values()} == {PGD(eps=2 / 255).threat}


def test_typed_as_words() -> None:
    found = parse_ensemble("sea eps=4/255 budget=fast")
    assert found == sea.members("sea", eps=4 / 255, budget="fast")
    assert parse_ensemble("pgd eps=4/255") is None
    name, attack = parse_attack("apgd eps=4/255 objective=MaskedCE criterion=VoxelError-sigmoid track=ce")
    assert (name, attack.objective, attack.criterion) == ("APGD", attack.objective, attack.criterion)
    assert repr(attack.criterion) == "VoxelError(head='sigmoid', of_all=False)"
    for wrong, message in [
        ("sea speed=1", "setting of sea"),
        ("sea budget=slow", "expected a budget among"),
        ("sea-v1 head=sigmoid", "softmax head for sea-v1"),
        ("sea eps", "setting=value"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_ensemble(wrong)
    with pytest.raises(ValueError, match=r"expected an objective among .*JensenShannon"):
        parse_attack("pgd objective=VoxelLoss")


def evaluation(**settings: Any) -> Evaluation:
    return Evaluation(network=SmallNet().eval(), inferer=None, class_names=NAMES, **settings)


def run(eps: float, team: dict[str, Any], cases: int = 3) -> list[Record]:
    image, label = data(batch=cases)
    found: list[Record] = []
    for case in range(cases):
        results = evaluation().case(f"case{case}", image[case], label[case], conditions(team))
        found += [record for result in results for record in result.records]
    return found


def team(eps: float, **settings: Any) -> dict[str, Any]:
    from dataclasses import replace

    return {
        name: replace(attack, steps=6, **settings) for name, attack in sea.members(eps=eps, budget="standard").items()
    }


def test_the_worst_case_is_exact_and_never_better_than_clean() -> None:
    records = run(0.05, {**team(0.05), "PGD": PGD(eps=0.05, steps=3)})
    (found,) = ensembles(records)
    assert found.members == ("SEA MCE-Dice", "SEA Dice", "SEA JS", CLEAN)
    for case in ("case0", "case1", "case2"):
        means = {
            member: np.mean(
                [
                    r.value
                    for r in records
                    if (r.case, r.condition, r.metric) == (case, member, "dice") and r.class_name != "background"
                ]
            )
            for member in found.members
        }
        assert found.dice[case] == pytest.approx(min(means.values()))
        assert found.dice[case] <= means[CLEAN]
    assert sum(found.by.values()) == 3
    assert found.name == "SEA, L∞ 12.8/255"


def test_pooled_values_equal_brute_force() -> None:
    from itertools import product

    records = run(0.03, team(0.03))
    (found,) = ensembles(records)
    value = {(r.condition, r.case, r.class_name, r.metric): r.value for r in records}

    def pooled(names: list[str], chosen: tuple[str, ...], iou: bool) -> float:
        ratios = []
        for name in names:
            tp = sum(value[m, f"case{c}", name, "tp"] for c, m in enumerate(chosen))
            size = sum(value[m, f"case{c}", name, "size"] for c, m in enumerate(chosen))
            ratios.append(tp / (size - tp) if iou else 2 * tp / size)
        return float(np.mean(ratios))

    choices = list(product(found.members, repeat=3))
    assert found.pooled_dice is not None
    assert found.miou is not None
    assert found.pooled_dice.value == pytest.approx(min(pooled(NAMES[1:], chosen, iou=False) for chosen in choices))
    assert found.miou.value == pytest.approx(min(pooled(NAMES, chosen, iou=True) for chosen in choices))
    assert found.miou.lower_bound <= found.miou.value


def test_a_broken_case_is_not_attacked_again() -> None:
    """With a ball as large as the range every voxel of this model flips, so later members have no say in it."""
    image, label = data(classes=2)
    judge = Evaluation(network=VoxelLinear(), inferer=None, class_names=NAMES[:2])
    wanted = conditions(team(1.0, objective=SoftDice(), random_start=False))
    results = list(judge.case("a", image[0], label[0], wanted))
    assert [result.condition.name for result in results] == [CLEAN, "noise 255/255", "SEA MCE-Dice"]
    again = list(judge.case("a", image[0], label[0], wanted, broken={wanted[-1].ensemble}))
    assert [result.condition.name for result in again] == [CLEAN, "noise 255/255"]


def test_the_report_tells_the_ensemble() -> None:
    records = run(0.05, team(0.05))
    text = markdown(records)
    (found,) = ensembles(records)
    assert "SEA, L∞ 12.8/255: worst of 3, case by case" in text
    assert f"{np.mean(list(found.dice.values())):.3f}" in text
    assert f"{found.miou.value:.4f} (at least {found.miou.lower_bound:.4f})" in text
    assert "worst member was" in html(records)
    assert "| tp |" not in text


def test_an_estimate_is_gradients_times_cases() -> None:
    model, (image, label) = SmallNet().eval(), data()
    attacks = team(0.05)
    one = sea.seconds(attacks, model, image[:1], label[:1], 1)
    assert 0 < one < 60
    assert sea.gradients(list(attacks.values())) == 18


def test_different_budgets_are_different_ensembles() -> None:
    members = {f"{name} {eps}": attack for eps in (0.01, 0.02) for name, attack in team(eps).items()}
    teams = {c.ensemble for c in conditions(members) if isinstance(c, Condition) and c.ensemble}
    assert len(teams) == 2
    found = ensembles(run(0.01, members, cases=1))
    assert [e.name for e in found] == ["SEA, L∞ 2.55/255", "SEA, L∞ 5.1/255"]
    assert found[0].pooled_dice is None


def test_a_run_resumes_member_by_member(tmp_path: Path) -> None:
    from medrobust.records import append, read_csv

    path = tmp_path / "records.csv"
    records = run(0.05, team(0.05))
    append(records[: len(records) // 2], path)
    append(records[len(records) // 2 :], path)
    assert repr(ensembles(read_csv(path))) == repr(ensembles(records))
