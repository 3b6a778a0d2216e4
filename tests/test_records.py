"""Records survive the disk bit for bit, and a file that is none says so."""

import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medrobust import __version__
from medrobust.records import COLUMNS, Record, append, csv_text, read_csv, versions, write_csv

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
record = st.builds(
    Record,
    case=text,
    condition=text,
    metric=text,
    value=st.floats(allow_nan=False),
    class_name=text,
    status=st.sampled_from(["ok", "both empty", "missed", "invented"]),
    attack=text,
    protocol=text,
    seed=st.none() | st.integers(),
    model=text,
    versions=text,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@given(before=st.lists(record, max_size=3), after=st.lists(record, max_size=3))
def test_written_and_appended_records_read_back_equal(folder: Path, before: list[Record], after: list[Record]) -> None:
    path = folder / "records.csv"
    write_csv(before, path)
    assert path.read_bytes().decode() == csv_text(before)
    append(after, path)
    read = read_csv(path)
    assert read == before + after
    assert [math.copysign(1, r.value) for r in read] == [math.copysign(1, r.value) for r in before + after]
    assert [p.name for p in folder.iterdir()] == ["records.csv"]


def one(**changes: object) -> Record:
    return Record(**{"case": "ct_0", "condition": "clean", "metric": "dice", "value": 0.5} | changes)  # type: ignore[arg-type]


def test_append_begins_a_file_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.csv"
    append([one()], path)
    append([one(value=1 / 3)], path)
    assert [r.value for r in read_csv(path)] == [0.5, 1 / 3]


def test_numbers_of_other_libraries_are_written_as_numbers(tmp_path: Path) -> None:
    write_csv([one(value=np.float64(0.1)), one(value=torch.tensor(0.5))], tmp_path / "r.csv")
    assert [r.value for r in read_csv(tmp_path / "r.csv")] == [0.1, 0.5]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    write_csv([one()], path)
    with pytest.raises(TypeError):
        write_csv([one(), "no record"], path)  # type: ignore[list-item]
    assert read_csv(path) == [one()]
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_no_record() -> None:
    with pytest.raises(ValueError, match=r"expected a number for dice of case 'ct_0' under 'clean', got nan"):
        one(value=math.nan)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        one().value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the header case,.* got an empty file"),
        ("a,b\n1,2\n", "expected the header case,.* got a,b"),
        (",".join(COLUMNS) + "\nct_0,clean,dice\n", "expected 11 columns in .*, line 2, got 3"),
        (csv_text([one()]).replace("0.5", "half"), "a number as value .* line 2: .*half"),
        (csv_text([one(seed=3)]).replace(",3,", ",x,"), "a whole one or nothing as seed in .* line 2"),
    ],
)
def test_what_is_no_file_of_records_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_what_is_no_text_at_all_says_why(tmp_path: Path) -> None:
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ValueError, match="expected a text file in UTF-8"):
        read_csv(path)
    path.write_bytes(csv_text([one(case="a")]).replace("a,", "a\rb,").encode())
    with pytest.raises(ValueError, match=r"expected CSV in .*, line \d"):
        read_csv(path)


def test_append_refuses_a_foreign_or_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the header"):
        append([one()], path)
    path.write_text(csv_text([one()]).rstrip("\n"))
    with pytest.raises(ValueError, match="last line cut short"):
        append([one()], path)


def test_versions_name_what_computed() -> None:
    parts = dict(part.split(" ") for part in versions().split("; "))
    assert parts["medrobust"] == __version__
    assert torch.__version__.startswith(parts["torch"])
    assert set(parts) == {"medrobust", "torch", "monai"}
