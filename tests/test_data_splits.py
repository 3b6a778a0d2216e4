"""No patient is on both sides of a split, and a training that would cheat or crash is stopped before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medrobust.data.splits import check, split

PATIENTS = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy")


def cases(scans: int = 2) -> list[dict[str, Any]]:
    """A few scans a patient, patients mixed."""
    return [{"image": f"{name}{scan}.nii.gz", "patient": name} for scan in range(scans) for name in PATIENTS]


def patients(found: Any) -> set[str]:
    return {case["patient"] for case in found}


@pytest.mark.parametrize("folds", [2, 4, 9])
def test_each_patient_is_in_validation_once(folds: int) -> None:
    pairs = split(cases(), folds=folds, seed=3)
    assert len(pairs) == folds
    assert sorted(name for _, second in pairs for name in patients(second)) == sorted(PATIENTS)
    for first, second in pairs:
        assert not patients(first) & patients(second)
        # Both lists together are the cases, each in the order that it had.
        assert [case for case in cases() if case in first or case in second] == cases()
        assert first == [case for case in cases() if case in first]
        assert second == [case for case in cases() if case in second]
    sizes = [len(second) for _, second in pairs]
    assert max(sizes) - min(sizes) <= 2


def test_folds_are_even_where_patients_are_not() -> None:
    """One patient with 6 scans and six with one: two folds of 6 scans each."""
    many = [{"image": str(i), "patient": "many"} for i in range(6)]
    single = [{"image": name, "patient": name} for name in PATIENTS[:6]]
    assert [len(second) for _, second in split(many + single, folds=2)] == [6, 6]


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 2), (1 / 3, 3), (0.01, 1)])
def test_a_fraction_is_of_patients(fraction: float, count: int) -> None:
    ((first, second),) = split(cases(scans=3), val_fraction=fraction, seed=1)
    assert len(patients(second)) == count
    assert patients(first) == set(PATIENTS) - patients(second)
    assert (len(first), len(second)) == (27 - 3 * count, 3 * count)


@pytest.mark.parametrize("how", [{"folds": 3}, {"val_fraction": 0.3}])
def test_the_seed_and_nothing_else_is_the_chance(how: dict[str, Any]) -> None:
    assert split(cases(), **how, seed=5) == split(cases(), **how, seed=5)
    found = {tuple(sorted(patients(split(cases(), **how, seed=seed)[0][1]))) for seed in range(20)}
    assert len(found) > 10
    # The order of the cases changes the order of the lists, not who is in them.
    straight, turned = (split(order, **how, seed=5) for order in (cases(), cases()[::-1]))
    assert [patients(second) for _, second in straight] == [patients(second) for _, second in turned]


def test_another_key_tells_patients_apart() -> None:
    one = [{"image": name} for name in PATIENTS]
    assert len(split(one, by="image", folds=9)) == 9
    numbered = [{"image": name, "ward": number} for number, name in enumerate(PATIENTS)]
    assert len(split(numbered, by="ward", val_fraction=0.5)[0][0]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected either folds or val_fraction, got folds=None and val_fraction=None"),
        ({"folds": 2, "val_fraction": 0.5}, "got folds=2 and val_fraction=0.5"),
        ({"folds": 1}, "expected 2 or more folds and at most one for each of 9 'patient', got 1"),
        ({"folds": 10}, "got 10"),
        ({"val_fraction": 1.0}, r"expected val_fraction in \(0, 1\)"),
        ({"val_fraction": 0.0}, r"expected val_fraction in \(0, 1\)"),
        ({"val_fraction": 0.95}, r"leaves some of 9 'patient' to training, got 0\.95"),
        ({"folds": 2, "by": "name"}, "expected every case to have 'name', got 18 of 18 without.*by='image'"),
    ],
)
def test_what_cannot_be_split_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(cases(), **changes)


def on_disk(folder: Path, *names: str, patient: bool = True) -> list[dict[str, Any]]:
    """A case a name, with its files; the patient is the name's first three letters."""
    folder.mkdir(exist_ok=True)
    found = []
    for name in names:
        case: dict[str, Any] = {"image": str(folder / f"{name}.nii.gz"), "label": folder / f"{name}_gt.nii.gz"}
        for path in case.values():
            Path(path).touch()
        found.append({**case, "patient": name[:3]} if patient else case)
    return found


def test_a_sound_split_passes(tmp_path: Path) -> None:
    check(on_disk(tmp_path, "ann1", "ann2"), on_disk(tmp_path, "bob1"))
    check(on_disk(tmp_path, "ann1", "ann2", patient=False), on_disk(tmp_path, "bob1"))
    (tmp_path / "series").mkdir()
    two = [str(tmp_path / "ann1.nii.gz"), str(tmp_path / "ann2.nii.gz")]
    check([{"image": two, "patient": 1}], [{"image": tmp_path / "series", "patient": 2}])


def test_a_patient_on_both_sides_is_named(tmp_path: Path) -> None:
    training, validation = on_disk(tmp_path, "ann1", "bob1", "cat1"), on_disk(tmp_path, "ann2", "dan1")
    with pytest.raises(
        ValueError, match=r"3 training and 2 validation .* got 1 values of 'patient' in both .* \(ann\)\."
    ) as e:
        check(training, validation)
    assert "images" not in str(e.value)
    assert "missing" not in str(e.value)
    with pytest.raises(ValueError, match=r"got 1 values of 'ward' in both lists \(7\)"):
        check([{**training[0], "ward": 7}], [{**validation[1], "ward": "7"}], by="ward")


@pytest.mark.parametrize("with_patient", [(False, False), (True, False), (False, True)])
def test_an_image_on_both_sides_is_found_without_patients(tmp_path: Path, with_patient: tuple[bool, bool]) -> None:
    training = on_disk(tmp_path, "ann1", "bob1", patient=with_patient[0])
    validation = on_disk(tmp_path, "bob1", "cat1", patient=with_patient[1])
    with pytest.raises(
        ValueError, match=r"got 1 images in both lists \(bob1\.nii\.gz\)\. .*split the cases by patient"
    ):
        check(training, validation)


def test_another_spelling_of_a_path_hides_nothing(tmp_path: Path) -> None:
    training = on_disk(tmp_path, "ann1", patient=False)
    (tmp_path / "more").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "ann1.nii.gz")
    for spelling in (tmp_path / "more" / ".." / "ann1.nii.gz", tmp_path / "link.nii.gz"):
        with pytest.raises(ValueError, match=r"1 images in both lists \(ann1\.nii\.gz\)"):
            check(training, [{"image": spelling}])
    # Files of one name in two folders are two images.
    check(training, on_disk(tmp_path / "more", "ann1", patient=False))


def test_missing_files_are_counted_and_named_without_folders(tmp_path: Path) -> None:
    training, validation = on_disk(tmp_path, "ann1", "bob1", "cat1"), on_disk(tmp_path, "dan1")
    for name in ("ann1.nii.gz", "ann1_gt.nii.gz", "bob1_gt.nii.gz", "dan1_gt.nii.gz"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"got 4 files missing \(ann1\.nii\.gz, .*, \.\.\.\)") as caught:
        check(training, validation)
    assert str(tmp_path) not in str(caught.value)
    assert "complete the data folder" in str(caught.value)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    training, validation = on_disk(tmp_path, "ann1", "bob1"), on_disk(tmp_path, "ann1", "cat1")
    (tmp_path / "cat1.nii.gz").unlink()
    with pytest.raises(ValueError, match="expected 2 training and 2 validation") as caught:
        check(training, validation)
    for part in ("1 values of 'patient' in both lists (ann)", "1 images in both lists (ann1.nii.gz)"):
        assert part in str(caught.value)
    assert "1 files missing (cat1.nii.gz)" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValueError, match="got no validation cases"):
        check(training[1:], [])
    with pytest.raises(ValueError, match="got no training cases"):
        check([], training[1:])
