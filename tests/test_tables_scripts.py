"""Every measured block of the pages has the script that makes it, and scripts replace their own blocks only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "tables"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
FIRST = "before\n\n<!-- table: a -->\nold\n<!-- end: a -->\n\nbetween\n\n"
PAGE = f"{FIRST}<!-- table: a.b -->\n\nkept\n\n<!-- end: a.b -->\n"

Load = Callable[[str], ModuleType]

pytest.importorskip("transformers")  # of one script


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script as it imports its neighbours: from its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("common", *SCRIPTS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("common", *SCRIPTS):
        sys.modules.pop(name, None)


def test_every_block_has_its_script_and_every_script_its_blocks(load: Load) -> None:
    common = load("common")
    made = [block for script in SCRIPTS for block in load(script).BLOCKS]
    asked = [name for page in common.pages() for name in common.block_names(page.read_text(encoding="utf-8"))]
    assert sorted(asked) == sorted(made)
    assert all(block.partition(".")[0] == script for script in SCRIPTS for block in load(script).BLOCKS)


def test_every_block_can_be_written_where_it_stands(load: Load, tmp_path: Path) -> None:
    common = load("common")
    for page in common.pages():
        text = page.read_text(encoding="utf-8")
        copy = tmp_path / "page.md"
        copy.write_text(text, encoding="utf-8")
        for name in common.block_names(text):
            common.write_block(copy, name, f"new {name}")
        after = copy.read_text(encoding="utf-8")
        assert all(f"-->\n\nnew {name}\n\n<!--" in after for name in common.block_names(text))


def test_a_block_is_replaced_and_nothing_else(load: Load, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    load("common").write_block(page, "a", "| new |\n|---|\n")
    expected = PAGE.replace("-->\nold\n<!--", "-->\n\n| new |\n|---|\n\n<!--")
    assert page.read_text(encoding="utf-8") == expected
    load("common").write_block(page, "a", "| new |\n|---|")
    assert page.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    "text",
    ["", PAGE.replace("<!-- end: a -->", ""), PAGE + PAGE, PAGE.replace("table: a ", "end: a ", 1)],
    ids=["none", "no end", "twice", "two ends"],
)
def test_a_page_without_the_block_is_refused(load: Load, tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="one block"):
        load("common").write_block(page, "a", "new")
    assert page.read_text(encoding="utf-8") == text


def test_another_setting_is_another_run(load: Load, ct_organs: Path) -> None:
    common = load("common")
    folders = {common.prepared("ct_organs_unetr", word)[0].folder for word in ("pgd", "pgd steps=21", "pgd steps=20")}
    assert len(folders) == 2  # 20 steps are the default


def test_tiny_settings_are_never_written(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--write", "--quick"])
    with pytest.raises(SystemExit):
        load("common").arguments("")
