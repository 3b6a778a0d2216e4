"""``medrobust status``: what a run that is at work has written, counted by hand."""

from __future__ import annotations

import json
import os
import socket
from calendar import timegm
from pathlib import Path

import batch_tree
import pytest
import small_bundle
from typer.testing import CliRunner

from medrobust.batch.locks import membership
from medrobust.batch.status import status_of, told
from medrobust.cli import app

NOON = timegm((2026, 1, 2, 12, 0, 0))
KEYS = [f"case-{number:016x}" for number in range(6)]


def write_run(output: Path, name: str, events: list[tuple[int, dict[str, object]]], **note: object) -> None:
    runs = output / ".state" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"ts": f"2026-01-02T12:{second // 60:02d}:{second % 60:02d}.500Z", "level": "info", **event})
        for second, event in events
    ]
    (runs / f"{name}.jsonl").write_text("\n".join(lines) + '\n{"ts": "2026-01-02T12:0')
    (runs / f"{name}.json").write_text(json.dumps(note))


def test_what_is_at_work_and_left(tmp_path: Path) -> None:
    for folder in ("cases", "quarantine"):
        (tmp_path / folder).mkdir()
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    events: list[tuple[int, dict[str, object]]] = [
        (0, {"event": "begin", "cases": 6}),
        (1, {"event": "stage", "case": KEYS[0], "stage": "read"}),
        (1, {"event": "stage", "case": KEYS[1], "stage": "read"}),
        (20, {"event": "done", "case": KEYS[0]}),
        (25, {"event": "stage", "case": KEYS[2], "stage": "segment"}),
        (40, {"event": "again", "case": KEYS[1]}),
        (60, {"event": "rejected", "case": KEYS[3]}),
    ]
    write_run(tmp_path, "b", events, **here)
    write_run(tmp_path, "a", events, end="then", exit=3, **here)
    write_run(tmp_path, "dead", events, host=socket.gethostname(), pid=2**22 + 1)
    with membership(tmp_path / ".state", {"bundle": "x"}):
        found = status_of(tmp_path, now=NOON + 85)
        assert status_of(tmp_path, now=NOON + 85) == found  # looking disturbs nothing
    (run,) = found["runs"]
    assert run == {
        "run": "b",
        "cases": 6,
        "did": 2,
        "left": 4,
        "at_work": {KEYS[2]: ("segment", 60)},
        "seconds": 30,
        "to_go": 120,
    }
    text = told(found)
    assert "b: 2 of 6 cases, 4 left, 30 s a case, about 2 min to go" in text
    assert f"{KEYS[2]}: segment, for 60 s" in text
    assert not status_of(tmp_path)["running"]


def test_after_a_run(tmp_path: Path) -> None:
    bundle, tree = small_bundle.make(tmp_path / "bundle"), batch_tree.make(tmp_path / "in", sound=2)
    runner = CliRunner()
    words = ["batch", str(tree), str(tmp_path / "out"), "-b", str(bundle), "--trust-bundle", "--workers", "0", "-q"]
    assert runner.invoke(app, words).exit_code == 3
    text = runner.invoke(app, ["status", str(tmp_path / "out")])
    assert text.exit_code == 0
    assert (
        text.output == "cases in OUTPUT: 2 done, 3 rejected\nno run is at work; the last one ended with exit code 3\n"
    )
    found = json.loads(runner.invoke(app, ["status", str(tmp_path / "out"), "--json"]).output)
    assert found == {"cases": {"done": 2, "rejected": 3}, "running": False, "runs": [], "last_exit": 3}


@pytest.mark.parametrize("name", ["bundle", "nothing"])
def test_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    small_bundle.make(tmp_path / "bundle")
    result = CliRunner().invoke(app, ["status", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "expected an OUTPUT of `medrobust batch`" in result.output
