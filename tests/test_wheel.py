"""The wheel holds everything, nothing else, and works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("attacks", "medrobust", "networks", "transforms")
ROOT_FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg")
LEFT_OUT = ("__pycache__", ".pyc")


def shell(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def in_the_wheel(root: Path) -> set[str]:
    """The files of the four rooms, under the names that a wheel gives them."""
    files = (path.relative_to(root) for room in ROOMS for path in (root / room).rglob("*") if path.is_file())
    kept = (path for path in files if not any(part in str(path) for part in LEFT_OUT))
    return {path.as_posix() if path.parts[0] == "medrobust" else f"medrobust/{path.as_posix()}" for path in kept}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A wheel built from a clean copy, so that no earlier build leaks into it, and the names that it must hold."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT_FILES:
        shutil.copy(ROOT / name, source / name)
    expected = in_the_wheel(source)
    shell(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source, cwd=target)
    (found,) = target.glob("medrobust-*.whl")
    return found, expected


def test_the_wheel_holds_the_rooms_and_nothing_else(built: tuple[Path, set[str]]) -> None:
    wheel, expected = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "medrobust/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"medrobust"}


def test_the_wheel_works_without_the_checkout(built: tuple[Path, set[str]], tmp_path: Path) -> None:
    wheel, expected = built
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shell(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=elsewhere)
    code = f"""
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

# An editable install adds finders and paths of its own; what is under test stands alone.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path({str(ROOT)!r})]
import medrobust

target = Path({str(target)!r}).resolve()
names = ["medrobust", *(found.name for found in walk_packages(medrobust.__path__, "medrobust."))]
for name in names:
    if name != "medrobust.__main__":
        assert Path(import_module(name).__file__).resolve().is_relative_to(target), name
print(*names)
"""
    printed = shell(sys.executable, "-P", "-c", code, cwd=elsewhere, PYTHONPATH=str(target)).split()
    modules = {name.removesuffix(".py").replace("/", ".") for name in expected if name.endswith(".py")}
    assert set(printed) == {name.removesuffix(".__init__") for name in modules}
    usage = shell(sys.executable, "-m", "medrobust", "--help", cwd=elsewhere, PYTHONPATH=str(target))
    assert "attack" in usage
    assert "evaluate" in usage
