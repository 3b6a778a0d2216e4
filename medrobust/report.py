"""The report: a pure function of records and picture files. The same records give the same bytes."""

import base64
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medrobust.breaking import breaking, shares
from medrobust.charts import decline_curves, dice_by_class
from medrobust.findings import Checked, warnings
from medrobust.goal_tables import goals_table
from medrobust.records import Record
from medrobust.tables import HEADS, contents
from medrobust.transfer import matrices

TITLE = "Robustness report"

Picture = str | os.PathLike[str] | tuple[str, bytes]
"""A PNG file, captioned by its name, or a caption and the bytes of a PNG."""


def html(
    records: Iterable[Record],
    pictures: Sequence[Picture] = (),
    *,
    title: str = TITLE,
    notes: Sequence[str] = (),
    controls: Collection[str] | None = None,
    checks: Sequence[Checked] = (),
    most_pictures: int = 24,
) -> str:
    """The whole report as one HTML file without links or scripts, for the screen, the telephone and paper.

    Conditions keep the order of their first appearance, so a control stands under its attack when recorded after it.
    ``controls`` names the conditions that are controls; by default those whose attack is noise or takes no step.
    ``checks`` are what the soundness checklist found of the runs the records are from, warnings first.
    ``notes`` are added to the notes that every report has. Of more than ``most_pictures`` pictures an even choice is
    shown, and the report says so.

    Raises ValueError for no records, or a picture that is no PNG.
    """
    count = min(len(pictures), most_pictures)
    shown = [pictures[k * len(pictures) // count] for k in range(count)]
    records = list(records)
    view = _view(records, title, notes, controls, checks)
    for model in view["models"]:
        model["figure"] = _data_uri(dice_by_class(model["means"])) if model["organs"] else ""
        curves = [curve for table in model["decline"] for curve in table["curves"]]
        units = dict.fromkeys(search["unit"] for search in model["breaking"])
        model["shares"] = [
            _data_uri(shares([search for search in model["breaking"] if search["unit"] == unit])) for unit in units
        ]
        model["curves"] = _data_uri(decline_curves(curves, model["clean_dice"])) if curves else ""
    return (
        _environment(escape=True)
        .get_template("report.html.j2")
        .render(
            view,
            pictures=[_picture(picture) for picture in shown],
            all_pictures=len(pictures),
        )
    )


def markdown(
    records: Iterable[Record],
    *,
    title: str = TITLE,
    notes: Sequence[str] = (),
    controls: Collection[str] | None = None,
    checks: Sequence[Checked] = (),
) -> str:
    """The report's numbers as Markdown; arguments as for ``html``."""
    view = _view(list(records), title, notes, controls, checks)
    return _environment(escape=False).get_template("report.md.j2").render(view)


def _view(
    records: list[Record],
    title: str,
    notes: Sequence[str],
    controls: Collection[str] | None,
    checks: Sequence[Checked],
) -> dict[str, Any]:
    view = contents(records, title, notes, controls)
    for model in view["models"]:
        own = [record for record in records if record.model == model["name"]]
        model["goals"], model["breaking"] = goals_table(own), breaking(own)
    found = [{"run": check, "warnings": warnings(check.findings)} for check in checks]
    return {**view, "checks": found, "transfer": matrices(records)}


def _picture(picture: Picture) -> dict[str, str]:
    if isinstance(picture, tuple):
        text, png = picture
    else:
        text, png = caption(picture), Path(picture).read_bytes()
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"expected a PNG for the picture {text!r}, got {png[:8]!r}; pass bytes from pictures.panel")
    return {"caption": text, "source": _data_uri(png)}


def caption(path: str | os.PathLike[str]) -> str:
    """What a run's picture shows, from its name: case, condition and protocol."""
    return ", ".join(Path(path).stem.removesuffix("__adv").split("__")).replace("whole-volume", "whole volume")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@lru_cache(maxsize=2)
def _environment(*, escape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[[str], str]] = {
        "md": _markdown_text,
        "code": lambda text: "`" + " ".join(text.replace("`", "'").split()) + "`",
        "head": lambda metric: HEADS.get(metric, metric),
    }
    environment.filters.update(filters)
    return environment


def _markdown_text(text: str) -> str:
    """Text that cannot break out of a Markdown table or into HTML."""
    return re.sub(r"([\\`*\[\]|]|\b_|_\b)", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
