"""Accuracy and recall under attack: what is recorded, what is made of it, and that attacks do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_clip_network import make, pictures, texts
from torch.nn import functional as F

from medrobust.attacks import FGSM, PGD, Margin
from medrobust.evaluation import CLEAN_CONDITION, Condition
from medrobust.ranking import rank
from medrobust.records import Record, read_csv
from medrobust.zero_shot import classify, compare, conditions, for_classes, retrieve
from medrobust.zero_shot_report import WORST, curves, summary, table

CLASSES = ["liver", "spleen", "aorta", "spine"]
LABEL = torch.tensor([0, 1, 3]).view(3, 1, 1, 1)


def batches() -> list[dict[str, Any]]:
    return [{"image": pictures(), "label": LABEL, "case": ["a", "b", "c"]}]


def test_each_image_has_its_rank_and_the_size_of_its_perturbation() -> None:
    network = make(trainable="none")
    attack = for_classes(FGSM(eps=4 / 255))
    records = classify(network, batches(), Condition(name="FGSM 4/255", attack=attack), CLASSES, model="m", seed=3)
    image_adv = attack(network, pictures(), LABEL)
    with torch.no_grad():
        expected = rank(network(image_adv), LABEL).flatten().tolist()
    ranks = [record for record in records if record.metric == "rank"]
    assert [record.value for record in ranks] == expected
    assert [(record.case, record.class_name) for record in ranks] == [("a", "liver"), ("b", "spleen"), ("c", "spine")]
    assert {record.attack for record in records} == {repr(attack)}
    sizes = [record.value for record in records if record.metric == "linf"]
    assert sizes == pytest.approx([4 / 255] * 3, abs=1e-6)
    clean = classify(network, batches(), CLEAN_CONDITION, CLASSES)
    assert [record.metric for record in clean] == ["rank"] * 3
    assert {record.attack for record in clean} == {""}


def made_up(model: str, condition: str, ranks: list[int]) -> list[Record]:
    cases = [f"case {number}" for number in range(len(ranks))]
    return [
        Record(case=case, condition=condition, metric="rank", value=value, model=f"{model} sha256:00")
        for case, value in zip(cases, ranks, strict=True)
    ]


RECORDS = [
    *made_up("base", "clean", [1, 1, 2, 7]),
    *made_up("base", "noise 4/255", [1, 1, 1, 6]),
    *made_up("base", "PGD 4/255", [2, 1, 9, 1]),
    *made_up("base", "APGD 4/255", [1, 6, 1, 1]),
    *made_up("robust", "clean", [1, 1, 1, 2]),
    *made_up("robust", "PGD 4/255", [1, 3, 1, 2]),
]


def test_the_summary_is_counted_from_ranks() -> None:
    rows = {(row.model, row.attack, row.eps): (row.top1, row.top5) for row in summary(RECORDS)}
    assert rows[("base", "clean", 0)] == (0.5, 0.75)
    assert rows[("base", "noise", 4)] == (0.75, 0.75)
    assert rows[("base", "PGD", 4)] == (0.5, 0.75)
    assert rows[("base", WORST, 4)] == (0.0, 0.25)
    assert rows[("robust", WORST, 4)] == (0.5, 1.0)


def test_table_and_curves_come_from_the_records() -> None:
    lines = table(RECORDS).splitlines()
    assert lines[0] == "| attack | eps | base | robust |"
    assert "| PGD | 4/255 | 50.0 / 75.0 | 50.0 / 100.0 |" in lines
    assert "| noise | 4/255 | 75.0 / 75.0 |  |" in lines
    assert lines[-1] == "Top-1 / top-5 in per cent of 4 images; ties count as wrong."
    assert curves(RECORDS).startswith(b"\x89PNG")


def test_conditions_are_named_after_attack_and_size() -> None:
    found = conditions([1 / 255, 4 / 255], steps=3, apgd_steps=7)
    names = [condition.name for condition in found]
    assert names[:5] == ["clean", "noise 1/255", "FGSM 1/255", "PGD 1/255", "APGD 1/255"]
    assert len(names) == 9
    assert "steps=7" in found[-1].text
    assert found[-1].attack.criterion == Margin()  # type: ignore[union-attr]


def test_models_are_compared_once_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    network = make(trainable="none")
    files = {}
    for name, scale in (("base", 1.0), ("other", -1.0)):
        files[name] = tmp_path / f"{name}.pt"
        torch.save({k: v * scale if "visual_proj" in k else v for k, v in network.state_dict().items()}, files[name])
    wanted = conditions([4 / 255], steps=2, apgd_steps=4)
    first = compare(network, files, batches(), wanted[:2], CLASSES, tmp_path / "run")
    path = tmp_path / "run" / "records.csv"
    before = path.read_bytes()
    records = compare(network, files, batches(), wanted, CLASSES, tmp_path / "run")
    assert path.read_bytes().startswith(before)
    assert records[: len(first)] == first
    assert len({(r.case, r.condition, r.metric, r.model) for r in records}) == len(records) == 2 * (3 + 4 * 9)
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8") == table(read_csv(path))
    assert (tmp_path / "run" / "curves.png").is_file()
    # The other projection turns every cosine round, so that the best becomes the last.
    ranks = {
        model: [r.value for r in records if r.metric == "rank" and r.condition == "clean" and r.model.startswith(model)]
        for model in files
    }
    assert [5 - value for value in ranks["base"]] == ranks["other"]


def test_retrieval_attacks_push_away_and_pull_toward() -> None:
    network, ids, owner = make(trainable="none"), texts(5, seed=4), [0, 0, 1, 2, 2]

    def cosines(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return F.normalize(network.embed(image), dim=-1) @ network.text_features(ids).t()

    clean = cosines(pictures())
    attack = PGD(eps=16 / 255, steps=8)
    to_text, to_image, away = retrieve(network, pictures(), ids, owner, attack)
    own = torch.tensor(owner)[None] == torch.arange(3)[:, None]
    means = [torch.where(own, table, 0).sum(1) / own.sum(1) for table in (clean, cosines(away))]
    assert (means[1] < means[0] - 1e-3).all()
    assert (away - pictures()).abs().max() <= 16 / 255 + 1e-6
    assert (len(to_text), len(to_image)) == (3, 5)

    target = [3, 4, 0]
    _, _, toward = retrieve(network, pictures(), ids, owner, PGD(eps=16 / 255, steps=8, targeted=True), target=target)
    rows = torch.arange(3)
    assert (cosines(toward)[rows, target] > clean[rows, target] + 1e-3).all()
    plain, _, same = retrieve(network, pictures(), ids, owner)
    assert torch.equal(same, pictures())
    assert len(plain) == 3
    with pytest.raises(ValueError, match="a target caption with a targeted attack"):
        retrieve(network, pictures(), ids, owner, attack, target=target)
