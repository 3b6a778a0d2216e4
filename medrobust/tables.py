"""What a report says: records turned into the lines and cells of its tables, written out as text."""

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medrobust import breaking, goal_tables, transfer
from medrobust.budgets import budget
from medrobust.contest import Rival, structures, verdict, worst_of_all
from medrobust.decline import Point, decline
from medrobust.ensembles import COUNTS, Ensemble, Key, ensemble_of, ensembles_of_models, filled
from medrobust.labels import told_apart
from medrobust.pooled import Bounded
from medrobust.records import CLEAN, Record, csv_text
from medrobust.statistics import (
    Interval,
    has_reference,
    is_foreground,
    is_missed,
    mean_interval,
    paired_drop,
    per_case,
)

HEADS = {
    "dice": "Dice",
    "hd95": "HD95, mm",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "linf": "L∞",
    "flip_rate": "Flipped",
    "iou": "IoU",
    "l2": "L2",
    "lpips": "LPIPS",
    "missed_rate": "Missed lesions",
    "volume_error": "Volume error, magnitude",
    "nsd": "NSD",
    "dice_as_published": "Dice, as published",
    "hd95_as_published": "HD95 in voxels, as published",
}
HEADLINE = tuple(HEADS)[:6]
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The rows of one line of the tables."""

    condition: str
    protocol: str
    control: bool
    rows: Sequence[Record]

    def of(self, metric: str) -> list[Record]:
        return [row for row in self.rows if row.metric == metric]

    def values(self, metric: str) -> dict[str, float]:
        rows = self.of(metric)
        if metric == "volume_error":  # too large and too small must not cancel
            rows = [replace(row, value=abs(row.value)) for row in rows]
        if metric == "missed_rate":  # what the reference lacks has nothing to miss
            rows = [row for row in rows if has_reference(row)]
        return per_case(rows)

    @property
    def attacks(self) -> list[str]:
        return _unique(row.attack for row in self.rows)

    @property
    def budget(self) -> str:
        return budget(self.attacks)

    @property
    def targeted(self) -> bool:
        return any(goal_tables.is_targeted(attack) for attack in self.attacks)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two lines must share to be compared: the attacks to the last setting, and the cases."""
        return self.condition, self.protocol, tuple(self.attacks), tuple(sorted({row.case for row in self.rows}))

    @property
    def ensemble(self) -> Key | None:
        return ensemble_of(self.condition, self.rows[0].attack, self.protocol)


def contents(
    records: list[Record], title: str, notes: Sequence[str], controls: Collection[str] | None
) -> dict[str, Any]:
    """All that the templates show, as text. Raises ValueError for no records."""
    if not records:
        raise ValueError("expected at least one record, got none; evaluate a case first")
    parts = _of_models(records)
    teams = ensembles_of_models(parts)
    models = [_model(own[0].model, own, found, controls) for own, found in zip(parts, teams, strict=True)]
    return {
        "title": title,
        "models": models,
        "comparison": _comparison(models),
        "notes": [*notes, *_notes(records, [team for found in teams for team in found])],
        "provenance": {
            "Cases": str(len(_unique(record.case for record in records))),
            "Model": "; ".join(filter(None, _unique(record.model for record in records))) or "not recorded",
            "Seeds": ", ".join(_unique(str(r.seed) for r in records if r.seed is not None)) or "not recorded",
            "Versions": " / ".join(filter(None, _unique(record.versions for record in records))) or "not recorded",
            "Records": f"{len(records)} rows, sha256 {hashlib.sha256(csv_text(records).encode()).hexdigest()}",
        },
        "attacks": _attacks(records),
    }


def _comparison(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean Dice of several models under the very same attacks on the very same cases; nothing for a single model."""
    if len(models) < 2:
        return []
    lines = [{line["key"]: line for line in model["lines"]} for model in models]
    return [
        {**line, "cells": [one[key]["dice"] for one in lines]}
        for key, line in lines[0].items()
        if all(key in one for one in lines) and "saved " not in str(key)
    ]


def _model(
    name: str, records: list[Record], teams: Sequence[Ensemble], controls: Collection[str] | None
) -> dict[str, Any]:
    groups = _groups([record for record in records if record.metric not in breaking.METRICS], controls)
    without_holes = _attacked(_groups(filled(records), controls))
    clean = next((group for group in groups if group.condition == CLEAN), None)
    baseline = clean.values("dice") if clean else {}
    attacked = _attacked(groups)
    lines = [_line(group, baseline) for group in groups]
    lines += [_team(team, baseline) for team in teams]
    rivals = _rivals(attacked, teams)
    if rivals and (teams or len(attacked) > 1) and (worst := _worst(rivals, baseline)):
        lines.append(worst)
    labels = _labels(groups)
    classes = _unique(row.class_name for row in records if row.metric == "dice" and is_foreground(row))
    other = [
        metric
        for metric in _unique(row.metric for row in records)
        if metric not in (*HEADLINE, *COUNTS, *goal_tables.METRICS, *breaking.METRICS)
    ]
    return {
        "name": name,
        "verdict": verdict(baseline, rivals),
        "lines": lines,
        "columns": [metric for metric in HEADLINE if any(row.metric == metric for row in records)],
        "labels": labels,
        "organs": [{"name": organ, "cells": [_cell(group, organ) for group in groups]} for organ in classes],
        "means": {
            label: {organ: value for organ in classes if (value := _organ(group, organ)) is not None}
            for label, group in zip(labels, groups, strict=True)
        },
        "protocols": _protocols(without_holes),
        "decline": _decline(
            [r for r in records if not (goal_tables.is_targeted(r.attack) or transfer.is_made_elsewhere(r.attack))]
        ),
        "ensembles": [_details(team) for team in teams],
        "clean_dice": float(np.mean(list(baseline.values()))) if baseline else 0.0,
        "other": other,
        "others": [
            {"label": label, "cells": [_number(group.values(metric), ".4g") for metric in other]}
            for label, group in zip(labels, groups, strict=True)
            if any(group.of(metric) for metric in other)
        ],
    }


def _groups(records: list[Record], controls: Collection[str] | None) -> list[_Group]:
    """Clean first, then conditions in the order they appear; one line for each protocol and each budget."""
    together: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        together.setdefault((record.condition, record.protocol), []).append(record)
    found = []
    for (condition, protocol), rows in together.items():
        # Noise matched to each case has another eps in each, and is one line. Two budgets on one case are two lines.
        attacks = _unique(row.attack for row in rows)
        split = len({(row.case, row.attack) for row in rows}) > len({row.case for row in rows})
        for part in [[row for row in rows if row.attack == attack] for attack in attacks] if split else [rows]:
            control = _is_control(part[0].attack) if controls is None else condition in controls
            found.append(_Group(condition=condition, protocol=protocol, control=control, rows=part))
    return sorted(found, key=lambda group: group.condition != CLEAN)


def _attacked(groups: Iterable[_Group]) -> list[_Group]:
    return [group for group in groups if not (group.condition == CLEAN or group.control or group.targeted)]


def _is_control(attack: str) -> bool:
    return bool(re.match(r"(saved )?(\w*Noise|Prompt)\(", attack) or re.search(r"\bsteps=0\b", attack))


def _labels(groups: Sequence[_Group]) -> list[str]:
    """Short names for columns, unique: protocol and budget appear where they tell two of one name apart."""
    return told_apart(
        [group.condition for group in groups],
        [group.protocol for group in groups],
        [group.budget for group in groups],
    )


def _line(group: _Group, baseline: Mapping[str, float]) -> dict[str, Any]:
    dice = group.values("dice")
    linf = group.values("linf")
    shared = [case for case in dice if case in baseline]
    missed, present = structures(group.of("dice"))
    return {
        "key": group.key,
        "condition": group.condition,
        "protocol": group.protocol,
        "budget": group.budget,
        "control": group.control,
        "clean": group.condition == CLEAN,
        "cases": len(_unique(row.case for row in group.rows)),
        "dice": _interval(dice),
        "drop": _drop(baseline, dice) if shared and group.condition != CLEAN else None,
        "hd95": _number(group.values("hd95"), ".1f"),
        "missed": f"{missed} of {present}" if present else "–",
        "ssim": _number(group.values("ssim"), ".4f"),
        "psnr": _number(group.values("psnr"), ".1f"),
        "linf": f"{max(linf.values()) * 255:.3g}/255" if linf else "–",
        "flip_rate": _number(group.values("flip_rate"), ".2%"),
    }


def _rivals(attacked: Sequence[_Group], teams: Sequence[Ensemble]) -> list[Rival]:
    """Every attack, and for the members of an ensemble the ensemble."""
    found: dict[Key | int, Rival] = {}
    by_key = {team.key: team for team in teams}
    for number, group in enumerate(attacked):
        team = by_key.get(group.ensemble) if group.ensemble else None
        found[team.key if team else number] = Rival(
            key=_team_key(team) if team else group.key,
            name=_team_name(team) if team else ", ".join(filter(None, (group.condition, group.protocol, group.budget))),
            dice=team.dice if team else group.values("dice"),
            hd95=team.hd95 if team else group.values("hd95"),
            rows=team.rows if team else group.of("dice"),
        )
    return list(found.values())


def _worst(rivals: Sequence[Rival], baseline: Mapping[str, float]) -> dict[str, Any] | None:
    """The line of an attacker who picks the best attack for every case, each metric by itself."""
    dice, hd95 = worst_of_all(rivals)
    if not dice:
        return None
    return {
        "key": ("worst", *sorted((rival.key for rival in rivals), key=str)),
        "condition": "worst of all, case by case",
        "protocol": "",
        "budget": "",
        "control": False,
        "clean": False,
        "cases": len(dice),
        "dice": _interval(dice),
        "drop": _drop(baseline, dice) if any(case in baseline for case in dice) else None,
        "hd95": _number(hd95, ".1f"),
        **dict.fromkeys(("missed", "ssim", "psnr", "linf", "flip_rate"), "–"),
    }


def _team(team: Ensemble, baseline: Mapping[str, float]) -> dict[str, Any]:
    """The line of an ensemble: its worst member case by case, the clean image among them."""
    return {
        "key": _team_key(team),
        "condition": _team_name(team),
        "protocol": "",
        "budget": "",
        "control": False,
        "clean": False,
        "cases": len(team.dice),
        "dice": _interval(team.dice),
        "drop": _drop(baseline, team.dice) if any(case in baseline for case in team.dice) else None,
        "hd95": _number(team.hd95, ".1f"),
        **dict.fromkeys(("missed", "ssim", "psnr", "linf", "flip_rate"), "–"),
    }


def _team_key(team: Ensemble) -> tuple[Any, ...]:
    # Sorted: the worst of several attacks does not depend on which comes first.
    return "ensemble", team.name, *(tuple(sorted(each)) for each in (team.members, team.attacks, team.dice))


def _team_name(team: Ensemble) -> str:
    count = len(team.members) - 1
    return f"{team.name}: worst {f'of {count}' if count > 1 else 'member'}, case by case"


def _details(team: Ensemble) -> dict[str, str]:
    """What else an ensemble says: who was the worst how often, and the worst over pooled voxels."""

    def bounded(found: Bounded | None) -> str:
        return "–" if found is None else f"{found.value:.4f} (at least {found.lower_bound:.4f})"

    return {
        "name": team.name,
        "by": ", ".join(f"{member} {count}" for member, count in team.by.items() if count),
        "dice": bounded(team.pooled_dice),
        "miou": bounded(team.miou),
    }


def _organ(group: _Group, organ: str) -> float | None:
    values = per_case(row for row in group.of("dice") if row.class_name == organ)
    return math.fsum(values.values()) / len(values) if values else None


def _cell(group: _Group, organ: str) -> dict[str, Any]:
    value = _organ(group, organ)
    rows = [row for row in group.of("dice") if row.class_name == organ]
    words = {
        "both empty": len({row.case for row in rows if row.status == "both empty"}),
        "missed": len({row.case for row in rows if is_missed(row)}),
        "invented": len({row.case for row in rows if row.status == "invented"}),
    }
    return {
        "text": "–" if value is None else f"{value:.3f}",
        "shade": "" if value is None else _shade(value),
        "note": ", ".join(f"{count} {word}" for word, count in words.items() if count),
    }


def _shade(dice: float) -> str:
    """Paper at Dice 1, deep orange at 0: what is coloured is what is lost, and ink stays readable on it."""
    lost = min(max(1 - dice, 0.0), 1.0)
    return "#" + "".join(f"{round(255 + (deep - 255) * lost):02x}" for deep in (0xF0, 0x8A, 0x3C))


def _protocols(attacked: Sequence[_Group]) -> list[dict[str, Any]]:
    """The same attack through tiles and through the whole volume."""
    lines = []
    for tiles in (group for group in attacked if group.protocol == "tiles"):
        for whole in (group for group in attacked if group.protocol == "whole volume"):
            if (tiles.condition, tiles.budget) != (whole.condition, whole.budget):
                continue
            a, b = tiles.values("dice"), whole.values("dice")
            a, b = {case: a[case] for case in a if case in b}, {case: b[case] for case in a if case in b}
            if a:
                row = {"condition": tiles.condition, "budget": tiles.budget, "tiles": _interval(a)}
                lines.append({**row, "whole": _interval(b), "gap": _drop(a, b)})
    return lines


def _decline(records: list[Record]) -> list[dict[str, Any]]:
    """One table for each kind of budget: a line a budget, the curves side by side."""
    found = decline(records)
    tables = []
    for unit in _unique(curve.unit for curve in found):
        curves = [curve for curve in found if curve.unit == unit]
        sizes = sorted({point.size for curve in curves for point in curve.points})
        points = [{point.size: point for point in curve.points} for curve in curves]
        lines = [
            {"size": f"{size:.3g}", "cells": [_point(of_curve.get(size)) for of_curve in points]} for size in sizes
        ]
        tables.append({"unit": unit, "curves": curves, "lines": lines})
    return tables


def _point(point: Point | None) -> dict[str, str]:
    if point is None:
        return {"dice": "–", "rest": ""}
    rest = [f"IoU {point.iou:.3f}"] if point.iou is not None else []
    rest += [f"HD95 {point.hd95:.1f}"] if point.hd95 is not None else []
    return {"dice": f"{point.dice:.3f}", "rest": ", ".join(rest)}


def _attacks(records: list[Record]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.attack:
            found.setdefault((record.condition, record.protocol), []).append(record.attack)
    return [{"name": ", ".join(filter(None, key)), "settings": _unique(attacks)} for key, attacks in found.items()]


def _notes(records: list[Record], teams: Sequence[Ensemble]) -> list[str]:
    """What every report says, so that nobody has to ask."""
    dice = [record for record in records if record.metric == "dice" and is_foreground(record)]
    counted = {word: sum(record.status == word for record in dice) for word in ("both empty", "missed", "invented")}
    elsewhere = sum(is_missed(record) for record in dice) - counted["missed"]
    lesions = any(record.metric == "missed_rate" for record in records)
    notes = [
        "Empty structures. Where neither reference nor prediction holds a structure, Dice is 1 and the distance 0 "
        f"({counted['both empty']} of {len(dice)} Dice values here). Where one of them alone does, Dice is 0 and the "
        f"distance is the diagonal of the image: missed, in the reference alone ({counted['missed']}); invented, in "
        f"the prediction alone ({counted['invented']}). Missed, too, is a structure of the reference with no voxel "
        f"right, its class being predicted in wrong places only ({elsewhere}): Dice is 0 and the distance is measured. "
        "No value is left out of a mean"
        + (", but for missed lesions: a structure that the reference lacks has none to miss." if lesions else "."),
        "Means are over the foreground classes of a case first, then over cases; the background is in none of them. "
        "HD95 is in mm. L∞ is the largest change of any voxel in any case, for intensities from 0 to 1. Flipped is the "
        "share of voxels whose predicted class differs from the one on the clean image.",
    ]
    cases = len({record.case for record in records})
    if cases < 2:
        notes.append("There is one case, so no interval is given: nothing here says how cases differ.")
    else:
        notes.append(
            "Brackets are 95 % BCa bootstrap intervals of the mean over cases (9999 resamples, seed "
            f"{BOOTSTRAP_SEED}); the drop is paired case by case."
            + (f" With {cases} cases they are rough, and tend to be too narrow." if cases < 10 else "")
        )
    if any(team.broken for team in teams) or any(len(filled(own)) > len(own) for own in _of_models(records)):
        notes.append(
            "A case that one member of an ensemble broke (Dice 0) is not given to the others: their lines are means "
            "over what was left, a member that was left nothing has none, and the ensemble as a whole is compared with "
            "other attacks."
        )
    notes.append(
        "An attack that fails shows that this attack fails, not that the model is safe. This is research evidence, "
        "not a clearance for clinical use."
    )
    return notes


def _of_models(records: Sequence[Record]) -> list[list[Record]]:
    names = _unique(record.model for record in records)
    return [[record for record in records if record.model == name] for name in names]


def _interval(values: Mapping[str, float]) -> dict[str, str] | None:
    return _written(mean_interval(values.values(), _rng())) if values else None


def _drop(clean: Mapping[str, float], condition: Mapping[str, float]) -> dict[str, str]:
    return _written(paired_drop(clean, condition, _rng()))


def _written(interval: Interval) -> dict[str, str]:
    def number(value: float) -> str:
        return f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero

    if interval.low is None or interval.high is None:
        return {"mean": number(interval.mean), "range": ""}
    return {"mean": number(interval.mean), "range": f"[{number(interval.low)}, {number(interval.high)}]"}


def _number(values: Mapping[str, float], form: str) -> str:
    """The mean over cases, or a dash; one identical image makes a mean PSNR infinite, and that is shown."""
    if not values:
        return "–"
    mean = float(np.mean(list(values.values())))
    return format(mean, form) if math.isfinite(mean) else "∞"


def _rng() -> np.random.Generator:
    # Fresh for each interval, so that one more condition in the records moves no other interval.
    return np.random.default_rng(BOOTSTRAP_SEED)


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
