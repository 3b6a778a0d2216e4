"""docs/soundness.md: the quick checklist on the shipped 3-D network under PGD of 20 steps."""

from __future__ import annotations

from common import arguments, markdown, prepared, publish, say, sentence

from medrobust.preflight import check, first_case

BLOCKS = ("soundness",)
ATTACK = "pgd eps=8/255"


def main() -> None:
    asked = arguments(__doc__)
    # The checklist's queries have no tiny setting, so --quick takes a slice.
    run, cases = prepared("ct_slices_upernet" if asked.quick else "ct_organs_unetr", ATTACK, quick=asked.quick)
    run.evaluate(cases, say)
    condition = next(one for one in run.conditions if one.name == "PGD")
    found = check(run, condition, first_case(run, cases), "quick", "")
    if not found.findings:
        raise RuntimeError(f"expected findings, got none: {found.why_not}")
    warned = ", ".join(f"`{one.check}`" for one in found.findings if not one.ok)
    words = sentence(
        f"""On the shipped 3-D network (`ct_organs_unetr`, CT B, PGD of 20 steps at 8/255, the quick list)
        {f"warnings come from {warned}" if warned else "nothing is warned of"}:"""
    )
    table = markdown(("check", "measured"), [[f"`{one.check}`", one.text] for one in found.findings])
    publish({BLOCKS[0]: f"{words}\n\n{table}"}, write=asked.write)


if __name__ == "__main__":
    main()
