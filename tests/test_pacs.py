"""The receiver against a real Orthanc: exactly one SEG a series, whatever is killed in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batch_tree
import dicom_studies
import orthanc
import pydicom
import pytest
import small_bundle
from click.testing import Result
from typer.testing import CliRunner

from medrobust.batch import pacs as receiver
from medrobust.batch.pacs_http import AwayError
from medrobust.batch.pacs_sources import Orthanc
from medrobust.cli import app

WHY_NOT = orthanc.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"RECEIVER NOT TESTED AGAINST AN ARCHIVE: {WHY_NOT}")


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[orthanc.Orthanc]:
    with orthanc.network():
        made = orthanc.Orthanc(tmp_path / "orthanc")
        made.start()
        try:
            yield made
        finally:
            made.kill()


def run(state: Path, bundle: Path, *words: str, user: str = orthanc.USER, word: str = orthanc.PASSWORD) -> Result:
    fixed = ["--once", "--modality", "CT", "--trust-bundle", "--workers", "0", "--tries", "2", "-b", str(bundle)]
    login = {"MEDROBUST_PACS_USER": user, "MEDROBUST_PACS_PASSWORD": word}
    result = CliRunner().invoke(app, ["pacs", orthanc.URL, str(state), *fixed, *words], env=login)
    text = result.output + (state / "pacs.jsonl").read_text() if (state / "pacs.jsonl").exists() else result.output
    assert [word for word in batch_tree.CANARIES if word in text] == []
    return result


def counts(state: Path) -> dict[str, int]:
    """What the last run says of itself."""
    last = json.loads((state / "pacs.jsonl").read_text().splitlines()[-1])
    return {name: last[name] for name in last if name not in ("ts", "level", "event")}


def test_exactly_one_seg_a_series(tmp_path: Path, server: orthanc.Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, state = small_bundle.make(tmp_path / "bundle"), tmp_path / "state"
    series = {
        "a": dicom_studies.make_series(tmp_path / "a", study="one", series="a"),
        "b": dicom_studies.make_series(tmp_path / "b", study="one", series="b", orientation=dicom_studies.OBLIQUE),
        "c": dicom_studies.make_series(tmp_path / "c", study="two", series="c"),
    }
    broken = dicom_studies.make_series(tmp_path / "d", study="three", series="d")
    other = dicom_studies.make_series(tmp_path / "e", study="three", series="e", modality="MR")
    late = series["c"].pop()
    for files in (*series.values(), [*broken[:4], *broken[5:]], other):
        server.upload(files)
    server.wait_until_stable()

    # The receiver is killed when it has stored a SEG and not yet said so, and the archive is killed after it.
    keep = receiver.Memory.keep

    def killed(memory: Any, name: str, record: Any) -> None:
        if record["status"] == receiver.STORED and len(server.segs()) == 2:
            raise Killed
        keep(memory, name, record)

    with monkeypatch.context() as patch:
        patch.setattr(receiver.Memory, "keep", killed)
        with pytest.raises(Killed):
            run(state, bundle)
    assert len(server.segs()) == 2
    assert receiver.Memory(state).position(0) == 0
    server.kill()
    result = run(state, bundle)
    assert (result.exit_code, "cannot be reached: ConnectionRefusedError, tried 2 times" in result.output) == (5, True)
    server.start()

    # Run again: everything is done once, the gap is refused, the MR and the SEG of ours are passed over.
    result = run(state, bundle)
    assert result.exit_code == 3, result.output
    found = server.segs()
    assert len(found) == 3
    assert counts(state) | {"passed-over": 0} == {"exit": 3, "done": 2, "known": 1, "rejected": 1, "passed-over": 0}
    assert list((state / "in").iterdir()) == []
    made = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(server.file(one["id"]))) for one in found]
    sources = {pydicom.dcmread(files[0]).SeriesInstanceUID: files for files in series.values()}
    for seg in made:
        (referenced,) = seg.ReferencedSeriesSequence
        files = sources.pop(referenced.SeriesInstanceUID)
        assert seg.StudyInstanceUID == pydicom.dcmread(files[0]).StudyInstanceUID
        uids = {pydicom.dcmread(path).SOPInstanceUID for path in files}
        assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == uids
    assert sources == {}
    assert {one["study"] for one in found} < set(server.ask("studies"))

    # Nothing new: nothing is done; and from the first change on, too.
    for words in ([], ["--restart"]):
        result = run(state, bundle, *words)
        assert result.exit_code == (3 if words else 0), result.output
        assert [one["id"] for one in server.segs()] == [one["id"] for one in found]
        assert counts(state).get("done", 0) == 0

    # A late slice: its series is done again, and what had been made without it is taken away.
    server.upload([late])
    server.wait_until_stable()

    def away(*_: object) -> bool:
        raise AwayError("in between")

    with monkeypatch.context() as patch:
        patch.setattr(Orthanc, "remove", away)
        patch.setattr(Orthanc, "probe", away)
        assert run(state, bundle).exit_code == 5
    assert len(server.segs()) == 4
    result = run(state, bundle)
    assert (result.exit_code, counts(state)["done"]) == (0, 1), result.output
    again = server.segs()
    assert len(again) == 3
    assert len({one["id"] for one in again} & {one["id"] for one in found}) == 2

    # Another kind of SEG is another model: all are done again, and what the first had made is taken away.
    result = run(state, bundle, "--restart", "--dicom-seg", "labelmap")
    assert (result.exit_code, counts(state)["done"]) == (3, 3), result.output
    others = server.segs()
    assert len(others) == 3
    assert {one["id"] for one in others} & {one["id"] for one in again} == set()

    # A new archive under the same address counts from the beginning; what was done stays done.
    assert [one.place for one in Orthanc(server=_server()).arrivals(10**6)]

    # Wrong credentials.
    result = run(state, bundle, word="wrong")
    assert (result.exit_code, "the archive refuses these credentials (401)" in result.output) == (2, True)
    assert batch_tree.leaks(state / "out") == []


def test_an_archive_that_is_only_dicomweb(tmp_path: Path, server: orthanc.Orthanc) -> None:
    bundle, state = small_bundle.make(tmp_path / "bundle"), tmp_path / "state"
    server.upload(dicom_studies.make_series(tmp_path / "a"))
    words = ["--dicomweb", "--days", "0", "--settle", "0.3", "--poll", "0.2"]
    fixed = ["--once", "--modality", "CT", "--trust-bundle", "--workers", "0", "-b", str(bundle), *words]
    login = {"MEDROBUST_PACS_USER": orthanc.USER, "MEDROBUST_PACS_PASSWORD": orthanc.PASSWORD}
    for expected in ({"done": 1}, {"known": 1}):
        result = CliRunner().invoke(app, ["pacs", f"{orthanc.URL}/dicom-web", str(state), *fixed], env=login)
        assert result.exit_code == 0, result.output
        assert counts(state) == {"exit": 0, **expected}
        assert len(server.segs()) == 1


def _server() -> Any:
    import base64

    from medrobust.batch.pacs_http import Server

    word = base64.b64encode(f"{orthanc.USER}:{orthanc.PASSWORD}".encode()).decode()
    return Server(url=orthanc.URL, headers={"Authorization": f"Basic {word}"})
