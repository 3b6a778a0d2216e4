"""Attacks made on one network and shown to another, as a table: a line a target, a column a network made on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from medrobust.ensembles import filled
from medrobust.records import CLEAN, Record
from medrobust.statistics import per_case

ITSELF = "the target itself"
_MADE = re.compile(r" made on (.*?) \(")


def is_made_elsewhere(attack: str) -> bool:
    """Whether the text of an attack in records says that it was made on another network."""
    return bool(_MADE.search(attack))


def matrices(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One matrix of mean Dice for each attack that was made on other networks too; all models of the records.

    The column of the target itself is the white-box attack: an entry below it says that this attack was too weak. All
    numbers of a line are means over the same cases, those that have every one of them. A case that the attack on the
    target skipped, since another member of its ensemble had broken it, counts as broken.
    """
    dice: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in _whole(records):
        made = _MADE.search(record.attack)
        on = made[1] if made else ITSELF
        name = record.condition.removesuffix(f" from {on}") if made else record.condition
        dice.setdefault(name, {}).setdefault((record.model, on), []).append(record)
    clean = dice.pop(CLEAN, {})
    found = []
    for name, cells in dice.items():
        columns = list(dict.fromkeys(on for _, on in cells))
        if columns == [ITSELF]:
            continue
        columns = [ITSELF, *(on for on in columns if on != ITSELF)]
        lines = []
        for model in dict.fromkeys(model for model, _ in cells):
            rows = [clean.get((model, ITSELF), []), *(cells.get((model, on), []) for on in columns)]
            first, best, *others = _means([per_case(of_cell) for of_cell in rows])
            lines.append(
                {
                    "model": model,
                    "clean": _text(first),
                    "cells": [
                        {"dice": _text(value), "worse": value is not None and best is not None and value < best - 1e-9}
                        for value in (best, *others)
                    ],
                }
            )
        found.append({"attack": name, "columns": columns, "lines": lines})
    return found


def _whole(records: Sequence[Record]) -> list[Record]:
    """Dice of whole volumes, which is how attacks are made elsewhere, without the holes of ensembles."""
    return [
        record
        for model in dict.fromkeys(record.model for record in records)
        for record in filled(record for record in records if record.model == model)
        if record.metric == "dice" and record.protocol in ("", "whole volume")
    ]


def _means(cells: Sequence[Mapping[str, float]]) -> list[float | None]:
    """The mean of each cell over the cases that all of them have; ``None`` for cells without any."""
    known = [cell.keys() for cell in cells if cell]
    cases = [case for case in known[0] if all(case in other for other in known)] if known else []
    return [math.fsum(cell[case] for case in cases) / len(cases) if cell and cases else None for cell in cells]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
