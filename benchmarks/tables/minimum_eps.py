"""docs/attacks.md: the smallest eps that brings CT B's Dice below 0.5."""

from __future__ import annotations

from common import arguments, mean, measured, publish, sentence

from medrobust.records import CLEAN

BLOCKS = ("minimum_eps",)


def main() -> None:
    asked = arguments(__doc__)
    records = measured("ct_organs_unetr", quick=asked.quick, minimum_eps=["apgd steps=10"], below=0.5)
    eps = 255 * mean(records, "minimum eps, APGD", "minimum_eps")
    words = sentence(
        f"""On the shipped network it takes {eps:.1f}/255 to bring CT B's mean Dice from {mean(records, CLEAN):.3f}
        under 0.5 (`apgd steps=10`)."""
    )
    publish({BLOCKS[0]: words}, write=asked.write)


if __name__ == "__main__":
    main()
