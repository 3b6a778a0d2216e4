"""What the soundness checklist found, in words, and the file that keeps it: a report needs no network for it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medrobust.atomic import write_text

FILE = "soundness.json"

MEANING = {
    "clean": "There is no segmentation to break: check preprocessing, class order and orientation first.",
    "gradient": "The gradient says nothing, so gradient attacks fail for no merit of the model: look for rounding, "
    "detach, no_grad, or probabilities that round to 0 and 1, and attack through a differentiable stand-in.",
    "repeat": "The model answers differently each time: attack the mean over many answers, or switch the chance off.",
    "slope": "The model does not do what its gradient says: look for rounding, straight-through or detached parts, and "
    "attack without gradients as well.",
    "steps": "The attack does not work as a search: look at step size, number of steps and what it returns.",
    "equal gradients": "Another step rule or objective finds more for the same price: leave step_size, schedule and "
    "objective to their defaults, or report APGD.",
    "budget": "More room must give more harm, and enough room all of it: use more steps, restarts, another objective.",
    "black box": "Who sees no gradient must not do better than who does: the gradient is masked or the attack weak.",
    "transfer": "Images made for another model must not do better than the attack itself: the gradient is masked or "
    "the attack weak.",
    "restarts": "Chance decides the result: use more steps, and report the worst of several restarts.",
    "noise": "The attack adds nothing to noise of its budget: what was measured is robustness to noise.",
    "batch": "A case depends on its neighbours: put the network into evaluation mode, pass it as a module, or attack "
    "cases one by one.",
    "stored": "The stored image is not the attack that was measured: compute in float32 and keep to [0, 1].",
}
"""What a failed check means and what to do, by its name."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name, a key of ``MEANING``.
        ok: nothing suspicious.
        text: what was measured, in words.
        value: the number that was compared, of the worst case of the batch.
    """

    check: str
    ok: bool
    text: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checklist found, or why it was not run.

    Attributes:
        model: whose records these are, as in the records.
        case: on which it was run.
        condition, attack: what it asked about, by name and in full.
        mode: ``quick`` or ``full``; empty where it was not run.
        why_not: empty where it was run.
    """

    model: str
    case: str = ""
    condition: str = ""
    attack: str = ""
    mode: str = ""
    why_not: str = ""
    findings: tuple[Finding, ...] = ()


def warnings(findings: Sequence[Finding]) -> list[str]:
    """One line for each failed check: what was measured, what it means, what to do."""
    return [f"{finding.check}: {finding.text}. {MEANING[finding.check]}" for finding in findings if not finding.ok]


def write(checked: Checked, path: Path) -> None:
    """As JSON; a number that is not finite is written as null."""
    text = asdict(checked)
    for finding in text["findings"]:
        finding["value"] = finding["value"] if math.isfinite(finding["value"]) else None
    write_text(path, json.dumps(text, indent=2) + "\n")


def read(path: Path) -> Checked | None:
    """What was written; ``None`` where there is no such file.

    Raises:
        ValueError: it is something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        findings = [
            Finding(**{**item, "value": math.nan if item["value"] is None else item["value"]})
            for item in found.pop("findings")
        ]
        if unknown := {finding.check for finding in findings} - MEANING.keys():
            raise ValueError(f"unknown checks {', '.join(sorted(unknown))}")
        return Checked(**found, findings=tuple(findings))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"expected findings of medrobust in {path}, got something else: {error}") from error
