"""What the tables share: evaluate attacks on shipped weights, read the numbers, write them into the pages.

A run's folder in the cache is named after its weights and a hash of all that decides its numbers, the settings of the
attack above all. So a run that was killed goes on, tables share runs, and a new default is a new run.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from medrobust.atomic import write_text
from medrobust.attacks.base import Attack
from medrobust.bundle import Bundle
from medrobust.data.archive import cache_folder
from medrobust.evaluation import WHOLE
from medrobust.parsing import parse_attack
from medrobust.preparing import prepare
from medrobust.records import CLEAN, Record, read_csv
from medrobust.run import Run
from medrobust.statistics import per_case

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "bundles"
TINY = {"steps": 1, "restarts": 1, "queries": 4, "progressive": False}
"""Settings of all attacks with ``--quick``."""


def arguments(text: str | None, **flags: str) -> argparse.Namespace:
    """``--write`` and ``--quick`` of every script, and ``flags`` with their help of one."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into its page, not only on the screen")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that the script works")
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    found = parser.parse_args()
    if found.write and found.quick:
        parser.error("expected --write or --quick, got both: numbers of tiny settings belong on no page")
    return found


def folder(quick: bool) -> Path:
    """Where runs go: the user's cache, or with ``--quick`` a folder that is gone afterwards."""
    return _temporary() if quick else cache_folder() / "benchmarks" / "tables"


@cache
def _temporary() -> Path:
    made = Path(tempfile.mkdtemp(prefix="medrobust-tables-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def short_hash(*parts: object) -> str:
    """Eight letters that stand for the parts' texts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:8]


def label(word: str) -> str:
    """What records call an attack that is typed like this."""
    return parse_attack(word)[0]


def prepared(
    bundle: str, word: str = "", *, weights: Path | str = "model.pt", quick: bool = False, **words: Any
) -> tuple[Run, list[dict[str, Any]]]:
    """The run of one attack as ``medrobust evaluate`` would make it, and its cases.

    Args:
        bundle: its name.
        word: the attack as typed; empty: what ``words`` ask for.
        weights: a file of the bundle's ``models``, or any path.
        quick: tiny settings, one case, of a volume one window.
        words: further arguments of :func:`medrobust.preparing.prepare`.
    """
    path = BUNDLES / bundle / "models" / weights  # an absolute path stays as it is
    run, cases = prepare(
        bundle=BUNDLES / bundle,
        output=Path(),
        attack=[word] if word else [],
        weights=path,
        pictures=False,
        **words,
    )
    run.volumes = False
    run, cases = quickened(run, cases) if quick else (run, cases)
    told = [(condition.name, condition.protocol, condition.text) for condition in run.conditions]
    key = short_hash(run.evaluation.model, run.evaluation.seed, run.settings, told, [sorted(c.items()) for c in cases])
    name = word.rpartition(":")[2].split()[0] if word else "other"
    run.folder = folder(quick) / f"{bundle}-{path.stem}" / f"{name}-{key}"
    return run, cases


def measured(
    bundle: str, word: str = "", *, weights: Path | str = "model.pt", quick: bool = False, **words: Any
) -> list[Record]:
    """Records of that run, which is done now where it is not there yet.

    Raises:
        RuntimeError: a case failed.
    """
    run, cases = prepared(bundle, word, weights=weights, quick=quick, **words)
    run.evaluate(cases, say)
    if run.failures:
        raise RuntimeError(f"expected all cases of {run.folder}, got failures: {run.failures}")
    return read_csv(run.records_path)


def say(case: str, what: str) -> None:
    """Progress, beside the table."""
    if what not in ("reading", "already there"):
        print(f"  {case}: {what}", file=sys.stderr, flush=True)


def quickened(run: Run, cases: Sequence[dict[str, Any]]) -> tuple[Run, list[dict[str, Any]]]:
    """The same run with tiny settings, on its first case, of a volume one window."""
    run.conditions = [
        one  # the clean condition is known by its identity
        if one.attack is None
        else replace(
            one,
            attack=_tiny(one.attack) if isinstance(one.attack, Attack) else one.attack,
            minimum=one.minimum and replace(one.minimum, attack=_tiny(one.minimum.attack), rounds=1),
        )
        for one in run.conditions
    ]
    if run.settings["bundle"] == "ct_organs_unetr":
        whole = run.preprocessing
        run.preprocessing = lambda paths: _window(whole(paths))
    return run, list(cases[:1])


def _tiny(attack: Attack) -> Attack:
    own = {field.name for field in fields(attack)}
    changes = {name: value for name, value in TINY.items() if name in own and getattr(attack, name)}
    return replace(attack, **changes)


def _window(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[key][:, 42:122, 14:94, :16] for key in ("image", "label")}


def mean(
    records: Iterable[Record], condition: str, metric: str = "dice", *, protocol: str = WHOLE, structure: str = ""
) -> float:
    """The mean of a metric over cases and structures under a condition, or of one structure.

    Raises:
        ValueError: the records do not hold it.
    """
    rows = [
        record
        for record in records
        if (record.metric, record.condition) == (metric, condition)
        and record.protocol == ("" if condition == CLEAN else protocol)
        and structure in ("", record.class_name)
    ]
    if not rows:
        raise ValueError(f"expected {metric} under {condition}, {protocol}, in the records, got none")
    values = per_case(rows).values()
    return sum(values) / len(values)


def three(value: float) -> str:
    """A number as tables show it."""
    return f"{value:.3f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; an empty cell keeps its place."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)


def sentence(text: str) -> str:
    """Running text, broken into lines as the pages are."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def bundle_run(bundle: str, configs: Sequence[str], overrides: Mapping[str, Any]) -> None:
    """``python -m monai.bundle run`` with some of a bundle's configurations, in a process of its own."""
    files = [str(BUNDLES / bundle / "configs" / name) for name in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    for key, value in {"bundle_root": BUNDLES / bundle, **overrides}.items():
        command += [f"--{key}", str(value)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def trained(bundle: str, configs: Sequence[str], *, gives: str, quick: bool, **overrides: Any) -> Path:
    """Weights that are not shipped, trained by the bundle's own recipe into the cache; a killed training goes on.

    Args:
        configs: ``train.yaml`` and overlays.
        gives: file in the output folder.
        overrides: of the configuration; ``--quick`` trains one epoch.
    """
    overlays = [BUNDLES / bundle / "configs" / name for name in configs[1:]]
    attack = Bundle(root=BUNDLES / bundle, overrides={}, overlays=overlays).parser.get_parsed_content("train_attack")
    if quick:
        overrides |= {"max_epochs": 1}
    key = short_hash(attack, overrides, *(path.read_text(encoding="utf-8") for path in overlays))
    target = folder(quick) / f"{bundle}-{overlays[-1].stem}-{key}"
    if not (target / gives).is_file():
        bundle_run(bundle, configs, {"output_dir": target, **overrides})
    return target / gives


def pages(root: Path = ROOT) -> list[Path]:
    """All pages that may hold a table."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("bundles/*/docs/README.md"))]


def block_names(text: str) -> list[str]:
    """Names of the blocks that a page begins."""
    return re.findall(r"^<!-- table: (\S+) -->$", text, re.MULTILINE)


def write_block(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``, each alone on its line.

    Raises:
        ValueError: the page does not have exactly one such block.
    """
    first, last = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    before = page.read_text(encoding="utf-8")
    lines = before.splitlines()
    if lines.count(first) != 1 or lines.count(last) != 1 or lines.index(first) > lines.index(last):
        raise ValueError(f"expected one block from {first!r} to {last!r} in {page}, got another number: add the lines")
    # Blank lines, because a comment right above or below a table would be taken for a part of it.
    found = [*lines[: lines.index(first) + 1], "", *text.strip().splitlines(), "", *lines[lines.index(last) :]]
    write_text(page, "\n".join(found) + "\n")


def publish(blocks: Mapping[str, str], *, write: bool) -> None:
    """Print blocks, and with ``write`` put each into the page that has it.

    Raises:
        ValueError: not exactly one page has it; no page is changed then.
    """
    for name, text in blocks.items():
        print(f"\n<!-- table: {name} -->\n\n{text.strip()}\n\n<!-- end: {name} -->")
    if not write:
        return
    places = {name: [page for page in pages() if name in block_names(page.read_text("utf-8"))] for name in blocks}
    if wrong := {name: len(found) for name, found in places.items() if len(found) != 1}:
        raise ValueError(f"expected one page for each block, got {wrong}")
    for name, (page,) in places.items():
        write_block(page, name, blocks[name])
        print(f"{name}: {page.relative_to(ROOT)}", file=sys.stderr)


def publish_metrics(bundle: str, values: Mapping[str, float], *, write: bool) -> None:
    """Print numbers of a bundle's ``eval_metrics``, and with ``write`` replace them in its ``metadata.json``.

    Raises:
        ValueError: the file does not have exactly one number of that name.
    """
    path = BUNDLES / bundle / "configs" / "metadata.json"
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        print(f"{bundle} metadata.json: {name} {value:.3f}")
        text, count = re.subn(rf'("{re.escape(name)}": )[\d.]+', rf"\g<1>{value:.3f}", text)
        if count != 1:
            raise ValueError(f"expected one {name} in {path}, got {count}")
    if write:
        write_text(path, text)
