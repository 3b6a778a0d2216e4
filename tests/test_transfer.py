"""Attacks made on other networks are compared with the attack on the target over the same cases."""

from __future__ import annotations

from medrobust.attacks import PGD
from medrobust.records import Record
from medrobust.sea import members
from medrobust.transfer import matrices

FIRST, SECOND = members(eps=8 / 255, budget="fast").items()
MADE = " made on swin (SwinUNETR sha256:1)"


def rows(condition: str, attack: str, dice: dict[str, float], protocol: str = "whole volume") -> list[Record]:
    shared = {"condition": condition, "metric": "dice", "class_name": "liver", "attack": attack, "protocol": protocol}
    return [Record(case=case, value=value, model="m", **shared) for case, value in dice.items()]


CLEAN = rows("clean", "", dict.fromkeys("abcd", 0.9), "")


def test_a_case_that_the_attack_itself_skipped_was_broken() -> None:
    """The first member broke a, b and c; the second, made elsewhere, gets 0.2 there: that is not more."""
    records = [
        *CLEAN,
        *rows(FIRST[0], repr(FIRST[1]), {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.6}),
        *rows(SECOND[0], repr(SECOND[1]), {"d": 0.5}),
        *rows(f"{SECOND[0]} from swin", repr(SECOND[1]) + MADE, {"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.6}),
    ]
    (found,) = matrices(records)
    assert found["columns"] == ["the target itself", "swin"]
    assert found["lines"] == [
        {
            "model": "m",
            "clean": "0.900",
            "cells": [{"dice": "0.125", "worse": False}, {"dice": "0.300", "worse": False}],
        }
    ]


def test_a_line_is_over_the_cases_that_all_its_numbers_have() -> None:
    """The attack itself failed on the cases that are easy to break."""
    records = [
        *CLEAN,
        *rows("PGD", repr(PGD()), {"c": 0.5, "d": 0.7}),
        *rows("PGD from swin", repr(PGD()) + MADE, {"a": 0.1, "b": 0.1, "c": 0.6, "d": 0.8}),
        # An image attacked under all prompts at once is another attack.
        *rows("PGD", repr(PGD()), {"c": 0.0, "d": 0.0}, "all prompts"),
    ]
    (line,) = matrices(records)[0]["lines"]
    assert line["cells"] == [{"dice": "0.600", "worse": False}, {"dice": "0.700", "worse": False}]
    weaker = [*records, *rows("PGD from mine", repr(PGD()) + MADE.replace("swin", "mine"), {"c": 0.4, "d": 0.7})]
    (line,) = matrices(weaker)[0]["lines"]
    assert [cell["worse"] for cell in line["cells"]] == [False, False, True]


def test_a_cell_without_records_is_a_dash() -> None:
    records = [*CLEAN, *rows("PGD from swin", repr(PGD()) + MADE, {"a": 0.4})]
    (line,) = matrices(records)[0]["lines"]
    assert [cell["dice"] for cell in line["cells"]] == ["–", "0.400"]
    assert line["clean"] == "0.900"
