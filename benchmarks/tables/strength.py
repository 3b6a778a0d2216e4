"""docs/attacks.md and docs/strength.md: step rules, other defaults, transfer, the standard ensemble, other packages."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from common import arguments, markdown, publish, sentence, three

sys.path.append(str(Path(__file__).resolve().parents[1]))

DEFAULT = "cosine from 2 eps"
DEFAULT_OF_VAFA = "cosine from eps"
BLOCKS = (
    "strength.rules",
    "strength.pgd",
    "strength.settings",
    "strength.transfer",
    "strength.standard",
    "strength.peers",
)


def main() -> None:
    asked = arguments(__doc__, measured="measure nothing: what is there already")
    rules, settings, transfer, standard, strength_peers, subjects, cells = map(
        of_benchmarks, ("rules", "settings", "transfer", "standard", "strength_peers", "subjects", "cells")
    )
    names = [name for name in subjects.names() if name.startswith("toy")] if asked.quick else subjects.names()
    wait = not (asked.quick or asked.measured)  # the cells that are there already are enough to see that it works
    rules.table(cells.Cells("rules", wait=wait), names)
    found = rules.table(cells.Cells("rules", wait=False), names, everything=True)
    blocks = {
        BLOCKS[0]: regrets(found, tuple(rules.RULES), rules.ATTACKS),
        BLOCKS[1]: pgd(found, tuple(rules.RULES), names),
        BLOCKS[2]: others(settings.measure(cells.Cells("settings", wait=wait), names), names),
        BLOCKS[3]: shown(transfer.measure(cells.Cells("transfer", wait=wait), names), transfer.DECAYS),
        BLOCKS[4]: standard.text(standard.measure(cells.Cells("standard", wait=wait), names)),
        BLOCKS[5]: printed(partial(strength_peers.tables, cells.Cells("peers", wait=wait), names)),
    }
    publish(blocks, write=asked.write)


def of_benchmarks(name: str) -> Any:
    """A module of the folder above, on one thread: its numbers are one core's."""
    torch.set_num_threads(1)
    return import_module(name)


def regrets(found: Mapping[tuple[str, str, str, int, str], float], rules: Sequence[str], attacks: Sequence[str]) -> str:
    """How far each rule is behind the best one: the worst cell and the mean, by attack."""
    cells: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for (name, attack, norm, steps, rule), value in found.items():
        cells.setdefault((name, attack, norm, steps), {})[rule] = value
    # A cell that lacks a rule of all attacks is not measured to the end.
    whole = {key: by_rule for key, by_rule in cells.items() if len(by_rule) >= len(rules) - 2}
    behind: dict[tuple[str, str], list[float]] = {}
    for (_, attack, _, _), by_rule in whole.items():
        for rule, value in by_rule.items():
            for column in (attack, ""):
                behind.setdefault((rule, column), []).append(value - min(by_rule.values()))

    def cell(rule: str, column: str) -> str:
        values = behind.get((rule, column))
        return f"{max(values):.3f} ({sum(values) / len(values):.3f})" if values else ""

    rows = [[rule, *(cell(rule, attack) for attack in attacks), cell(rule, "")] for rule in rules]
    head = ("first step, schedule", *attacks, "all")
    grid = {steps: sum(key[3] == steps for key in whole) for steps in sorted({key[3] for key in whole})}
    counts = ", ".join(f"{count} with {steps} steps" for steps, count in grid.items())
    note = (
        "Dice that a rule leaves above the best rule of the same cell: the largest over all cells, in brackets the "
        f"mean. {len(whole)} cells of a network, an attack, a norm and a number of steps: {counts}. Rules without a "
        "word on shrinking are constant. Of SA2, eps is rho, and of VAFA q_max / 2. Two rules were tried with one "
        "attack only."
    )
    chosen = {attack: DEFAULT_OF_VAFA if attack == "VAFA" else DEFAULT for attack in attacks}
    far = sorted(
        ((by_rule[chosen[key[1]]] - min(by_rule.values()), key) for key, by_rule in whole.items()), reverse=True
    )
    above = [(gap, key) for gap, key in far if gap > 0.01]
    where = "; ".join(
        f"{attack} {norm}, {steps} steps, {name}: {gap:.3f}" for gap, (name, attack, norm, steps) in above
    )
    note += (
        f" The default, {DEFAULT} and for VAFA {DEFAULT_OF_VAFA}, is more than 0.01 behind in {len(above)} of "
        f"{len(far)} cells"
    )
    note += f" ({where})." if above else "."
    return f"{markdown(head, rows)}\n\n{sentence(note)}"


def pgd(found: Mapping[tuple[str, str, str, int, str], float], rules: Sequence[str], names: Sequence[str]) -> str:
    """Mean Dice under PGD, by steps and network."""

    def rows(steps: int) -> Iterable[list[str]]:
        for rule in rules:
            values = [found.get((name, "PGD", "linf", steps, rule)) for name in names]
            if any(value is not None for value in values):
                yield [rule, str(steps), *("" if value is None else three(value) for value in values)]

    head = ("PGD, Linf", "steps", *names)
    return markdown(head, [row for steps in (10, 20, 40, 100) for row in rows(steps)])


def others(found: Mapping[tuple[str, str], Mapping[str, float]], names: Sequence[str]) -> str:
    """A row a setting, its default first; networks where one is not measured are left out."""
    names = [name for name in names if found and all(name in by_name for by_name in found.values())]
    rows = [
        [attack, differs, *(three(by_name[name]) for name in names)] for (attack, differs), by_name in found.items()
    ]
    return markdown(("attack", "setting", *names), rows)


def shown(found: Mapping[tuple[str, str, int, float], float], decays: Sequence[float]) -> str:
    """A row a pair of networks and a number of steps, a column a decay."""
    rows = [
        [source, target, str(steps), *(three(found[source, target, steps, decay]) for decay in decays)]
        for source, target, steps in sorted({key[:3] for key in found})
        if all((source, target, steps, decay) in found for decay in decays)
    ]
    return markdown(("made on", "shown to", "steps", *(f"decay {decay:g}" for decay in decays)), rows)


def printed(what: Callable[[], None]) -> str:
    """What a function prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        what()
    return text.getvalue()


if __name__ == "__main__":
    main()
