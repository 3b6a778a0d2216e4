"""docs/attacks.md: VAFA's published solver beside ours."""

from __future__ import annotations

from common import arguments, label, markdown, mean, measured, publish, three

from medrobust.records import CLEAN

BLOCKS = ("attacks_vafa",)
ROWS = {
    "VAFA": {"8 x 8 x 8": "vafa q_max=20 block_size=8,8,8", "32 x 32 x 16": "vafa q_max=20 block_size=32,32,16"},
    "VAFA2D": {"32 x 32": "vafa2d q_max=20"},
}


def main() -> None:
    asked = arguments(__doc__)
    rows = []
    clean = 0.0
    for name, by_block in ROWS.items():
        for block, ours in by_block.items():
            pair = (f"{ours} solver=soft", ours)
            both = {word: measured("ct_organs_unetr", word, quick=asked.quick) for word in pair}
            rows.append([name, block, *(three(mean(records, label(word))) for word, records in both.items())])
            clean = mean(both[ours], CLEAN)
    words = f"Measured on the shipped model (CT B, whole volume, `q_max=20`, 20 steps; clean Dice {clean:.3f}):"
    table = markdown(("", "blocks", "published solver", "projected solver"), rows)
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


if __name__ == "__main__":
    main()
