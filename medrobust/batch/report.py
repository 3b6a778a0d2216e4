"""The morning after: tables and a page, made from the records of the cases and from nothing else.

Every number of ``summary.json`` and of the page can be computed from ``cases.csv``; ``rows`` and ``summarise`` are all
there is to it. Putting the OUTPUT folders of several machines into one and calling ``write`` is the whole reduction.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medrobust.batch.attacked import RECORDS
from medrobust.batch.commit import SCHEMA, Store
from medrobust.records import BACKGROUND

COLUMNS = ("case", "status", "code", "stage", "reason", "warnings", "attempts", "seconds", "peak_mb", "adversarial")
MEASURED = ("seconds", "peak_mb")
"""Columns that differ from run to run."""
VOLUME = "ml "
"""Begins the name of a column with the volume of a structure."""

Row = dict[str, str]


def rows(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a case, as text, from the records."""
    found: list[Row] = []
    for record in records:
        measured = record.get("measured", {})
        row = {
            "case": record["case"],
            "status": record["status"],
            "code": record.get("code", ""),
            "stage": record.get("stage", ""),
            "reason": record.get("reason", ""),
            "warnings": " ".join(record.get("warnings", [])),
            "attempts": str(record.get("attempts", 1)),
            "seconds": str(measured.get("seconds", "")),
            "peak_mb": str(measured.get("peak_mb", "")),
            "adversarial": str(len(record.get("adversarial", []))),
        }
        row |= {f"{VOLUME}{name}": str(value) for name, value in record.get("volume_ml", {}).items()}
        found.append(row)
    return sorted(found, key=lambda row: row["case"])


def csv_of(found: Sequence[Row]) -> str:
    """The rows as CSV."""
    extra = sorted({name for row in found for name in row if name not in COLUMNS})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *extra], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``cases.csv``."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summarise(found: Sequence[Row]) -> dict[str, Any]:
    """Every number of the report, from the rows of ``cases.csv``."""
    done = [row for row in found if row["status"] == "done"]
    seconds = [float(row["seconds"]) for row in done if row["seconds"]]
    peaks = [float(row["peak_mb"]) for row in found if row["peak_mb"]]
    names = [name for name in (found[0] if found else {}) if name.startswith(VOLUME) and name != VOLUME + BACKGROUND]
    structures = {}
    for name in names:
        volumes = [float(row[name]) for row in done if row.get(name)]
        structures[name.removeprefix(VOLUME)] = {
            "found": sum(volume > 0 for volume in volumes),
            "absent": sum(volume == 0 for volume in volumes),
            "mean_ml": round(sum(volumes) / len(volumes), 3) if volumes else None,
        }
    return {
        "schema": SCHEMA,
        "cases": len(found),
        "status": dict(sorted(Counter(row["status"] for row in found).items())),
        "codes": dict(sorted(Counter(row["code"] for row in found if row["code"]).items())),
        "warnings": dict(sorted(Counter(word for row in found for word in row["warnings"].split()).items())),
        "adversarial_volumes": sum(int(row["adversarial"]) for row in found),
        "seconds": {
            "total": round(sum(seconds), 3),
            "mean": round(sum(seconds) / len(seconds), 3) if seconds else None,
        },
        "peak_mb": max(peaks, default=None),
        "structures": structures,
    }


def write(store: Store, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write all tables and the page; two runs that end at once do so one after the other.

    Args:
        about: what the run says of itself: bundle, versions, what was left undone.

    Returns:
        The summary.
    """
    with store.lock("report", wait=60.0):
        found = rows(store.records())
        text = csv_of(found)
        found = list(csv.DictReader(io.StringIO(text)))
        summary = summarise(found)
        failures = [row for row in found if row["status"] != "done"]
        store.publish("cases.csv", text)
        store.publish("failures.csv", _failures(failures))
        records = _records(store, [row["case"] for row in found if row["status"] == "done"])
        if records:
            store.publish(RECORDS, records)
        store.publish("summary.json", json.dumps({**summary, "about": dict(about)}, indent=1, allow_nan=False) + "\n")
        made = Environment(
            loader=PackageLoader("medrobust"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        page = made.get_template("batch.html.j2")
        store.publish("report.html", page.render(summary=summary, failures=failures, about=about, rows=found))
        return summary


def _failures(failures: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["case", "status", "stage", "code", "reason", "attempts"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(failures)
    return text.getvalue()


def _records(store: Store, keys: Sequence[str]) -> str:
    """The records of all attacked cases in one table, for ``medrobust report OUTPUT``."""
    text = ""
    for key in keys:
        path = store.cases / key / RECORDS
        if path.is_file():
            header, _, body = path.read_text(encoding="utf-8").partition("\n")
            text += body if text else f"{header}\n{body}"
    return text
