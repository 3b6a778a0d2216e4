"""Attacks made on one network and shown to another, as a table: a line a target, a column a network made on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from medrobust.records import CLEAN, Record
from medrobust.statistics import per_case

ITSELF = "the target itself"
_MADE = re.compile(r" made on (.*?) \(")


def is_made_elsewhere(attack: str) -> bool:
    """Whether the text of an attack in records says that it was made on another network."""
    return bool(_MADE.search(attack))


def matrices(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One matrix of mean Dice for each attack that was made on other networks too; all models of the records.

    The column of the target itself is the white-box attack: an entry below it says that this attack was too weak.
    """
    dice: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        if record.metric != "dice" or record.protocol == "tiles":
            continue
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
            values = [_mean(cells.get((model, on), [])) for on in columns]
            best = values[0]
            lines.append(
                {
                    "model": model,
                    "clean": _text(_mean(clean.get((model, ITSELF), []))),
                    "cells": [
                        {"dice": _text(value), "worse": value is not None and best is not None and value < best - 1e-9}
                        for value in values
                    ],
                }
            )
        found.append({"attack": name, "columns": columns, "lines": lines})
    return found


def _mean(rows: Sequence[Record]) -> float | None:
    values = per_case(rows)
    return float(np.mean(list(values.values()))) if values else None


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
