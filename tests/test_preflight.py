"""Before and after a run: its time, and whether it can be believed; what was found is read back from a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import small_bundle
from test_cli import call

from medrobust.attacks import APGD, FGSM, PGD, Square, Standard
from medrobust.evaluation import TILES, WHOLE, Condition
from medrobust.findings import FILE, Checked, read, write
from medrobust.minimum_eps import MinimumEps
from medrobust.preflight import cost, duration, estimates, is_long, plan, strongest, work
from medrobust.records import Record
from medrobust.report import html, markdown
from medrobust.soundness import MEANING, Finding

WEAK, STRONG = PGD(steps=10), PGD(steps=10, restarts=3)


def condition(name: str, attack: object, protocol: str = WHOLE, **settings: object) -> Condition:
    return Condition(name=name, attack=attack, protocol=protocol, **settings)  # type: ignore[arg-type]


def test_time_is_told_where_it_is_long() -> None:
    sea = [condition(f"SEA {name}", APGD(steps=100)) for name in ("MCE", "JS")]
    assert estimates([*sea, condition("FGSM", FGSM())], 3.6, 2) == ["SEA: about 12 min a case, 2 cases: 24 min"]
    assert not is_long([condition("PGD", PGD(steps=49))])
    assert is_long([condition("PGD", PGD(steps=25)), condition("PGD", PGD(steps=25), TILES)])


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work() -> None:
    assert work(condition("a", STRONG)) == 30
    assert work(condition("a", Square(queries=300))) == 100
    assert work(condition("a", WEAK, minimum=MinimumEps(attack=WEAK, rounds=4, walk=7))) == 57
    assert work(condition("a", WEAK, minimum=MinimumEps(attack=Square(queries=30), rounds=1))) == 20
    assert work(condition("a", WEAK, stored=("a", "png"))) == 0
    assert 300 <= work(condition("a", Standard())) <= 350


def test_the_strongest_attack_is_asked_about() -> None:
    long = condition("long", STRONG)
    wide = condition("wide", PGD(steps=30, eps=16 / 255))
    others = [
        condition("one step", FGSM()),
        condition("tiles", PGD(steps=90), TILES),
        condition("targeted", PGD(steps=90, targeted=True)),
        condition("elsewhere", PGD(steps=90), surrogate="b"),
    ]
    assert strongest([*others, condition("weak", WEAK), wide, long]) is wide
    assert strongest(others) is None


def test_of_the_standard_ensemble_the_first_member_is_asked_about() -> None:
    found = strongest([condition("Standard", Standard(eps=4 / 255)), condition("PGD", PGD(steps=20))])
    assert found is not None
    assert found.name == "Standard, first member"
    assert found.attack == Standard(eps=4 / 255).members[0]


def test_the_rule_of_the_checklist() -> None:
    asked = condition("PGD", PGD(steps=20))
    affordable = 600 / cost(asked, quick=True)
    assert plan(asked, "auto", affordable) == ("quick", "")
    mode, why = plan(asked, "auto", affordable * 1.5)
    assert (mode, why) == ("", "it would take about 15 min, more than 10 min: ask for it with --soundness quick")
    assert plan(asked, "quick", affordable * 100) == ("quick", "")
    assert plan(asked, "full", affordable * 100) == ("full", "")
    assert plan(asked, "off", 0)[1] == "it was switched off"
    assert "no attack of this run" in plan(None, "auto", 0)[1]
    assert plan(asked, "auto", None)[1] == "no case could be read"
    with pytest.raises(ValueError, match="among auto, quick, full, off, got 'on'"):
        plan(asked, "on", 0)


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    findings = (
        Finding(check="slope", ok=False, text="too flat", value=math.nan),
        Finding(check="noise", ok=True, text="fine", value=0.5),
    )
    path = tmp_path / FILE
    assert read(path) is None
    write(Checked(model="m", case="a", condition="PGD", attack="PGD()", mode="quick", findings=findings), path)
    found = read(path)
    assert found is not None
    assert found.findings[1] == findings[1]
    assert math.isnan(found.findings[0].value)
    assert json.loads(path.read_text())["findings"][0]["value"] is None
    for text in ("[]", '{"model": "m"}', "no json", path.read_text().replace('"slope"', '"slop"')):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected findings of medrobust"):
            read(path)


def test_a_report_warns_in_words_on_top() -> None:
    records = [Record(case="a", condition="clean", metric="dice", class_name="liver", value=0.9)]
    bad = Finding(check="noise", ok=False, text="Dice 0.5 and 0.5", value=0.0)
    checked = Checked(model="", case="a", condition="PGD", attack="PGD()", mode="quick", findings=(bad,))
    for page in (html(records, checks=[checked]), markdown(records, checks=[checked])):
        assert page.index(MEANING["noise"]) < page.index("Results" if "<html" in page else "| Condition")
        assert "1 of 1 checks warn" in page
    for page in (html(records, checks=[Checked(model="", why_not="of time")]), markdown(records, checks=[])):
        assert "Do not trust" not in page
    assert "was not run: of time." in html(records, checks=[Checked(model="", why_not="of time")])


def test_a_run_checks_itself_once_and_reports_it(tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle", cases=1)
    out = tmp_path / "run"
    words = ["evaluate", "-b", bundle, "-o", out, "-a", "pgd eps=0.1 steps=2", "--no-pictures"]
    call(*words)
    found = read(out / FILE)
    assert found is not None
    assert (found.case, found.condition, found.mode) == ("case0", "PGD", "quick")
    assert {finding.check for finding in found.findings} == MEANING.keys() - {"transfer"}
    page = (out / "report.html").read_bytes()
    assert b"The quick checklist asked about PGD on case0" in page
    stamp = (out / FILE).stat().st_mtime_ns
    call(*words)
    call(*words, "--soundness", "off")
    assert (out / FILE).stat().st_mtime_ns == stamp
    call("report", out)
    assert (out / "report.html").read_bytes() == page
    other = tmp_path / "other"
    told = call("evaluate", "-b", bundle, "-o", other, "-a", "pgd steps=50", "--soundness", "off", "--no-pictures")
    assert "PGD: about" in told
    assert "1 case: " in told
    assert "The soundness checklist was not run: it was switched off." in (other / "report.md").read_text()
