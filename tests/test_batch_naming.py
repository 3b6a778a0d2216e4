"""Names hold no patient data, never meet, never leave their folder; every file of a tree is found once, in order."""

from __future__ import annotations

import csv
import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrobust.batch.discovery import Search, discover
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.naming import KEY, case_key, folder_of, keep_names, name_all, private_folder, secret_of

SECRET = b"0123456789abcdef" * 2
PARTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(root: Path, **settings: object) -> list[str]:
    return [one.relative for one in discover(root, Search(**settings))]  # type: ignore[arg-type]


def problems(root: Path, **settings: object) -> dict[str, str]:
    found = discover(root, Search(**settings))  # type: ignore[arg-type]
    return {one.relative: one.problem[0] if one.problem else "" for one in found}


@given(first=PARTS, second=PARTS)
def test_names_say_nothing_and_stay_inside(first: str, second: str) -> None:
    key = case_key(SECRET, f"{first}/{second}")
    assert KEY.fullmatch(key)
    assert folder_of(Path("/out/cases"), key) == Path("/out/cases") / key
    assert key != case_key(SECRET, f"{first}/{second}.gz")
    assert key != case_key(b"another secret of the same length", f"{first}/{second}")


def test_what_other_tools_mix_up_gets_names_of_its_own() -> None:
    alike = [
        "1.2.840/1.2.3.4.5",
        "1.2.840/1.2.3.4.6",
        "A/img.nii.gz",
        "B/img.nii.gz",
        "B/img.nii",
        "b/img.nii",
        "A/IMG.nii",
    ]
    assert list(name_all(SECRET, alike).values()) == alike
    # A name is the path's own: what else is in the tree does not change it.
    assert name_all(SECRET, alike[2:3]).keys() <= name_all(SECRET, alike).keys()


def test_two_paths_of_one_name_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medrobust.batch.naming.case_key", lambda secret, relative: "case-0000000000000000")
    with pytest.raises(RunError, match="would share the name") as caught:
        name_all(SECRET, ["a", "b"])
    assert caught.value.exit_code == Exit.USAGE


@pytest.mark.parametrize(
    "key", ["..", "case-0123456789abcdef/..", "/etc", "case-0123456789ABCDEF", "case-0123456789abcdef\n"]
)
def test_no_other_name_becomes_a_folder(key: str) -> None:
    with pytest.raises(ValueError, match="expected a name"):
        folder_of(Path("/out"), key)


def test_the_secret_and_the_table_are_private(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "out")
    assert folder == tmp_path / "out.private"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = secret_of(folder)
    assert secret_of(folder) == secret
    keep_names(folder, {"case-1": "DOE^JOHN/ct.nii"})
    keep_names(folder, {"case-0": 'Ä,\n"x"/\udcff.nii', "case-1": "DOE^JOHN/ct.nii"})
    with (folder / "names.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["case", "path"],
            ["case-0", 'Ä,\n"x"/\\udcff.nii'],
            ["case-1", "DOE^JOHN/ct.nii"],
        ]
    for name in ("secret", "names.csv"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    for inside in (tmp_path / "out", tmp_path / "out" / "private"):
        with pytest.raises(RunError, match="outside OUTPUT"):
            private_folder(tmp_path / "out", inside)


def test_trees_are_walked_in_order_and_clutter_is_passed_over(tmp_path: Path) -> None:
    wanted = ["P1/S1/T1/a.nii.gz", "P1/S1/T2/a.nii.gz", "P10/a.NII", "P2/ä.nii", "z.nii"]
    touch(tmp_path, *wanted)
    touch(
        tmp_path,
        "._z.nii",
        ".hidden/b.nii",
        "P1/.DS_Store",
        "Thumbs.db",
        "c.nii.gz.part",
        "d.txt",
        "e.nii~",
        ".x.nii.tmp",
    )
    touch(tmp_path, "out/seg.nii.gz", "f.docx")
    assert names(tmp_path, aside=[tmp_path / "out"]) == sorted(wanted, key=os.fsencode)
    assert names(tmp_path, aside=[tmp_path / "out"], include=["P1*"], exclude=["*/T2/*"]) == [
        "P1/S1/T1/a.nii.gz",
        "P10/a.NII",
    ]
    assert names(tmp_path / "z.nii") == ["z.nii"]


def test_bids_trees_give_images_only(tmp_path: Path) -> None:
    touch(tmp_path, "dataset_description.json", "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_mask.nii.gz")
    touch(tmp_path, "derivatives/x/sub-1_T1w.nii.gz", "sub-1/func/sub-1_bold.nii.gz", "sub-1/anat/sub-1_dseg.nii.gz")
    assert names(tmp_path) == ["sub-1/anat/sub-1_T1w.nii.gz"]
    assert len(names(tmp_path, layout="tree")) == 5
    with pytest.raises(RunError, match="auto, tree or bids"):
        names(tmp_path, layout="dicom")


def test_links_are_followed_inside_only_and_each_file_is_found_once(tmp_path: Path) -> None:
    root, other = tmp_path / "in", tmp_path / "other"
    touch(root, "a.nii", ".annex/b.nii")
    touch(other, "secret.nii")
    (root / "again.nii").symlink_to(root / "a.nii")
    (root / "kept.nii").symlink_to(root / ".annex" / "b.nii")
    (root / "out.nii").symlink_to(other / "secret.nii")
    (root / "gone.nii").symlink_to(root / "nowhere.nii")
    (root / "loop.nii").symlink_to(root / "loop.nii")
    (root / "folder").symlink_to(root)
    os.mkfifo(root / "pipe.nii")
    found = {
        "a.nii": "",
        "gone.nii": "broken-link",
        "kept.nii": "",
        "loop.nii": "broken-link",
        "out.nii": "outside-root",
    }
    assert problems(root) == found | {"pipe.nii": "not-a-file"}
    assert problems(root, outside=True)["out.nii"] == ""
    assert [one.path for one in discover(root) if one.relative == "kept.nii"] == [root.resolve() / ".annex" / "b.nii"]


def test_ten_thousand_files_are_found_in_seconds(tmp_path: Path) -> None:
    for patient in range(100):
        folder = tmp_path / f"P{patient}" / "study"
        folder.mkdir(parents=True)
        for series in range(100):
            os.close(os.open(folder / f"{series}.nii.gz", os.O_CREAT))
    begin = time.process_time()
    found = names(tmp_path)
    assert time.process_time() - begin < 5
    assert len(found) == 10_000
    assert found == sorted(found)


def test_data_lists(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii", "b_label.nii")
    (tmp_path / "list.json").write_text(
        json.dumps({"night": ["a.nii", {"image": ["b.nii"], "label": "b_label.nii"}, "c.nii"]})
    )
    found = discover(tmp_path / "list.json", Search(section="night"))
    assert [(one.relative, one.label and one.label.name, one.problem and one.problem[0]) for one in found] == [
        ("a.nii", None, None),
        ("b.nii", "b_label.nii", None),
        ("c.nii", None, "missing"),
    ]
    (tmp_path / "list.csv").write_text("image,label\na.nii,\nb.nii,b_label.nii\n")
    assert names(tmp_path / "list.csv") == ["a.nii", "b.nii"]


BAD_LISTS = {
    "leaves": '["../secret.nii"]',
    "absolute": '["/etc/passwd"]',
    "label leaves": '[{"image": "a.nii", "label": "../x.nii"}]',
    "twice": '["a.nii", "./a.nii"]',
    "key twice": '[{"image": "a.nii", "image": "b.nii"}]',
    "NaN": '[{"image": "a.nii", "x": NaN}]',
    "no text": '[{"image": 3}]',
    "two channels": '[{"image": ["a.nii", "b.nii"]}]',
    "NUL": '["a\\u0000.nii"]',
    "deep": "[" * 100_000,
    "no list": '{"other": []}',
    "no JSON": "image: a.nii",
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_data_lists_are_refused_as_a_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(BAD_LISTS[name])
    with pytest.raises(RunError, match=r"data list|entry") as caught:
        discover(path)
    assert caught.value.exit_code == Exit.USAGE
    assert "passwd" not in str(caught.value)


def test_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="INPUT cannot be read") as caught:
        discover(tmp_path / "nothing")
    assert caught.value.exit_code == Exit.INPUT
