"""A bar for people, lines for machines, errors always."""

from __future__ import annotations

import io
import json
from pathlib import Path

from medrobust.batch.logs import Log, new_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def night(log: Log) -> None:
    with log:
        log.expect(2)
        log("stage", case="case-1", stage="read")
        log("done", case="case-1", advance=True, seconds=1.5)
        log("rejected", case="case-2", level="error", code="truncated", reason="[cut]", advance=True)


def test_elsewhere_every_event_is_a_line(tmp_path: Path) -> None:
    screen = io.StringIO()
    night(Log(tmp_path / "log.jsonl", screen=screen))
    lines = [json.loads(line) for line in screen.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["stage", "done", "rejected"]
    assert lines[2] == {**lines[2], "level": "error", "case": "case-2", "code": "truncated", "reason": "[cut]"}
    assert all(len(line["ts"]) == 24 and line["ts"].endswith("Z") for line in lines)
    assert (tmp_path / "log.jsonl").read_text() == screen.getvalue()


def test_quiet_leaves_errors_and_the_file_has_all(tmp_path: Path) -> None:
    screen = io.StringIO()
    night(Log(tmp_path / "log.jsonl", quiet=True, screen=screen))
    assert [json.loads(line)["event"] for line in screen.getvalue().splitlines()] == ["rejected"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_terminal_has_a_bar_and_the_errors(tmp_path: Path) -> None:
    screen = Terminal()
    night(Log(tmp_path / "log.jsonl", screen=screen))
    text = screen.getvalue()
    assert "rejected: case-2 truncated [cut]" in text
    assert '"event"' not in text
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_runs_have_names_of_their_own() -> None:
    assert len({new_run() for _ in range(20)}) == 20
