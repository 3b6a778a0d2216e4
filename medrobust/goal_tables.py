"""What a report says of targeted attacks, read from the records of :mod:`medrobust.targeted`."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from medrobust.budgets import budget
from medrobust.records import CLEAN, Record
from medrobust.statistics import has_reference

METRICS = ("goal", "reached", "reached_before", "dice_to_target", "dice_to_target_before")
_WISH = re.compile(r""" toward ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"): """)
"""A goal in words as Python writes a text: in double quotes where a structure's name has an apostrophe."""


def is_targeted(attack: str) -> bool:
    """Whether the text of an attack in records has a goal."""
    return bool(_WISH.search(attack))


def goals_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What a report says of each goal: its words, how far it was reached, and each structure before and after."""
    clean = [record for record in records if record.condition == CLEAN]
    # Volumes of an earlier run that are evaluated again have no such rows: what the attacker wanted is not known there.
    asked = dict.fromkeys(_key(record) for record in records if record.metric == "goal")
    return [_goal(*key, [record for record in records if _key(record) == key], clean) for key in asked]


def _key(record: Record) -> tuple[str, str, str]:
    return record.condition, record.protocol, record.attack


def _goal(
    condition: str, protocol: str, attack: str, rows: Sequence[Record], clean: Sequence[Record]
) -> dict[str, Any]:
    asked = [row for row in rows if row.metric == "goal"]
    cases = {row.case for row in asked if row.value}

    def mean(of: Sequence[Record], metric: str, structure: str, form: str) -> str:
        found = [r for r in of if (r.metric, r.class_name) == (metric, structure) and r.case in cases]
        values = [r.value for r in found if metric != "missed_rate" or has_reference(r)]  # else nothing is to be missed
        return format(float(np.mean(values)), form) if values else "–"

    structures = [
        {
            "name": name,
            "target": [mean(rows, f"dice_to_target{when}", name, ".3f") for when in ("_before", "")],
            **{
                key: [mean(of, metric, name, form) for of in (clean, rows)]
                for key, metric, form in (
                    ("dice", "dice", ".3f"),
                    ("missed", "missed_rate", ".0%"),
                    ("volume", "volume_error", "+.1%"),
                    ("nsd", "nsd", ".3f"),
                    ("hd95", "hd95", ".1f"),
                )
            },
        }
        for name in dict.fromkeys(row.class_name for row in asked)
    ]
    return {
        "condition": condition,
        "protocol": protocol,
        "wish": _wish(attack),
        "budget": budget([attack]),
        "cases": len(cases),
        "reached": [mean(rows, f"reached{when}", "", ".1%") for when in ("_before", "")],
        "structures": structures,
        "impossible": [
            {"case": case, "why": why}
            for case, why in dict.fromkeys(
                (row.case, row.status.removeprefix("impossible: ")) for row in asked if not row.value
            )
        ],
    }


def _wish(attack: str) -> str:
    found = _WISH.search(attack)
    return str(ast.literal_eval(found[1])) if found else ""
