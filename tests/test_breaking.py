"""Smallest eps and transfer from the command line to the report; the network's worst case is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_bundle
import torch
from oracles import VoxelLinear
from test_cli import call, known_dice, values

from medrobust.attacks import PGD, RandomNoise
from medrobust.breaking import breaking, shares
from medrobust.evaluation import transfer_conditions
from medrobust.records import Record, read_csv
from medrobust.transfer import matrices

SEARCH = (
    "MinimumEps(attack=PGD(eps=0.03, norm='{}'), below=0.5, most=0.125, rounds=6, criterion=HardDice(head='softmax'))"
)


def rows(sizes: list[float], norm: str = "linf") -> list[Record]:
    shared = {"condition": "minimum eps, PGD", "metric": "minimum_eps", "attack": SEARCH.format(norm)}
    return [Record(case=str(number), value=size, **shared) for number, size in enumerate(sizes)]


def test_quantiles_keep_what_never_breaks() -> None:
    (found,) = breaking(rows([4 / 255, 0, math.inf, 2 / 255]))
    assert found["quantiles"] == ["0/255", "0/255", "2/255", "4/255", "more than 31.9"]
    assert (found["cases"], found["already"], found["never"], found["below"]) == (4, 1, 1, "Dice below 0.5")
    (other,) = breaking(rows([0.1, 0.2, 0.3], "l2"))
    assert other["quantiles"] == ["0.1", "0.1", "0.2", "0.3", "0.3"]
    assert other["unit"] == "L2"
    by = SEARCH.format("linf").replace("norm='linf'", "criterion=MissedForeground(head='softmax')")
    (dice,) = breaking([replace(row, attack=by) for row in rows([0.1])])
    assert dice["below"] == "Dice below 0.5"  # the attack's own criterion is another matter
    absent = [replace(row, status="absent") for row in rows([math.inf])]
    assert breaking(absent) == []
    (some,) = breaking([*rows([2 / 255]), *absent])
    assert (some["cases"], some["never"]) == (1, 0)
    assert shares([found]).startswith(b"\x89PNG")


def test_the_smallest_eps_of_a_run(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    out = tmp_path / "run"
    words = ["evaluate", "-b", bundle, "-o", out, "--minimum-eps", "fgsm objective=CE", "--below", "0.6"]
    call(*words, "--most", "0.4", "--no-pictures")
    records = read_csv(out / "records.csv")
    for case in ("case0", "case1"):
        (eps,) = values(records, case=case, metric="minimum_eps")
        assert 0 < eps < 0.4
        assert known_dice(bundle, case, eps) < 0.6
        assert known_dice(bundle, case, eps - 0.4 / 32) >= 0.6
    assert "Dice below 0.6" in (out / "report.html").read_text()
    assert "FGSM, L∞, /255 | Dice below 0.6 |" in (out / "report.md").read_text()
    call(*words, "--most", "0.4", "--no-pictures")
    assert len(read_csv(out / "records.csv")) == len(records)
    call(*words, "--most", "0.3", code=2)  # another search under the same name
    call("evaluate", "-b", bundle, "-o", tmp_path / "x", "--minimum-eps", "gaussian_noise", code=2)


def test_the_smallest_eps_by_recall_and_for_each_structure(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    out = tmp_path / "run"
    words = ["evaluate", "-b", bundle, "-o", out, "--minimum-eps", "pgd steps=4", "--below", "0.6", "--most", "0.4"]
    call(*words, "--broken-by", "recall", "--per-structure", "--no-pictures")
    records = read_csv(out / "records.csv")
    names = {record.condition for record in records if record.metric == "minimum_eps"}
    assert len(names) > 1
    assert "minimum eps, PGD" in names
    recalls = [record.value for record in records if record.metric == "recall_at_minimum_eps"]
    assert len(recalls) == 2 * len(names)
    assert max(recalls) < 0.6
    assert "PGD, L∞, /255 | recall below 0.6 |" in (out / "report.md").read_text()
    call(*words, "-o", tmp_path / "x", "--broken-by", "iou", code=2)
    call("evaluate", "-b", bundle, "-o", tmp_path / "x", "-a", "fgsm", "--per-structure", code=2)
    call("evaluate", "-b", bundle, "-o", tmp_path / "x", "-a", "fgsm", "--broken-by", "recall", code=2)
    no = ["--minimum-eps", "pgd objective=CE", "--per-structure"]
    call("evaluate", "-b", bundle, "-o", tmp_path / "x", *no, code=2)


def test_attacks_made_on_another_network(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    twin, contrary = tmp_path / "twin.pt", tmp_path / "contrary.pt"
    torch.save(VoxelLinear(3.0).state_dict(), twin)
    torch.save(VoxelLinear(-6.0).state_dict(), contrary)
    out = tmp_path / "run"
    words = ["evaluate", "-b", bundle, "-o", out, "-a", "fgsm eps=8/255 objective=CE", "--no-pictures"]
    call(*words, "--transfer", f"twin={twin}", "--transfer", f"contrary={contrary}", "--transfer", f"copy={bundle}")
    records = read_csv(out / "records.csv")
    for case in ("case0", "case1"):
        wanted = {"case": case, "metric": "dice", "class_name": "organ"}
        itself = values(records, condition="FGSM", **wanted)
        assert values(records, condition="FGSM from twin", **wanted) == itself
        assert values(records, condition="FGSM from copy", **wanted) == itself
        helped = values(records, condition="FGSM from contrary", **wanted)
        assert helped == pytest.approx([known_dice(bundle, case, -8 / 255)], abs=1e-3)
    (text,) = {r.attack for r in records if r.condition == "FGSM from twin"}
    assert " made on twin (VoxelLinear twin.pt sha256:" in text
    (matrix,) = matrices(records)
    assert matrix["columns"] == ["the target itself", "twin", "contrary", "copy"]
    assert not any(cell["worse"] for cell in matrix["lines"][0]["cells"])
    assert "FGSM, made on" in (out / "report.html").read_text()
    call(*words, "--transfer", "twin", code=2)
    call(*words, "--transfer", f"twin={tmp_path / 'nothing.pt'}", code=2)


def test_a_matrix_of_several_targets_marks_what_beats_the_attack_itself() -> None:
    shared = {"case": "a", "metric": "dice", "class_name": "liver"}
    found = matrices(
        [
            Record(condition="clean", model="m", value=0.9, **shared),
            Record(condition="PGD", model="m", attack="PGD()", value=0.5, **shared),
            Record(condition="PGD from n", model="m", attack="PGD() made on n (n.pt)", value=0.4, **shared),
            Record(condition="PGD", model="n", attack="PGD()", value=0.1, **shared),
            Record(condition="FGSM", model="n", attack="FGSM()", value=0.1, **shared),
        ]
    )
    assert [matrix["attack"] for matrix in found] == ["PGD"]
    assert [line["clean"] for line in found[0]["lines"]] == ["0.900", "–"]
    assert [[cell["dice"] for cell in line["cells"]] for line in found[0]["lines"]] == [
        ["0.500", "0.400"],
        ["0.100", "–"],
    ]
    assert [cell["worse"] for cell in found[0]["lines"][0]["cells"]] == [False, True]


def test_noise_is_not_made_on_anything() -> None:
    made = transfer_conditions({"PGD": PGD(), "noise": RandomNoise()}, {"b": "b.pt"})
    assert [condition.name for condition in made] == ["PGD from b"]
    with pytest.raises(ValueError, match="needs a model"):
        transfer_conditions({"noise": RandomNoise()}, {"b": "b.pt"})
