"""README's table: what `make demo` measures; also what docs/whole-volumes.md says of tiles."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from common import ROOT, arguments, folder, markdown, mean, publish, quickened, sentence, short_hash, three

from medrobust import attacks, preparing
from medrobust.cli import HARDENED, demo
from medrobust.evaluation import TILES, WHOLE
from medrobust.hashing import sha256_of_file
from medrobust.records import CLEAN, Record, read_csv

BLOCKS = ("readme_demo", "readme_demo.vaft", "readme_demo.words", "readme_demo.tiles")
BUNDLE = ROOT / "bundles" / "ct_organs_unetr"
STRUCTURES = ("liver", "aorta", "bones", "back muscles")


def main() -> None:
    asked = arguments(__doc__)
    records, hardened = run_demo(quick=asked.quick)
    blocks = {
        BLOCKS[0]: f"{intro()}\n\n{table(records)}",
        BLOCKS[1]: vaft(hardened),
        BLOCKS[2]: words(records),
        BLOCKS[3]: whole_volumes(records),
    }
    publish(blocks, write=asked.write)


def run_demo(*, quick: bool) -> tuple[list[Record], list[Record]]:
    """Records of both of its networks.

    The demo always starts anew, so a killed one is lost; a finished one is read again until any default of any attack
    changes.
    """
    defaults = [repr(attacks.load(name)()) for name in attacks.names() if name != "universal"]
    weights = [sha256_of_file(path) for path in sorted((BUNDLE / "models").glob("*.pt"))]
    output = folder(quick) / f"readme_demo-{short_hash(inspect.getsource(demo), *defaults, *weights)}"
    done = output.with_suffix(".done")
    if not done.is_file():
        small = patch.object(preparing, "prepare", tiny) if quick else contextlib.nullcontext()
        with small, contextlib.redirect_stdout(sys.stderr):
            demo(output=output, bundle=BUNDLE)
        done.touch()
    found = [read_csv(path / "records.csv") for path in (output, output / HARDENED)]
    return found[0], found[1]


def tiny(prepare: Any = preparing.prepare, **words: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The demo's runs with tiny settings."""
    return quickened(*prepare(**words))


def intro() -> str:
    """What was measured."""
    return sentence(
        """What `make demo` measured here (CT B, one exam, the shipped small UNETR, mean Dice of liver, aorta, bones
        and back muscles; some minutes on one CPU core; `VAFA` with `q_max` 20 and blocks of 32 x 32 x 16; seed 0):"""
    )


def table(records: Sequence[Record]) -> str:
    """A row a condition, in the demo's order."""
    head = ("condition", "Dice, whole volume", "Dice, tiles", "HD95 mm", "SSIM", "Linf")
    names = dict.fromkeys(record.condition for record in records)
    tiles = {record.condition for record in records if record.protocol == TILES}
    return markdown(head, [row(records, name, tiled=name in tiles) for name in names])


def row(records: Sequence[Record], name: str, *, tiled: bool) -> list[str]:
    def number(metric: str, protocol: str = WHOLE) -> float:
        return mean(records, name, metric, protocol=protocol)

    found = [name, three(number("dice")), three(number("dice", TILES)) if tiled else "", f"{number('hd95'):.0f}"]
    return found + (["", ""] if name == CLEAN else [three(number("ssim")), f"{255 * number('linf'):.1f}/255"])


def vaft(records: Sequence[Record]) -> str:
    """The demo's second network."""
    return sentence(
        f"""`make demo` then attacks `vaft.pt`, the same network after VAFT ([table of all
        attacks](docs/training.md#from-zero-to-the-table)): {mean(records, CLEAN):.3f} clean,
        {mean(records, "VAFA"):.3f} under VAFA."""
    )


def words(records: Sequence[Record]) -> str:
    """What the table says of structures and tiles."""
    under_pgd = ", ".join(f"{name} {mean(records, 'PGD', structure=name):.3f}" for name in STRUCTURES)
    pgd, vafa = ((mean(records, name, protocol=TILES), mean(records, name)) for name in ("PGD", "VAFA"))
    return sentence(
        f"""Under PGD the structures are left with {under_pgd}. Attacking tiles, as the literature does, would have
        reported {pgd[0]:.2f} where the deployed pipeline falls to {pgd[1]:.2f}, and {vafa[0]:.2f} instead of
        {vafa[1]:.2f} for VAFA."""
    )


def whole_volumes(records: Sequence[Record]) -> str:
    """The sentence in docs/whole-volumes.md."""
    pgd, vafa = ((mean(records, name), mean(records, name, protocol=TILES)) for name in ("PGD", "VAFA"))
    return sentence(
        f"""On the shipped model and CT B, 20 steps of PGD at 8/255 left a Dice of {pgd[0]:.3f} when the whole
        volume was attacked and {pgd[1]:.3f} when its tiles were; VAFA left {vafa[0]:.3f} and {vafa[1]:.3f}
        (`make demo`)."""
    )


if __name__ == "__main__":
    main()
