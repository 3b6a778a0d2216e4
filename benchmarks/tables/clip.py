"""docs/clip.md: its table and picture, which `compare.yaml` of clip_zero_shot makes, and stronger attacks at 4/255."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import BUNDLES, ROOT, TINY, arguments, folder, publish, sentence, short_hash
from monai.bundle import ConfigParser

from medrobust.atomic import replacing
from medrobust.attacks import PGD, Margin, Square
from medrobust.evaluation import Condition
from medrobust.hashing import sha256_of_file
from medrobust.zero_shot import compare, conditions, for_classes
from medrobust.zero_shot_report import WORST, Row, summary, table

BLOCKS = ("clip", "clip.words")
BUNDLE = BUNDLES / "clip_zero_shot"
EPS = 4 / 255
STRONGER = [
    Condition(name="strong PGD 4/255", attack=PGD(eps=EPS, steps=50, restarts=2, objective=Margin())),
    Condition(name="Square 4/255", attack=for_classes(Square(eps=EPS))),
]
HARDENED = ("TeCoA", "FARE")


def main() -> None:
    asked = arguments(__doc__)
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.yaml", "compare.yaml")])
    parser["bundle_root"] = str(BUNDLE)
    if asked.quick:
        parser["val_every"], parser["steps"], parser["apgd_steps"] = 10, 1, 1
        for number, one in enumerate(STRONGER):
            own = {key: value for key, value in TINY.items() if hasattr(one.attack, key)}
            STRONGER[number] = replace(one, attack=replace(one.attack, **own))  # type: ignore[type-var]
    parser.get_parsed_content("initialize")
    get = parser.get_parsed_content
    weights = {name: Path(path) for name, path in get("compared").items()}
    wanted = conditions(get("eps"), steps=get("steps"), apgd_steps=get("apgd_steps"))
    text = [(one.name, one.text) for one in (*wanted, *STRONGER)]
    target = folder(asked.quick) / f"clip-{short_hash(text, *map(sha256_of_file, weights.values()))}"
    common: Mapping[str, Any] = {"batches": get("validate#dataloader"), "class_names": get("class_names")}

    def run(some: Mapping[str, Path], these: Sequence[Condition], name: str) -> list[Row]:
        records = compare(get("network"), some, wanted=these, folder=target / name, seed=get("seed"), **common)
        tables[name] = table(records)
        return summary(records)

    tables: dict[str, str] = {}
    rows = run(weights, wanted, "compare")
    stronger = run({name: weights[name] for name in HARDENED}, STRONGER, "stronger")
    publish({BLOCKS[0]: shown(tables["compare"], rows), BLOCKS[1]: words(rows, stronger)}, write=asked.write)
    if asked.write:
        with replacing(ROOT / "docs" / "clip.png") as partial:
            partial.write_bytes((target / "compare" / "curves.png").read_bytes())


def shown(text: str, rows: Sequence[Row]) -> str:
    """The table without its smallest eps, which is in the picture."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "| 1/255 |" not in line]
    images = rows[0].images
    return f"Top-1 / top-5 in per cent of {images} crops; ties count as wrong; Linf, seed 0.\n\n" + "\n".join(lines)


def words(rows: Sequence[Row], stronger: Sequence[Row]) -> str:
    """What is left of each hardened model at 4/255, and what stronger attacks find."""
    kept = []
    for model in HARDENED:
        clean, left = top1(rows, model, "clean", 0), top1(rows, model, WORST, 4)
        found = {one: top1(stronger, model, one, 4) for one in ("strong PGD", "Square")}
        kept.append(
            f"{model} keeps {left:.1f} of its {clean:.1f}, that is {100 * left / clean:.0f} % (PGD of twice 50 steps "
            f"on the margin leaves {found['strong PGD']:.1f}, `Square` without gradients {found['Square']:.1f})"
        )
    base = top1(rows, "base", WORST, 4)
    return sentence(
        f"Under the worst of all attacks at 4/255 the base is left with {base:.1f} top-1. {'; '.join(kept)}."
    )


def top1(rows: Iterable[Row], model: str, attack: str, eps: float) -> float:
    """Per cent of the images."""
    return next(100 * row.top1 for row in rows if (row.model, row.attack, row.eps) == (model, attack, eps))


if __name__ == "__main__":
    main()
