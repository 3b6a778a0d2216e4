"""Targeted attacks with clinical goals: typed, run, recorded and reported; the network's worst case is known."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import small_bundle
import torch
from test_cli import call

from medrobust.attacks import PGD
from medrobust.evaluation import Condition
from medrobust.goal_tables import goals_table, is_targeted
from medrobust.goals import ChangeVolume, Erase, Inside, Invent, MoveBoundary, Swap
from medrobust.parsing import parse_goal, split_goal
from medrobust.records import CLEAN, Record, read_csv
from medrobust.targeted import success, wanted

EPS = 40 / 255
NAMES = ["background", "left kidney", "liver"]


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("erase:liver", Erase(class_index=2)),
        ("erase:left_kidney,component=largest,fill=nearest", Erase(class_index=1, component="largest", fill="nearest")),
        ("erase:2,component=3", Erase(class_index=2, component=3)),
        ("move:Left Kidney,mm=-2.5", MoveBoundary(class_index=1, mm=-2.5)),
        ("volume:liver,percent=20,over=background", ChangeVolume(class_index=2, percent=20, over="background")),
        ("swap:liver,left_kidney", Swap(first=2, second=1)),
        (
            "invent:liver,radius_mm=8,where=inside:left_kidney",
            Invent(class_index=2, radius_mm=8, where=Inside(class_index=1)),
        ),
        (
            "invent:liver,radius_mm=8,where=0.5:0.25:1",
            Invent(class_index=2, radius_mm=8, where=(0.5, 0.25, 1.0)),
        ),
        ("invent:liver,radius_mm=8,where=random,seed=3", Invent(class_index=2, radius_mm=8, where="random", seed=3)),
    ],
)
def test_goals_as_typed(text: str, goal: object) -> None:
    assert parse_goal(text, NAMES) == goal


@pytest.mark.parametrize("name", ["liver", "Baker's cyst", 'the "other" cyst', """Baker's "cyst\\"""])
def test_goals_are_known_from_the_records_whatever_structures_are_called(name: str) -> None:
    goal = Erase(class_index=1)
    wish = goal.describe(["background", name])
    text = Condition(name="PGD", attack=PGD(targeted=True), goal=goal, wish=wish).text
    assert is_targeted(text)
    assert not is_targeted(repr(PGD()))
    asked = Record(case="a", condition="PGD", metric="goal", class_name=name, value=1.0, attack=text)
    assert goals_table([asked])[0]["wish"] == wish


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("erase:livr", "structure, got 'livr': did you mean liver"),
        ("eraze:liver", "did you mean erase"),
        ("erase:liver,size=3", "setting of erase"),
        ("erase:liver,class_index=3", "setting of erase"),
        ("move:liver", "settings of MoveBoundary"),
        ("swap:liver", r"expected 2 structure\(s\)"),
        ("erase:background", "class 0 is the background"),
    ],
)
def test_wrong_goals_are_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_goal(text, NAMES)


def test_the_goal_is_taken_out_of_the_attack() -> None:
    assert split_goal("mine: pgd goal='erase:left kidney' steps=3") == ("mine: pgd steps=3", "erase:left kidney")
    assert split_goal("pgd steps=3") == ("pgd steps=3", "")
    with pytest.raises(ValueError, match="one goal"):
        split_goal("pgd goal=a goal=b")


def test_what_the_goal_is_not_about_stays_as_the_model_sees_it() -> None:
    label = torch.tensor([1, 1, 2, 2, 0, 0, 3, 3]).view(1, 1, 2, 4)
    target = torch.tensor([1, 0, 2, 2, 0, 0, 3, 3]).view(1, 1, 2, 4)  # class 1 shall shrink
    pred = torch.tensor([0, 1, 2, 3, 1, 0, 0, 3]).view(1, 1, 2, 4)
    # Class 1 as wanted, the invented voxel of it gone, mistakes between other classes kept.
    assert wanted(target, label, pred, (1,)).flatten().tolist() == [1, 0, 2, 3, 0, 0, 0, 3]


def test_success_counts_what_was_asked_for() -> None:
    label = torch.tensor([1, 1, 1, 1, 0, 0, 2, 0]).view(1, 1, 2, 4)
    target = torch.tensor([0, 0, 0, 0, 0, 0, 2, 0]).view(1, 1, 2, 4)
    pred = torch.tensor([1, 1, 1, 0, 0, 0, 2, 0]).view(1, 1, 2, 4)
    pred_adv = torch.tensor([0, 2, 0, 0, 0, 0, 2, 0]).view(1, 1, 2, 4)
    shared = {"case": "a", "condition": "PGD", "attack": "PGD() toward 'erase it': Erase()"}
    found = {(r.metric, r.class_name): r.value for r in success(shared, {"liver": 2}, label, target, pred, pred_adv)}
    assert found == {
        ("goal", "liver"): 1,
        ("reached", ""): 0.75,  # the voxel that became class 2 is lost to the model, but not what was wanted
        ("reached_before", ""): 0.25,
        ("dice_to_target", "liver"): pytest.approx(2 / 3),
        ("dice_to_target_before", "liver"): 1,
    }


def test_a_run_with_a_goal(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle", cases=2)
    mask = bundle / "data" / "case1_label.nii.gz"
    small_bundle.write_scan(mask, np.zeros_like(np.asarray(nib.load(mask).dataobj)))
    out = tmp_path / "run"
    words = ["evaluate", "-b", bundle, "-o", out, "-a", f"fgsm eps={EPS} objective=CE goal=erase:organ"]
    call(*words)
    records = read_csv(out / "records.csv")
    wanted = [r for r in records if r.condition == "FGSM erase organ"]
    case = "case0"
    image = (nib.load(bundle / "data" / f"{case}.nii.gz").get_fdata() + 1000) / 2000
    label = nib.load(bundle / "data" / f"{case}_label.nii.gz").get_fdata() == 1
    left = {r.metric: r.value for r in wanted if r.case == case and not r.class_name}
    assert left["reached"] == pytest.approx((image - EPS <= 0.5)[label].mean(), abs=0.01)
    assert left["reached_before"] == pytest.approx((image <= 0.5)[label].mean(), abs=0.01)
    volume = [r.value for r in wanted if (r.case, r.metric, r.class_name) == (case, "volume_error", "organ")]
    assert volume == pytest.approx([(image - EPS > 0.5).sum() / label.sum() - 1], abs=0.01)
    (lost,) = [r for r in wanted if r.case == "case1"]
    assert (lost.metric, lost.value) == ("goal", 0)
    assert "expected class 1 in the label, got 0" in lost.status
    assert is_targeted(lost.attack)
    assert len(list((out / "pictures").glob("*erase*"))) == len(list((out / "volumes").glob("*erase*"))) == 1
    for page in ((out / "report.html").read_text(), (out / "report.md").read_text()):
        assert "erase organ, background in its place" in page
        assert "Not attacked: case1" in page
    before = (out / "report.html").read_bytes()
    call(*words)  # the impossible case is done too
    assert len(read_csv(out / "records.csv")) == len(records)
    call("report", out)
    assert (out / "report.html").read_bytes() == before
    again = tmp_path / "again"
    call("evaluate", "-b", bundle, "-o", again, "--saved", out / "volumes")

    def told(rows: Iterable[Record]) -> dict[tuple[str, ...], tuple[float, str]]:
        ours = (r for r in rows if r.condition in ("clean", "FGSM erase organ"))
        return {(r.case, r.condition, r.metric, r.class_name): (round(r.value, 5), r.status) for r in ours}

    assert told(read_csv(again / "records.csv")) == told(records)
    assert "erase organ, background in its place" in (again / "report.md").read_text()


def test_the_table_leaves_impossible_cases_out_of_its_means() -> None:
    attack = "PGD(eps=0.1) toward 'erase liver': Erase()"
    shared = {"condition": "PGD", "attack": attack}
    rows = [
        Record(case="a", metric="goal", class_name="liver", value=1, **shared),
        Record(case="a", metric="reached", value=0.9, **shared),
        Record(case="a", metric="reached_before", value=0.1, **shared),
        Record(case="a", metric="volume_error", class_name="liver", value=-0.75, **shared),
        Record(case="b", metric="goal", class_name="liver", value=0, status="impossible: none", **shared),
    ]
    clean = [
        Record(case=case, condition=CLEAN, metric="volume_error", class_name="liver", value=value)
        for case, value in (("a", 0.05), ("b", 1.0))
    ]
    (found,) = goals_table([*clean, *rows])
    assert found["wish"] == "erase liver"
    assert found["reached"] == ["10.0%", "90.0%"]
    assert found["structures"][0]["volume"] == ["+5.0%", "-75.0%"]
    assert found["impossible"] == [{"case": "b", "why": "none"}]


def test_a_structure_that_the_reference_lacks_has_no_lesion_to_be_missed() -> None:
    """Liver is in one of two cases, where it is missed under attack; the spleen is to be invented in both."""
    shared = {"condition": "PGD", "attack": "PGD(eps=0.1) toward 'invent spleen': Invent()"}
    values = {("a", "liver"): (1.0, "ok"), ("b", "liver"): (0.0, "invented")}
    values |= {(case, "spleen"): (0.0, "invented") for case in "ab"}
    records = []
    for (case, organ), (rate, status) in values.items():
        records.append(Record(case=case, metric="goal", class_name=organ, value=1, **shared))
        seen = {"case": case, "metric": "missed_rate", "class_name": organ}
        records.append(Record(**seen, value=rate, status=status, **shared))
        records.append(Record(**seen, value=0.0, status="both empty" if rate == 0 else "ok", condition=CLEAN))
    (found,) = goals_table(records)
    assert {part["name"]: part["missed"] for part in found["structures"]} == {
        "liver": ["0%", "100%"],
        "spleen": ["–", "–"],
    }
