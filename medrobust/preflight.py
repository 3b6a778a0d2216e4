"""Before a long run: how long it will take, measured on its first case, and after it: whether it can be believed.

The soundness checklist (:mod:`medrobust.soundness`) asks about one attack of a run on its first readable case. What it
found, or why it was not run, is written to ``soundness.json`` beside the records, so that a report needs no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from medrobust.attacks.base import Attack
from medrobust.attacks.standard import Standard
from medrobust.evaluation import WHOLE, Condition
from medrobust.findings import FILE, Checked, read, write
from medrobust.run import Run, case_names, reason
from medrobust.sea import PRESETS, gradient_seconds, gradients
from medrobust.soundness import QUERIES, QUICK_QUERIES, checklist

MODES = ("auto", "quick", "full", "off")
AFFORDABLE = 600.0
"""Seconds that the checklist may take without being asked for: ten minutes."""
LONG = 50
"""Gradients a case from which an attack's time is told beforehand."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The first case of a run that can be read, as attacks see it."""

    case: str
    model: nn.Module
    image: Tensor
    label: Tensor
    region: Tensor | None = None


def first_case(run: Run, cases: Sequence[Mapping[str, Any]]) -> Opened | None:
    """The first case that can be read; ``None`` where none can (the run itself will say why)."""
    for name, paths in zip(case_names(cases), cases, strict=True):
        try:
            data = run.preprocessing(dict(paths))
            inputs = run.inputs(data, paths)
            model, image, label, region = run.evaluation.ready(name, data["image"], data.get("label"), inputs)
        except Exception:  # the run notes it as that case's failure
            continue
        return Opened(case=name, model=model, image=image, label=label, region=region)
    return None


def work(condition: Condition) -> int:
    """About how many gradients a condition takes of a case; a query without a gradient counts a third."""
    attack = condition.attack
    if not isinstance(attack, Attack) or condition.match or condition.stored or attack.blind:
        return 0
    once = sum(max(gradients([one]), int(getattr(one, "queries", 0)) // 3) for one in _members(attack))
    minimum = condition.minimum
    return once * (minimum.rounds + 1) + minimum.gradients_of_walk if minimum else once


def is_long(conditions: Iterable[Condition]) -> bool:
    """Whether the time of these conditions is worth telling before they begin."""
    return any(count >= LONG for count in _groups(conditions).values())


def estimates(conditions: Iterable[Condition], one: float, cases: int) -> list[str]:
    """A line for each attack or ensemble that takes long: ``SEA: about 12 min a case, 2 cases: 24 min``.

    Args:
        one: seconds of one gradient.
        cases: how many.
    """
    return [
        f"{name}: about {duration(count * one)} a case, {cases} {'case' if cases == 1 else 'cases'}: "
        f"{duration(count * one * cases)}"
        for name, count in _groups(conditions).items()
        if count >= LONG
    ]


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def strongest(conditions: Iterable[Condition]) -> Condition | None:
    """Whom the checklist asks about: of the untargeted attacks in a norm ball that take at least two steps through the
    whole volume, the one with most gradients; of equals the one with the largest eps. Of the standard ensemble, the
    first member.
    """
    found = [
        condition
        for condition in map(_first_member, conditions)
        if isinstance(condition.attack, Attack)
        and condition.protocol == WHOLE
        and not (condition.attack.targeted or condition.surrogate or condition.minimum or condition.stored)
        and getattr(condition.attack, "norm", "") in ("linf", "l2")
        and isinstance(getattr(condition.attack, "eps", None), float | int)
        and getattr(condition.attack, "steps", 0) > 1
    ]
    return max(found, key=lambda c: (work(c), c.attack.eps), default=None)  # type: ignore[union-attr]


def cost(condition: Condition, *, quick: bool) -> int:
    """About how many gradients the checklist takes: thirteen or fifteen runs of the attack, and queries."""
    return work(condition) * (13 if quick else 15) + (QUICK_QUERIES if quick else QUERIES) // 3 + 20


def plan(condition: Condition | None, mode: str, one: float | None) -> tuple[str, str]:
    """How the checklist will be run, ``quick`` or ``full``, or "" and why it will not.

    ``auto`` is ``quick`` where that takes at most ``AFFORDABLE`` seconds.

    Args:
        one: seconds of one gradient; ``None``: no case could be read.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"expected --soundness among {', '.join(MODES)}, got {mode!r}")
    if mode == "off":
        return "", "it was switched off"
    if condition is None:
        return "", "no attack of this run takes steps in a norm ball through the whole volume"
    if one is None:
        return "", "no case could be read"
    seconds = one * cost(condition, quick=mode != "full")
    if mode == "auto" and seconds > AFFORDABLE:
        limit = duration(AFFORDABLE)
        return "", f"it would take about {duration(seconds)}, more than {limit}: ask for it with --soundness quick"
    return ("full" if mode == "full" else "quick"), ""


def check(run: Run, condition: Condition | None, opened: Opened | None, mode: str, why_not: str) -> Checked:
    """Run the checklist as planned and write ``soundness.json``; one that is there for the same attack stands."""
    path = run.folder / FILE
    before = read(path)
    model = run.evaluation.model
    if not mode or condition is None or opened is None:
        if before is not None and before.findings and before.model == model:
            return before
        found = Checked(model=model, why_not=why_not)
    else:
        asked = Checked(model=model, case=opened.case, condition=condition.name, attack=condition.text, mode=mode)
        if before is not None and _without_findings(before) == asked and before.findings:
            return before
        attack: Any = condition.attack
        try:
            findings = checklist(
                opened.model, opened.image, opened.label, attack=attack, region=opened.region, quick=mode == "quick"
            )
            found = Checked(**{**_fields(asked), "findings": tuple(findings)})
        except Exception as error:  # the records are there, and their report must not be lost
            found = Checked(model=model, why_not=f"it failed: {reason(error)}")
    write(found, path)
    return found


def one_gradient(conditions: Iterable[Condition], opened: Opened) -> float:
    """Seconds of one gradient of the first attack that takes any."""
    attack = next((c.attack for c in conditions if isinstance(c.attack, Attack) and not c.attack.blind), None)
    return gradient_seconds(attack, opened.model, opened.image, opened.label) if attack is not None else 0.0


def _members(attack: Attack) -> tuple[Attack, ...]:
    return attack.members if isinstance(attack, Standard) else (attack,)


def _first_member(condition: Condition) -> Condition:
    if not isinstance(condition.attack, Standard):
        return condition
    return replace(condition, name=f"{condition.name}, first member", attack=condition.attack.members[0])


def _fields(checked: Checked) -> dict[str, Any]:
    return {name: getattr(checked, name) for name in ("model", "case", "condition", "attack", "mode", "why_not")}


def _without_findings(checked: Checked) -> Checked:
    return Checked(**_fields(checked))


def _groups(conditions: Iterable[Condition]) -> dict[str, int]:
    found: dict[str, int] = {}
    for condition in conditions:
        preset = condition.name.partition(" ")[0]
        name = preset if preset.lower() in PRESETS else condition.name
        found[name] = found.get(name, 0) + work(condition)
    return found
