"""Ensembles: members, worst cases from records, cases that are broken already, and a real run that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import SmallNet, VoxelLinear, data

from medrobust import sea
from medrobust.attacks import APGD, PGD, SoftDice
from medrobust.ensembles import COUNTS, ensembles, filled
from medrobust.evaluation import Condition, Evaluation, conditions
from medrobust.parsing import parse_attack, parse_ensemble
from medrobust.records import CLEAN, Record
from medrobust.report import html, markdown
from medrobust.tables import contents

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
    assert found.name == "SEA, L∞ 12.8/255, whole volume"


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


def test_members_whose_voxels_were_not_counted_have_no_pooled_value() -> None:
    """Saved volumes that are evaluated again are not counted; clean images always are."""
    records = [r for r in run(0.03, team(0.03), cases=2) if r.condition == CLEAN or r.metric not in COUNTS]
    (found,) = ensembles(records)
    assert len(found.dice) == 2
    assert (found.pooled_dice, found.miou) == (None, None)


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
    assert "| SEA, L∞ 12.8/255, whole volume: worst of 3, case by case |" in text
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
    assert [e.name for e in found] == ["SEA, L∞ 2.55/255, whole volume", "SEA, L∞ 5.1/255, whole volume"]
    assert found[0].pooled_dice is None


def test_a_run_resumes_member_by_member(tmp_path: Path) -> None:
    from medrobust.records import append, read_csv

    path = tmp_path / "records.csv"
    records = run(0.05, team(0.05))
    append(records[: len(records) // 2], path)
    append(records[len(records) // 2 :], path)
    assert repr(ensembles(read_csv(path))) == repr(ensembles(records))


FIRST, SECOND = sea.members(eps=8 / 255, budget="fast").items()


def told(condition: str, attack: object, dice: dict[str, float], **more: str) -> list[Record]:
    """Dice of one structure in each case, and HD95 that grows as it falls."""
    shared = {"condition": condition, "class_name": "liver", "attack": str(attack), "protocol": "whole volume"} | more
    return [
        Record(
            case=case,
            metric=metric,
            value=value if metric == "dice" else 10 * (1 - value),
            status="ok" if value else "missed",
            **shared,
        )
        for metric in ("dice", "hd95")
        for case, value in dice.items()
    ]


def skipped() -> list[Record]:
    """The first member broke three of four cases, which the second then was not given."""
    return [
        *told(CLEAN, "", dict.fromkeys("abcd", 0.9), protocol=""),
        *told(*FIRST, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.6}),
        *told(*SECOND, {"d": 0.5}),
        *told("PGD", PGD(eps=8 / 255), {"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.4}),
    ]


def test_a_skipped_case_has_what_broke_it() -> None:
    whole = [r for r in filled(skipped()) if (r.condition, r.metric) == (SECOND[0], "dice")]
    assert {r.case: r.value for r in whole} == {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.5}
    assert {r.attack for r in whole} == {repr(SECOND[1])}
    assert filled(filled(skipped())) == filled(skipped())
    # Nobody broke case d, so whoever lacks it was not there: that is no hole to be filled.
    lost = [r for r in skipped() if (r.case, r.condition) != ("d", SECOND[0])]
    lost += told(*SECOND, {"e": 0.5})
    assert [r.case for r in filled(lost) if (r.condition, r.metric) == (SECOND[0], "dice")] == ["e", "a", "b", "c"]


def test_cases_that_were_broken_stay_in_the_worst_of_all_and_in_the_verdict() -> None:
    (model,) = contents(skipped(), "", [], None)["models"]
    line = model["lines"][-1]
    # a, b, c: 0; d: min(0.6, 0.5, 0.4)
    assert (line["condition"], line["dice"]["mean"], line["hd95"]) == ("worst of all, case by case", "0.100", "9.0")
    assert line["cases"] == 4
    # The second member's own mean, 0.5 over one case, is compared with nothing.
    assert model["verdict"] == {
        "clean": "0.900",
        "worst": "0.125",
        "by": "SEA, L∞ 8/255, whole volume: worst of 2, case by case",
        "missed": "3",
        "present": "4",
        "cases": "4",
    }
    assert "is not given to the others" in markdown(skipped())
    assert "is not given to the others" not in markdown([r for r in skipped() if r.condition in (CLEAN, "PGD")])


def test_a_case_that_failed_in_one_attack_is_in_no_worst_case_and_no_verdict() -> None:
    """PGD lacks case a, which nobody of the ensemble broke for it; SEA's second member lacks d, which nobody broke."""
    records = [
        *told(CLEAN, "", {"a": 0.9, "b": 0.7, "c": 0.9, "d": 0.9}, protocol=""),
        *told(*FIRST, {"a": 0.0, "b": 0.4, "c": 0.4, "d": 0.1}),
        *told(*SECOND, {"b": 0.3, "c": 0.3}),
        *told("PGD", PGD(eps=8 / 255), {"b": 0.2, "c": 0.2, "d": 0.8}),
    ]
    (team,) = ensembles(records)
    assert team.dice == {"a": 0.0, "b": 0.3, "c": 0.3}
    (model,) = contents(records, "", [], None)["models"]
    assert (model["lines"][-1]["dice"]["mean"], model["lines"][-1]["cases"]) == ("0.200", 2)
    # Three cases of the ensemble are the most; PGD, 0.4 over others, is not compared with them.
    assert [model["verdict"][key] for key in ("clean", "worst", "cases")] == ["0.833", "0.200", "3"]


def test_transferred_stored_and_targeted_attacks_are_no_members() -> None:
    records = skipped()
    for more in (
        " made on swin (SwinUNETR sha256:1)",
        " stored as jpeg10",
        " toward 'erase liver': Erase(class_index=1)",
    ):
        records += told(f"{FIRST[0]} more", repr(FIRST[1]) + more, dict.fromkeys("abcd", 0.01))
    (team,) = ensembles(records)
    assert team.members == (FIRST[0], SECOND[0], CLEAN)
    assert team.by == {FIRST[0]: 3, SECOND[0]: 1, CLEAN: 0}


def test_ensembles_of_two_protocols_are_told_apart_for_each_model() -> None:
    values = {("m", "whole volume"): 0.1, ("m", "tiles"): 0.3, ("n", "whole volume"): 0.2, ("n", "tiles"): 0.4}
    records = [r for name in "mn" for r in told(CLEAN, "", {"a": 0.9, "b": 0.9}, protocol="", model=name)]
    for (name, protocol), value in values.items():
        for member in (FIRST, SECOND):
            records += told(*member, {"a": value, "b": value}, protocol=protocol, model=name)
    found = {line["condition"]: line["cells"] for line in contents(records, "", [], None)["comparison"]}
    for protocol in ("whole volume", "tiles"):
        cells = found[f"SEA, L∞ 8/255, {protocol}: worst of 2, case by case"]
        assert [cell["mean"] for cell in cells] == [f"{values[name, protocol]:.3f}" for name in "mn"]
    # The members' steps are part of what is compared.
    other = [replace(r, attack=r.attack.replace("steps=40", "steps=80")) if r.model == "n" else r for r in records]
    assert [line["condition"] for line in contents(other, "", [], None)["comparison"]] == [CLEAN]


def model(name: str, *members: tuple[tuple[str, object], dict[str, float]], **more: str) -> list[Record]:
    """Clean images and what each member left of the cases that it was given."""
    clean = told(CLEAN, "", dict.fromkeys("ab", 0.9), protocol="", model=name)
    return clean + [row for (condition, attack), dice in members for row in told(condition, attack, dice, model=name)]


def side_by_side(records: list[Record], **settings: Any) -> dict[str, list[str]]:
    """The comparison as ``condition -> mean Dice of each model``."""
    comparison = contents(records, "", [], settings.get("controls"))["comparison"]
    return {line["condition"]: [cell["mean"] for cell in line["cells"]] for line in comparison}


THIRD = ("SEA JS", SECOND[1])
TEAM, WORST = "SEA, L∞ 8/255, whole volume: worst of {}, case by case", "worst of all, case by case"
GONE = {"a": 0.0, "b": 0.0}
WEAK, LESS = {"a": 0.4, "b": 0.4}, {"a": 0.2, "b": 0.6}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "count", "expected"),
    [
        # The first member broke every case of one model, and the second was left none.
        ([(FIRST, GONE)], [(FIRST, WEAK), (SECOND, LESS)], 2, ["0.000", "0.300"]),
        # Of the other, it broke one.
        ([(FIRST, GONE)], [(FIRST, {"a": 0.0, "b": 0.4}), (SECOND, {"b": 0.2})], 2, ["0.000", "0.100"]),
        # Of both: who else was there is not known.
        ([(FIRST, GONE)], [(FIRST, GONE)], 1, ["0.000", "0.000"]),
        # Two members broke every case between them.
        (
            [(FIRST, {"a": 0.0, "b": 0.4}), (SECOND, {"b": 0.0})],
            [(FIRST, WEAK), (SECOND, LESS), (THIRD, {"a": 0.1, "b": 0.5})],
            3,
            ["0.000", "0.250"],
        ),
        # The order of the members makes no difference to the worst of them.
        ([(FIRST, WEAK), (SECOND, LESS)], [(SECOND, LESS), (FIRST, WEAK)], 2, ["0.300", "0.300"]),
        ([(SECOND, GONE)], [(FIRST, WEAK), (SECOND, LESS)], 2, ["0.000", "0.300"]),
        # Each member came first once, and they differ in nothing but their loss.
        ([(FIRST, GONE)], [(SECOND, GONE)], 2, ["0.000", "0.000"]),
    ],
)
def test_models_are_compared_where_members_were_left_no_case(
    first: Any, second: Any, count: int, expected: list[str], turned: bool
) -> None:
    records = [*model("m", *first), *model("n", *second)]
    if turned:
        records, expected = [*model("n", *second), *model("m", *first)], expected[::-1]
    found = side_by_side(records)
    name = TEAM.format(count) if count > 1 else TEAM.replace("of {}", "member")
    assert found[name] == expected
    assert found[WORST] == expected
    # With another attack beside the ensemble, the worst of all is over both.
    for dice, worst in ((0.9, expected), (0.0, ["0.000", "0.000"])):
        pgd = [row for one in "mn" for row in told("PGD", PGD(eps=8 / 255), dict.fromkeys("ab", dice), model=one)]
        found = side_by_side([*records, *pgd])
        assert (found["PGD"], found[name], found[WORST]) == ([f"{dice:.3f}"] * 2, expected, worst)


def test_what_is_no_member_of_all_is_compared_with_nothing() -> None:
    """Other settings, a case that nobody broke, other cases, other protocols, other members, or no link at all."""
    whole = model("n", (FIRST, WEAK), (SECOND, LESS))
    longer = [(name, replace(attack, steps=80)) for name, attack in (FIRST, SECOND)]
    for other in (
        model("m", (longer[0], GONE)),
        model("m", (FIRST, GONE), (longer[1], GONE)),
        model("m", (FIRST, {"a": 0.0, "b": 0.1})),
        model("m", (FIRST, {"a": 0.0})),
        model("m", (FIRST, {"a": 0.0, "b": 0.0, "c": 0.0})),
        model("m", (FIRST, {"a": 0.0, "b": 0.1}), (SECOND, {"b": 0.1}), (THIRD, {"b": 0.1})),
        model("m", (THIRD, GONE)),
        [replace(row, protocol=row.protocol and "tiles") for row in model("m", (FIRST, GONE))],
        [replace(row, attack=row.attack and f"saved {row.attack}") for row in model("m", (FIRST, GONE))],
    ):
        for records in ([*other, *whole], [*whole, *other]):
            assert not [condition for condition in side_by_side(records) if "worst" in condition]
    # Members in common there are none here, and no settings: two ensembles, unless a third model knows both members.
    apart = [*model("m", (FIRST, GONE)), *model("o", (longer[1], GONE))]
    assert TEAM.format(2) not in side_by_side(apart)
    both = side_by_side([*apart, *model("n", (FIRST, WEAK), (longer[1], LESS))])
    assert both[TEAM.format(2)] == ["0.000", "0.000", "0.300"]


def test_a_single_attack_with_the_name_of_a_member_stays_one() -> None:
    """Alone on a model that it did not break, it is no ensemble there, so it is none where it broke everything."""
    pgd = [row for one in "mn" for row in told("PGD", PGD(eps=8 / 255), {"a": 0.1, "b": 0.1}, model=one)]
    found = side_by_side([*model("m", (FIRST, GONE)), *model("n", (FIRST, LESS)), *pgd])
    assert found == {
        CLEAN: ["0.900", "0.900"],
        FIRST[0]: ["0.000", "0.400"],
        "PGD": ["0.100", "0.100"],
        WORST: ["0.000", "0.100"],
    }


def test_a_member_that_broke_everything_speaks_for_its_ensemble() -> None:
    records = model("m", (FIRST, GONE))
    (team,) = ensembles(records)
    assert (team.members, team.broken, team.dice) == ((FIRST[0], CLEAN), True, GONE)
    (found,) = contents(records, "", [], None)["models"]
    name = TEAM.replace("of {}", "member")
    assert [line["condition"] for line in found["lines"]] == [CLEAN, FIRST[0], name, WORST]
    assert found["verdict"]["by"] == name
    text = markdown(records)
    assert "is not given to the others" in text
    assert f"the worst member was {FIRST[0]} 2" in text
    # One that did not is a single attack, also where the clean image is lost already.
    assert ensembles(model("m", (FIRST, LESS))) == []
    broken_clean = [replace(row, value=0.0) if row.condition == CLEAN else row for row in model("m", (FIRST, LESS))]
    assert ensembles(broken_clean) == []
    # An ensemble of controls is no attack, and there is no worst of all.
    assert WORST not in side_by_side([*records, *model("n", (FIRST, GONE))], controls=[FIRST[0]])


def test_a_real_run_of_two_models_is_compared_however_soon_one_breaks() -> None:
    """With a ball as large as the range the first member breaks every case of a linear model, and no other runs."""
    image, label = data(classes=2)
    wanted = conditions(team(1.0, objective=SoftDice(), random_start=False))
    records = []
    for name, network in (("linear", VoxelLinear()), ("small", SmallNet(classes=2).eval())):
        judge = Evaluation(network=network, inferer=None, class_names=NAMES[:2], model=name)
        for case in range(2):
            results = judge.case(f"case{case}", image[case], label[case], wanted)
            records += [record for result in results for record in result.records]
    ran = [{r.condition for r in records if r.model == name and "SEA" in r.condition} for name in ("linear", "small")]
    assert [len(members) for members in ran] == [1, 3]
    found = side_by_side(records)
    assert len([name for name in found if name.startswith("SEA, L∞ 255/255") or name == WORST]) == 2


def test_tiles_and_whole_volume_are_compared_on_the_same_cases() -> None:
    records = [*skipped(), *told(*SECOND, {"a": 0.7, "b": 0.7, "c": 0.7, "d": 0.9}, protocol="tiles")]
    (model,) = contents(records, "", [], None)["models"]
    (line,) = model["protocols"]
    assert [line[key]["mean"] for key in ("tiles", "whole", "gap")] == ["0.750", "0.125", "0.625"]
