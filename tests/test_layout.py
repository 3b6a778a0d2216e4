"""The house rules that a tool can keep: arrows point down, packages are as on disk, no path of a machine slips in."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medrobust import attacks, metrics

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("transforms", "attacks", "networks", "medrobust")
FOLDERS = {"attacks", "networks", "transforms"}
MAY_IMPORT = {
    "transforms": {"transforms"},
    "attacks": {"attacks", "transforms"},
    "networks": {"networks", "transforms"},
    "medrobust": set(ROOMS),
}
MACHINE_PATH = re.compile(r"(?:^|[^A-Za-z0-9_.~$}/])/(?:home|Users|root|mnt|work|scratch|farm)/[A-Za-z0-9_.]")
"""A path into somebody's home or machine; ``/tmp`` and ``/path/to`` are nobody's."""


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" if base.strip(".") else base + alias.name for alias in node.names)


def room_of(name: str) -> str | None:
    """Which room a dotted name lies in; ``None`` is another library's."""
    top, _, rest = name.partition(".")
    if top != "medrobust":
        return top if top in {*FOLDERS, "bundles", "tests", "benchmarks"} else None
    below = rest.partition(".")[0]
    return below if below in FOLDERS else "medrobust"


def wrong_arrows(room: str, source: str) -> list[str]:
    """Imports of a module in ``room`` that point up, sideways, or to a folder's own name."""
    return [
        name
        for name in imported(source)
        if name.startswith(".")
        or (room_of(name) is not None and (room_of(name) not in MAY_IMPORT[room] or name.partition(".")[0] in FOLDERS))
    ]


def packages_on_disk(root: Path) -> set[str]:
    """Import names of all folders with an ``__init__.py`` in the four rooms."""
    inits = (path.parent.relative_to(root).parts for room in ROOMS for path in (root / room).rglob("__init__.py"))
    return {".".join(parts if parts[0] == "medrobust" else ("medrobust", *parts)) for parts in inits}


def without_row(names: list[str], text: str) -> list[str]:
    """Names that start no row of a table in ``text``, in any of the spellings ``a_b``, ``a-b`` and ``AB``."""
    cells = (line.split("|")[1] for line in text.splitlines() if line.startswith("|") and line.count("|") > 1)
    first = {re.sub(r"[^a-z0-9]", "", word.lower()) for cell in cells for word in re.findall(r"[\w-]+", cell)}
    return [name for name in names if name.replace("_", "") not in first]


def machine_paths(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_arrows_point_down() -> None:
    sources = [(room, path) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert {room for room, _ in sources} == set(ROOMS)
    found = {str(path): wrong_arrows(room, path.read_text(encoding="utf-8")) for room, path in sources}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("attacks", "from medrobust.networks.weights import load_weights"),
        ("attacks", "def late():\n    import medrobust.handlers"),
        ("networks", "from medrobust import attacks"),
        ("transforms", "import medrobust.attacks.base as base"),
        ("transforms", "from medrobust import __version__"),
        ("attacks", "from . import base"),
        ("attacks", "from .base import Attack"),
        ("medrobust", "import attacks"),
        ("medrobust", "from transforms.dct import dct"),
        ("medrobust", "import bundles.something"),
        ("networks", "import tests.oracles"),
    ],
)
def test_a_wrong_arrow_is_found(room: str, line: str) -> None:
    assert len(wrong_arrows(room, line)) == 1


def test_right_arrows_pass() -> None:
    assert wrong_arrows("attacks", "import torch\nfrom medrobust.transforms.dct import dct\nimport networkx") == []
    assert wrong_arrows("medrobust", "from medrobust import attacks\nfrom medrobust.networks import weights") == []


def test_importing_the_package_imports_no_room() -> None:
    assert list(imported((ROOT / "medrobust/__init__.py").read_text(encoding="utf-8"))) == ["pathlib.Path"]


def test_setup_lists_the_packages_on_disk() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(setup["options"]["packages"].split()) == packages_on_disk(ROOT)


def test_a_package_that_setup_forgot_is_found(tmp_path: Path) -> None:
    for folder in ("medrobust", "medrobust/data", "attacks", "attacks/deep", "networks", "transforms"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    expected = {"medrobust", "medrobust.data", "medrobust.attacks", "medrobust.attacks.deep", "medrobust.networks"}
    assert packages_on_disk(tmp_path) == {*expected, "medrobust.transforms"}


def test_a_room_refuses_its_folders_name() -> None:
    code = f"""
for name in {sorted(FOLDERS)}:
    try:
        __import__(name)
    except ImportError as error:
        assert f"import medrobust.{{name}}" in str(error), error
    else:
        raise SystemExit(f"import {{name}} worked")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", [attacks, metrics], ids=["attacks", "metrics"])
def test_the_readme_has_a_row_for_each(room: Any) -> None:
    names = list(room.names())
    assert len(names) > 3
    assert without_row(names, (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_a_missing_row_is_found() -> None:
    table = "| attack | paper |\n|---|---|\n| `VAFA2D` | and fgsm here |\n| [`gaussian_noise`](x.md) | none |\npgd\n"
    assert without_row(["vafa2d", "gaussian_noise", "fgsm", "pgd"], table) == ["fgsm", "pgd"]


def test_no_tracked_file_holds_a_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        try:
            lines = machine_paths((ROOT / name).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if lines and name != "tests/test_layout.py":
            found[name] = lines
    assert found == {}


def test_a_path_of_a_machine_is_found() -> None:
    bad = ["open('/home/ann/x')", "/Users/bob/data", f"cd /{'root'}/x", "a=/mnt/disk"]
    good = ["--dataset_dir /path/to/scans", "/tmp/x", "https://a.org/home/x", "docs/work/x", "$HOME/work/x"]
    assert machine_paths("\n".join([*bad, *good])) == bad
