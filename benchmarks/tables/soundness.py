"""docs/soundness.md: the full checklist on the shipped 3-D network, one window of CT B, under PGD of 20 steps."""

from __future__ import annotations

from common import arguments, markdown, publish, sentence
from strength import of_benchmarks

from medrobust.attacks import PGD
from medrobust.soundness import checklist

BLOCKS = ("soundness",)


def main() -> None:
    asked = arguments(__doc__)
    subject = of_benchmarks("subjects").load("UNETR")
    attack = PGD(eps=subject.eps, steps=2 if asked.quick else 20)
    found = checklist(subject.model, subject.image, subject.label, attack=attack, quick=asked.quick)
    warned = ", ".join(f"`{one.check}`" for one in found if not one.ok)
    words = sentence(
        f"""On the shipped 3-D network (`ct_organs_unetr`, one window of CT B, PGD of 20 steps at 8/255, the full list)
        {f"warnings come from {warned}" if warned else "nothing is warned of"}:"""
    )
    table = markdown(("check", "measured"), [[f"`{one.check}`", one.text] for one in found])
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


if __name__ == "__main__":
    main()
