"""How strong the attacks are: which step rule is best, and whether any other package does better.

    .venv/bin/python benchmarks/strength.py             # step rules x attacks x steps x norms x networks
    .venv/bin/python benchmarks/strength.py --table     # what of it is measured, as Markdown, without measuring more

Hours of one core in all; every number is kept as it is measured, so a run can be stopped and goes on. ``--part 0/2``
and ``--part 1/2`` share the work between two processes. The tables of the docs: ``benchmarks/tables/strength.py``.
"""

from __future__ import annotations

import argparse
import sys

import rules
import subjects
import torch
from cells import Cells


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--table", action="store_true", help="measure nothing")
    words.add_argument("--everything", action="store_true", help="the whole grid of the shipped networks too")
    words.add_argument("--part", default="0/1")
    words.add_argument(
        "--subjects", default=";".join(subjects.names()), help="separated by semicolons; see subjects.py"
    )
    words.add_argument("--peers", action="store_true", help="other packages beside ours instead; see peers.txt")
    words.add_argument("--settings", action="store_true", help="every other default instead")
    words.add_argument("--transfer", action="store_true", help="images shown to another network, by momentum, instead")
    words.add_argument("--standard", action="store_true", help="what the standard ensemble is chosen by instead")
    asked = words.parse_args()
    torch.set_num_threads(1)
    part, parts = (int(word) for word in asked.part.split("/"))
    if asked.peers:
        import strength_peers

        strength_peers.tables(
            Cells("peers", (part, parts), wait=not asked.table), asked.subjects.split(";"), everything=asked.everything
        )
        return
    if asked.settings:
        import settings

        settings.measure(Cells("settings", (part, parts), wait=not asked.table), asked.subjects.split(";"))
        return
    if asked.transfer:
        import transfer

        transfer.measure(Cells("transfer", (part, parts), wait=not asked.table), asked.subjects.split(";"))
        return
    if asked.standard:
        import standard

        standard.measure(Cells("standard", (part, parts), wait=not asked.table), asked.subjects.split(";"))
        return
    cells = Cells("rules", (part, parts), wait=not asked.table)
    rules.table(cells, asked.subjects.split(";"), everything=asked.everything)


if __name__ == "__main__":
    sys.exit(main())
