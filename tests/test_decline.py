"""Curves of a metric over budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medrobust.attacks import FGSM, PGD
from medrobust.attacks.random_noise import RandomNoise
from medrobust.charts import decline_curves
from medrobust.decline import decline
from medrobust.parsing import sweep
from medrobust.records import Record
from medrobust.report import html, markdown
from medrobust.sea import members

CLEAN = {"a": 0.9, "b": 0.8}
PGD_DICE = {1: {"a": 0.7, "b": 0.6}, 2: {"a": 0.5, "b": 0.65}, 4: {"a": 0.1, "b": 0.2}}


def row(case: str, condition: str, value: float, metric: str = "dice", attack: object = "") -> Record:
    text = str(attack)
    protocol = "whole volume" if text else ""
    return Record(
        case=case, condition=condition, metric=metric, value=value, class_name="liver", attack=text, protocol=protocol
    )


def records() -> list[Record]:
    found = [row(case, "clean", value) for case, value in CLEAN.items()]
    for size, values in PGD_DICE.items():
        for case, value in values.items():
            found.append(row(case, f"PGD {size}", value, attack=PGD(eps=size / 255)))
            found.append(row(case, f"PGD {size}", value / 2, "iou", attack=PGD(eps=size / 255)))
            found.append(row(case, f"noise {size}", CLEAN[case] - 0.01, attack=RandomNoise(eps=size / 255)))
    return found


def test_a_curve_takes_each_case_at_its_worst_within_the_budget() -> None:
    pgd, noise = decline(records())
    assert (pgd.name, pgd.unit, pgd.control) == ("PGD, whole volume", "L∞, /255", False)
    assert (noise.name, noise.control) == ("noise", True)
    assert [point.size for point in pgd.points] == pytest.approx([1, 2, 4])
    assert [point.dice for point in pgd.points] == pytest.approx([0.65, 0.575, 0.15])
    # At 2/255 case b keeps the better attack it had at 1/255.
    assert [point.within for point in pgd.points] == pytest.approx([0.65, 0.55, 0.15])
    assert [point.iou for point in pgd.points] == pytest.approx([0.325, 0.2875, 0.075])
    assert [point.hd95 for point in pgd.points] == [None] * 3


def test_noise_that_helps_does_not_raise_the_curve() -> None:
    found = [row("a", "clean", 0.5)]
    found += [row("a", str(size), 0.6, attack=RandomNoise(eps=size / 255)) for size in (1, 2, 3)]
    (curve,) = decline(found)
    assert [point.within for point in curve.points] == [0.5] * 3


def test_two_budgets_are_no_curve_and_other_cases_neither() -> None:
    assert decline([r for r in records() if "4" not in r.condition]) == []
    assert (
        decline([r for r in records() if (r.case, r.condition) != ("a", "PGD 2") and "noise" not in r.condition]) == []
    )


def test_attacks_with_other_settings_are_other_curves() -> None:
    found = [row("a", "clean", 0.5)]
    for steps in (10, 20):
        found += [row("a", f"{steps} {e}", 0.4, attack=PGD(eps=e / 255, steps=steps)) for e in (1, 2, 4)]
    assert [curve.name for curve in decline(found)] == ["10, whole volume", "20, whole volume"]
    # Of one name in the records, such as two runs joined: the steps tell them apart.
    named = [replace(r, condition=f"PGD {r.condition.split()[-1]}/255") for r in found]
    named = [replace(r, condition="clean") if not r.attack else r for r in named]
    assert [curve.name for curve in decline(named)] == ["PGD, whole volume, 10 steps", "PGD, whole volume, 20 steps"]


def test_a_curve_is_called_after_its_conditions_without_the_size() -> None:
    found = [row("a", "clean", 0.5)]
    for size in (1, 2, 4):
        found.append(row("a", f"PGD {size}/255 as jpeg75", 0.4, attack=f"{PGD(eps=size / 255)!r} stored as jpeg75"))
        found.append(row("a", ("weak", "middle", "strong")[size // 2], 0.4, attack=FGSM(eps=size / 255)))
    assert [curve.name for curve in decline(found)] == ["PGD as jpeg75, whole volume", "FGSM, whole volume"]


def test_a_case_that_an_ensemble_broke_does_not_end_the_curves() -> None:
    """At 4/255 the first member breaks case a, so the second is not given it; both curves go on, and end there at 0."""
    found = [row(case, "clean", 0.9) for case in "ab"]
    for size in (1, 2, 4):
        for name, attack in members(eps=size / 255, budget="fast").items():
            for case in "ab":
                broken = (size, case) == (4, "a")
                if not (broken and name != "SEA MCE-Dice"):
                    found.append(row(case, f"{name} {size}/255", 0.0 if broken else 0.8 / size, attack=attack))
    curves = decline(found)
    assert [curve.name for curve in curves] == ["SEA MCE-Dice, whole volume", "SEA Dice, whole volume"]
    for curve in curves:
        assert [point.dice for point in curve.points] == pytest.approx([0.8, 0.4, 0.1])


def test_the_report_has_the_curve_and_its_table() -> None:
    text = markdown(records())
    assert "Decline of Dice with the budget (L∞, /255)" in text
    assert "| 2 | 0.575 (IoU 0.287) | 0.840 |" in text
    page = html(records())
    assert "Decline with the budget" in page
    assert page.count("data:image/png;base64") == 2
    assert "Decline" not in html([r for r in records() if "4" not in r.condition])


def test_curves_are_a_picture() -> None:
    png = decline_curves(decline(records()), clean=0.85)
    assert png.startswith(b"\x89PNG")
    assert png == decline_curves(decline(records()), clean=0.85)


def test_a_sweep_names_and_sizes_every_attack_with_an_eps() -> None:
    found = sweep({"FGSM": FGSM(), "strong": PGD(steps=40)}, ["1/255", "2/255"])
    assert list(found) == ["FGSM 1/255", "FGSM 2/255", "strong 1/255", "strong 2/255"]
    assert found["strong 2/255"] == PGD(eps=2 / 255, steps=40)
    with pytest.raises(ValueError, match="sizes that differ"):
        sweep({"FGSM": FGSM()}, ["1/255", "1/255"])
