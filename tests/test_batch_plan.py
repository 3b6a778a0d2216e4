"""What is promised before a run: shares without gaps, and memory that is not exceeded."""

from __future__ import annotations

from pathlib import Path

import batch_tree
import numpy as np
import pytest
import small_bundle
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Spacingd

from medrobust.attacks.fgsm import FGSM
from medrobust.batch.attacked import Attacks
from medrobust.batch.discovery import Found
from medrobust.batch.faults import CaseError, RunError, fault_of
from medrobust.batch.nifti import Policy
from medrobust.batch.plan import need_of, net_shape, share, told
from medrobust.batch.recipe import Recipe


@given(paths=st.sets(st.text(max_size=30), max_size=40), more=st.text(max_size=30), number=st.integers(1, 9))
def test_shares_are_disjoint_complete_and_stay(paths: set[str], more: str, number: int) -> None:
    found = {path: path for path in paths}
    parts = [share(found, number, part) for part in range(number)]
    assert sorted(path for part in parts for path in part) == sorted(paths)
    # A file that arrives between the start of two machines changes nobody's share of the others.
    later = [share({**found, more: more}, number, part) for part in range(number)]
    assert all(part.items() <= after.items() for part, after in zip(parts, later, strict=True))


def test_shares_are_about_equal() -> None:
    found = {f"patient {number}/ct.nii.gz": number for number in range(4000)}
    assert all(900 < len(share(found, 4, part)) < 1100 for part in range(4))


@pytest.mark.parametrize(("number", "part"), [(0, 0), (3, 3), (3, -1), (-2, 0)])
def test_a_share_that_does_not_exist(number: int, part: int) -> None:
    with pytest.raises(RunError, match="expected --part-id"):
        share({}, number, part)


def test_the_networks_grid() -> None:
    spacing = [Spacingd("image", (3.0, 3.0, -1.0))]
    assert net_shape((512, 512, 100), (0.75, 1.5, 2.0), spacing) == (128, 256, 100)
    assert net_shape((512, 512, 100), (0.75, 1.5, 2.0), []) == (512, 512, 100)


def test_what_a_case_needs(tmp_path: Path) -> None:
    recipe = Recipe(root=small_bundle.make(tmp_path / "bundle"), trusted=True)
    for name, side in (("small.nii", 40), ("large.nii", 80)):
        batch_tree.write(tmp_path / name, np.zeros((side, side, side), dtype=np.int16))
    small, large = (
        need_of(name, Found(relative=name, path=tmp_path / name), recipe, Policy(), Attacks())
        for name in ("small.nii", "large.nii")
    )
    assert small.shape == (40, 40, 40)
    assert large.memory > small.memory > 1 << 29
    attacked = need_of(
        "a", Found(relative="a", path=tmp_path / "large.nii"), recipe, Policy(), Attacks(named={"FGSM": FGSM()})
    )
    assert attacked.memory > large.memory
    assert attacked.disk > 2 * 4 * 80**3  # the attack and its control, as float32
    (tmp_path / "cut.nii").write_bytes((tmp_path / "small.nii").read_bytes()[:400])
    cut = need_of("b", Found(relative="b", path=tmp_path / "cut.nii"), recipe, Policy(), Attacks())
    assert cut.problem == "truncated"
    text = told([small, large, cut], {"small.nii": "to do", "large.nii": "done", "b": "to do"}, 2)
    assert "3 cases: 1 to do, 1 done, 1 would be rejected" in text


def test_any_error_becomes_a_reason_without_its_text() -> None:
    """Libraries put paths into their messages."""

    def fail(error: BaseException) -> CaseError:
        try:
            raise RuntimeError("while reading /data/DOE^JOHN") from error
        except RuntimeError as caught:
            return fault_of(caught)

    assert fail(OSError(28, "No space left", "/data/DOE^JOHN")).code == "disk-full"
    assert fail(OSError(30, "Read-only", "/data/DOE^JOHN")).code == "no-access"
    assert fail(MemoryError()).code == "memory"
    assert fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")).code == "memory"
    other = fail(KeyError("DOE^JOHN"))
    assert other.code == "error"
    assert other.kind == "failed"
    assert "DOE" not in other.message
    assert "KeyError" in other.message
    own = CaseError("flat", "two dimensions")
    assert fail(own) is own
