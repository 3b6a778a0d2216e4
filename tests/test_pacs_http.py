"""The archive's client against one that answers all kinds of nonsense."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
import small_bundle
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage
from typer.testing import CliRunner

from medrobust.batch import naming, pacs, pacs_command, pacs_http, pacs_sources
from medrobust.batch.commit import Made, Store
from medrobust.batch.dicom_seg import SegWriter
from medrobust.batch.faults import CaseError, Exit, RunError
from medrobust.batch.locks import hold
from medrobust.batch.logs import Log
from medrobust.batch.pacs_http import AwayError, DeniedError, GoneError, RefusedError, Server, connect
from medrobust.batch.pacs_sources import DicomWeb, Orthanc
from medrobust.cli import app

SECRET = "canary-secret"
STORED = json.dumps({"00081199": {"vr": "SQ", "Value": [{}]}}).encode()


class Stub(ThreadingHTTPServer):
    """Answers each path with the next of its answers, the last for ever: status, body, headers; ``None`` hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        answers = self.server.answers.get(self.path) or self.server.answers.get(self.path.partition("?")[0])
        answer = (404, b"") if not answers else answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            return
        status, content, *more = answer
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(more[0] if more else {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def client(stub: Stub, **options: Any) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # made without reading all certificates of the system
    return Server(url=stub.url, context=context, **{"pause": 0.001, "tries": 4, "timeout": 5.0, **options})


@pytest.mark.parametrize(
    "trouble",
    [(503, b""), (429, b""), (500, b"x"), None, (200, b"half", {"Content-Length": "100", "Connection": "close"})],
)
def test_what_passes_is_tried_again(stub: Stub, tmp_path: Path, trouble: Any) -> None:
    stub.answers["/a"] = [trouble, trouble, (200, b"content")]
    assert client(stub).get("a") == b"content"
    stub.answers["/a"] = [trouble, (200, b"content")]
    client(stub).save("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert len(stub.asked) == 5
    stub.answers["/a"] = [trouble]
    with pytest.raises(AwayError, match=r"cannot be reached: .*, tried 4 times") as caught:
        client(stub).get("a")
    assert str(stub.server_port) not in str(caught.value)
    assert len(stub.asked) == 9


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RefusedError), (409, RefusedError), (302, RefusedError), (404, GoneError), (401, DeniedError)],
)
def test_what_does_not_pass_is_asked_once(stub: Stub, status: int, kind: type[Exception]) -> None:
    stub.answers["/a"] = [(status, b"", {"Location": f"{stub.url}/b"})]
    with pytest.raises(kind):
        client(stub).get("a")
    assert stub.paths() == ["/a"]  # and the redirect is not followed with the credentials


def test_pauses_grow_and_end() -> None:
    paused: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", paused.append)
        with pytest.raises(AwayError):
            Server(url="http://127.0.0.1:9", tries=9, timeout=1).get("a")
    assert paused == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_server_that_says_nothing_is_left(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda _: event.wait(10))
    with pytest.raises(AwayError, match="TimeoutError"):
        client(stub, timeout=0.1, tries=1).get("a")
    event.set()


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET])
def test_a_network_that_breaks_while_it_answers_is_away_and_a_full_disk_is_not(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def broken(said: int) -> Any:
        def getresponse(*_: object) -> None:
            raise OSError(said, "broken")

        return getresponse

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", broken(number))
    with pytest.raises(AwayError, match=errno.errorcode[number]):
        client(stub).get("a")
    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", broken(errno.ENOSPC))
    with pytest.raises(OSError, match="broken") as caught:
        client(stub).get("a")
    assert caught.value.errno == errno.ENOSPC


def test_too_much_is_refused(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs_http, "LARGEST_ANSWER", 10)
    monkeypatch.setattr(pacs_http, "LARGEST_INSTANCE", 10)
    stub.answers["/a"] = [(200, b"0123456789")]
    assert client(stub).get("a") == b"0123456789"
    stub.answers["/a"] = [(200, b"0123456789-")]
    with pytest.raises(RefusedError, match="larger"):
        client(stub).get("a")
    with pytest.raises(RefusedError, match="larger"):
        client(stub).save("a", tmp_path / "a")


def test_credentials_come_from_the_environment_or_a_file_and_go_nowhere_else(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.answers["/a"] = [(200, b"x")]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is not used
    monkeypatch.setenv(pacs_http.USER, "me")
    monkeypatch.setenv(pacs_http.PASSWORD, SECRET)
    server = connect(stub.url + "/")
    assert pacs_http.PASSWORD not in os.environ
    server.get("/a")
    monkeypatch.setenv(pacs_http.TOKEN, SECRET)
    connect(stub.url).get("a")
    path = tmp_path / "netrc"
    path.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    path.chmod(0o640)
    with pytest.raises(RunError, match="only its owner may read"):
        connect(stub.url, path)
    path.chmod(0o600)
    for name in (pacs_http.USER, pacs_http.PASSWORD, pacs_http.TOKEN):
        monkeypatch.setenv(name, "another")  # the file is what was asked for
    connect(stub.url, path).get("a")
    assert pacs_http.TOKEN not in os.environ
    connect(stub.url).get("a")
    sent = [headers.get("Authorization") for _, _, headers, _ in stub.asked]
    assert sent == ["Basic bWU6Y2FuYXJ5LXNlY3JldA==", f"Bearer {SECRET}", "Basic bWU6Y2FuYXJ5LXNlY3JldA==", None]
    assert SECRET not in repr(server)
    assert "bWU6" not in repr(server)
    path.write_text("machine elsewhere login me password x\n")
    with pytest.raises(RunError, match="no line for the host"):
        connect(stub.url, path)
    path.write_text("nonsense")
    with pytest.raises(RunError, match="netrc"):
        connect(stub.url, path)
    monkeypatch.setenv(pacs_http.TOKEN, "a\r\nX: y")
    with pytest.raises(RunError, match="of one line"):
        connect(stub.url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://a", "expected URL"),
        ("archive", "expected URL"),
        (f"http://me:{SECRET}@localhost", "no credentials"),
        ("http://localhost/?token=1", "no credentials"),
        ("http://archive.example", "--plain-http"),
    ],
)
def test_addresses_that_are_refused(url: str, why: str) -> None:
    with pytest.raises(RunError, match=why) as caught:
        connect(url)
    assert SECRET not in str(caught.value)
    assert connect("http://archive.example", plain=True).url == "http://archive.example"


@pytest.mark.skipif(not shutil.which("openssl"), reason="TLS NOT TESTED: no openssl")
def test_certificates_are_verified(stub: Stub, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, *name]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    stub.socket = context.wrap_socket(stub.socket, server_side=True)
    stub.answers["/a"] = [(200, b"x")]
    url = stub.url.replace("http:", "https:")
    with pytest.raises(RunError, match="is not trusted: pass its authority's as --ca"):
        connect(url).get("a")
    assert connect(url, authority=cert).get("a") == b"x"
    assert stub.paths() == ["/a"]
    with pytest.raises(RunError, match="PEM"):
        connect(url, authority=key)


SERIES = {"MainDicomTags": {"SeriesInstanceUID": "1.2.3", "Modality": "CT"}}
CHANGE = {"ChangeType": "StableSeries", "ID": "ab-1", "Seq": 3}
ROW = {"ID": "cd-2", "MainDicomTags": {"SOPInstanceUID": "1.2.3.4"}}


def orthanc(stub: Stub, **answers: Any) -> Orthanc:
    said = {
        "changes": {"Changes": [{"ChangeType": "NewSeries", "ID": "x", "Seq": 2}, CHANGE], "Done": True, "Last": 3},
        "series/ab-1": SERIES,
        "series/ab-1/instances": [ROW],
        **answers,
    }
    for path, content in said.items():
        stub.answers[f"/{path}"] = [(200, content if isinstance(content, bytes) else json.dumps(content).encode())]
    return Orthanc(server=client(stub))


def test_what_orthanc_says(stub: Stub) -> None:
    source = orthanc(stub)
    (arrival,) = source.arrivals(0)
    assert (arrival.place, arrival.position) == ("ab-1", 3)
    series = source.series("ab-1")
    assert (series.uid, series.modality, series.instances) == ("1.2.3", "CT", {"1.2.3.4": "cd-2"})


def test_pages_of_changes(stub: Stub) -> None:
    for since, numbers in ((0, (1, 2)), (2, (3, 4)), (4, (5,))):
        changes = [{**CHANGE, "Seq": number} for number in numbers]
        stub.answers[f"/changes?since={since}&limit=100"] = [
            (200, json.dumps({"Changes": changes, "Done": since == 4, "Last": numbers[-1]}).encode())
        ]
    stub.answers["/changes?last"] = [(200, b'{"Last": 5}')]
    assert [one.position for one in Orthanc(server=client(stub)).arrivals(0)] == [1, 2, 3, 4, 5]
    assert [one.position for one in Orthanc(server=client(stub)).arrivals(4)] == [5]
    assert [one.position for one in Orthanc(server=client(stub)).arrivals(99)] == [1, 2, 3, 4, 5]  # another archive


@pytest.mark.parametrize(
    "answers",
    [
        {"changes": b"<html>"},
        {"changes": b"[" * 100_000},
        {"changes": []},
        {"changes": {"Changes": 3, "Last": 1}},
        {"changes": {"Changes": [{"ChangeType": "StableSeries"}], "Last": 1}},
        {"changes": {"Changes": [{**CHANGE, "ID": "../../instances/1"}], "Last": 3}},
        {"changes": {"Changes": [{**CHANGE, "Seq": "DOE^JOHN"}], "Last": 3}},
        {"changes": {"Changes": [{**CHANGE, "Seq": float("inf")}], "Last": 3}},
        {"series/ab-1": {}},
        {"series/ab-1": {"MainDicomTags": {"SeriesInstanceUID": "../../../tmp/x"}}},
        {"series/ab-1/instances": {"a": 1}},
        {"series/ab-1/instances": [{"ID": "../x", "MainDicomTags": {"SOPInstanceUID": "1.2"}}]},
        {"series/ab-1/instances": [{"ID": "cd", "MainDicomTags": {"SOPInstanceUID": "DOE^JOHN/.."}}]},
        {"series/ab-1/instances": [3]},
    ],
)
def test_hostile_answers_are_refused_in_fixed_words(stub: Stub, answers: dict[str, Any]) -> None:
    source = orthanc(stub, **answers)
    with pytest.raises(RefusedError) as caught:
        [source.series(one.place) for one in source.arrivals(0)]
    assert not any(word in str(caught.value) for word in ("DOE", "..", "1.2", "tmp"))


def test_a_seg_is_stored_by_stow_or_as_orthanc_does(stub: Stub) -> None:
    source = orthanc(stub, **{"dicom-web/studies": STORED})
    source.store(b"DICM")
    _, path, headers, body = stub.asked[-1]
    boundary = headers["Content-Type"].partition("boundary=")[2]
    assert path == "/dicom-web/studies"
    assert body == f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\nDICM\r\n--{boundary}--\r\n".encode()
    stub.answers["/dicom-web/studies"] = [(200, b"{}")]
    with pytest.raises(RefusedError, match="does not say that it has stored"):
        source.store(b"DICM")
    del stub.answers["/dicom-web/studies"]
    stub.answers["/instances"] = [(200, b"{}")]
    source.store(b"DICM")
    assert stub.asked[-1][3] == b"DICM"


def test_only_a_seg_is_ever_taken_away(stub: Stub) -> None:
    found = [{"ID": "ab-1", "Type": "Series"}, {"ID": "ee", "Type": "Instance"}]
    source = orthanc(stub, **{"tools/lookup": found})
    assert source.remove("1.2.3")
    assert [method for method, *_ in stub.asked if method == "DELETE"] == []
    stub.answers["/series/ab-1"] = [
        (200, json.dumps({"MainDicomTags": {**SERIES["MainDicomTags"], "Modality": "SEG"}}).encode())
    ]
    assert source.remove("1.2.3")
    assert [path for method, path, *_ in stub.asked if method == "DELETE"] == ["/series/ab-1"]


def test_dicomweb_waits_until_a_series_rests(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(count: int) -> Any:
        values = {"0020000D": "1.2", "0020000E": "1.2.3", "00201209": count}
        return (200, json.dumps([{tag: {"Value": [value]} for tag, value in values.items()}]).encode())

    source = DicomWeb(server=client(stub), modalities=("CT",), settle=60)
    now = [1000.0]
    monkeypatch.setattr(pacs_sources.time, "monotonic", lambda: now[0])
    end = (204, b"")
    stub.answers["/series"] = [row(5), end, row(6), end, row(6), end, row(6), end, row(6), end, end, row(7)]
    told = []
    for seconds in (0, 59, 59, 2, 90, 1, 1):
        now[0] += seconds
        told.append((len(list(source.arrivals(None))), source.waiting))
    # Growing, resting for too short a time, complete, told already, deleted, there again.
    assert told == [(0, True), (0, True), (0, True), (1, False), (0, False), (0, False), (0, True)]
    assert "00080060=CT" in stub.paths()[0]
    assert "00080020=" in stub.paths()[0]
    now[0] += 60
    stub.answers["/studies/1.2/series/1.2.3/instances"] = [
        (200, json.dumps([{"00080018": {"Value": ["1.2.3.4"]}}]).encode())
    ]
    (arrival,) = source.arrivals(None)
    series = source.series(arrival.place)
    assert (series.uid, series.modality, list(series.instances)) == ("1.2.3", "CT", ["1.2.3.4"])
    source.again()
    assert len(list(source.arrivals(None))) == 1
    place = series.instances["1.2.3.4"]
    kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=xy'}
    stub.answers[f"/{place}"] = [
        (200, b"--xy\r\nContent-Type: application/dicom\r\n\r\nDI\r\n\r\nCM\r\n--xy--\r\n", kind)
    ]
    source.fetch(place, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"DI\r\n\r\nCM"
    stub.answers[f"/{place}"] = [(200, b"--xy\r\nno end", kind)]
    with pytest.raises(RefusedError, match="do not fit"):
        source.fetch(place, tmp_path / "a")


def answer(content: Any) -> Any:
    return (200, json.dumps(content).encode())


def series_rows(*rows: Mapping[str, Any]) -> Any:
    return answer([{tag: {"Value": [value]} for tag, value in row.items()} for row in rows])


def instance_rows(*names: str) -> Any:
    return series_rows(*({"00080018": name} for name in names))


PLACE = "/studies/1.2/series/1.2.3"
GOOD = {"0020000D": "1.2", "0020000E": "1.2.3", "00201209": 3}


def test_pages_end_with_the_one_that_tells_nothing_new(stub: Stub) -> None:
    source = DicomWeb(server=client(stub), modalities=("CT",), settle=0)
    stub.answers["/series"] = [series_rows(GOOD)]  # knows no offset: the same page for ever
    assert [one.place for one in source.arrivals(None)] == [PLACE[1:]]
    for offset, names in ((0, ("1.1", "1.2")), (2, ("1.3",)), (3, ())):  # gives two at most, whatever was asked for
        stub.answers[f"{PLACE}/instances?limit=100&offset={offset}"] = [instance_rows(*names)]
    series = source.series(PLACE[1:])
    assert (list(series.instances), series.expected) == (["1.1", "1.2", "1.3"], 3)


def test_rows_that_make_no_sense_keep_no_other_waiting(stub: Stub, tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {**GOOD, "0020000E": "1.2.4 "},
        {**GOOD, "0020000E": "DOE^JOHN"},
        {**GOOD, "0020000E": "1.2.5", "0020000D": 7},
        {**GOOD, "0020000E": "1.2.6", "00201209": "many"},
        {**GOOD, "0020000E": "1.2.7", "00201209": float("inf")},
        {"0020000D": "1.2"},
    ]
    stub.answers["/series"] = [series_rows(*bad, GOOD)]
    stub.answers[f"{PLACE}/instances"] = [instance_rows("1.1", "1.2", "1.3")]
    for name in ("1.1", "1.2", "1.3"):
        stub.answers[f"{PLACE}/instances/{name}"] = [(200, b"no DICOM")]
    one = desk(DicomWeb(server=client(stub), modalities=("CT",), settle=0), tmp_path / "state")
    with Log(tmp_path / "log", quiet=True) as one.log:
        one.drain()
        one.drain()
    assert one.counts == {"rejected": 1, "skipped": 6}
    text = (tmp_path / "log").read_text()
    assert (text.count('"skipped"'), "1.2" in text, "DOE" in text) == (1, False, False)


def test_a_series_that_is_listed_in_part_is_not_done(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(pacs_sources.time, "monotonic", lambda: now[0])
    stub.answers["/series"] = [series_rows(GOOD)]
    stub.answers[f"{PLACE}/instances"] = [instance_rows("1.1", "1.2")]
    for name in ("1.1", "1.2", "1.3"):
        stub.answers[f"{PLACE}/instances/{name}"] = [(200, b"no DICOM")]
    state, settle = tmp_path / "state", 0.0
    source = DicomWeb(server=client(stub), modalities=("CT",), settle=settle)
    one = desk(source, state)
    one.once = True
    one.drain()
    assert one.counts == {"failed": 1}
    (record,) = records(state)
    assert (record["code"], record["reason"]) == ("archive", "the archive says 3 instances, and lists 2")
    # Without an end: it is asked again after a while, each time a longer one, and done when it is whole.
    one = desk(DicomWeb(server=client(stub), modalities=("CT",), settle=settle), state)
    asked = []
    for seconds in (0, 0.5, 0.6, 1.0, 2.1):
        now[0] += seconds
        one.drain()
        asked.append(stub.paths().count(f"{PLACE}/instances?limit=100&offset=0"))
    assert [count - asked[0] for count in asked] == [0, 0, 1, 1, 2]
    assert one.counts == {}
    stub.answers[f"{PLACE}/instances"] = [instance_rows("1.1", "1.2", "1.3")]
    now[0] += 10
    one.drain()
    assert one.counts == {"rejected": 1}


def desk(source: Any, state: Path, work: Any = None, **options: Any) -> pacs.Desk:
    memory = pacs.Memory(state)
    state.mkdir(exist_ok=True, mode=0o700)
    memory.prepare()
    work = work or (lambda *_: Exit.NOTHING_FOUND)
    log = Log(None, quiet=True)
    return pacs.Desk(source=source, memory=memory, work=work, log=log, modalities=("CT",), **options)


def records(state: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((state / "series").rglob("*.json"))]


def two_series(stub: Stub) -> Orthanc:
    """The first is that of ``orthanc``, of the second nothing is wrong but that it is no DICOM."""
    changes = [CHANGE, {**CHANGE, "ID": "ab-9", "Seq": 4}]
    second = {"MainDicomTags": {"SeriesInstanceUID": "1.2.9", "Modality": "CT"}}
    said = {"changes": {"Changes": changes, "Done": True, "Last": 4}, "series/ab-9": second}
    said |= {"series/ab-9/instances": [{"ID": "cd-9", "MainDicomTags": {"SOPInstanceUID": "1.2.9.4"}}]}
    return orthanc(stub, **said, **{"instances/cd-9/file": b"no DICOM", "instances/cd-2/file": b"no DICOM"})


@pytest.mark.parametrize("trouble", [(500, b""), (403, b""), (401, b""), (404, b""), (400, b""), None])
def test_one_instance_that_is_not_given_keeps_no_other_series_waiting(stub: Stub, tmp_path: Path, trouble: Any) -> None:
    source = two_series(stub)
    stub.answers["/instances/cd-2/file"] = [trouble]
    one = desk(source, tmp_path / "state")
    one.drain()
    assert (one.counts, one.memory.position(0)) == ({"failed": 1, "rejected": 1}, 4)
    assert sorted(record["code"] for record in records(tmp_path / "state")) == ["archive", "no-volume"]
    one.memory.move(0)
    one.drain()
    assert one.counts == {"failed": 1, "rejected": 1, "known": 2}


def test_dicomweb_is_probed_with_what_it_is_asked_anyway(stub: Stub, tmp_path: Path) -> None:
    source = DicomWeb(server=client(stub), modalities=("CT",), settle=0)
    stub.answers["/series"] = [series_rows({**GOOD, "00201209": 1})]
    stub.answers[f"{PLACE}/instances"] = [instance_rows("1.1")]
    stub.answers[f"{PLACE}/instances/1.1"] = [(500, b"")]
    one = desk(source, tmp_path / "state")
    one.drain()
    assert one.counts == {"failed": 1}
    asked, *probes = (path for path in stub.paths() if path.startswith("/series?") and not path.endswith("offset=1"))
    assert probes == [asked.replace("limit=100&offset=0", "limit=1")] * 2


def test_one_series_that_is_not_told_of_keeps_no_other_waiting(stub: Stub, tmp_path: Path) -> None:
    source = two_series(stub)
    stub.answers["/series/ab-1"] = [(500, b"")]
    one = desk(source, tmp_path / "state")
    one.drain()
    assert (one.counts, one.memory.position(0)) == ({"failed": 1, "rejected": 1}, 4)


@pytest.mark.parametrize(
    ("trouble", "kind"), [((500, b""), AwayError), ((403, b""), RunError), ((404, b""), AwayError)]
)
def test_an_archive_that_answers_nothing_else_either_is_in_trouble_itself(
    stub: Stub, tmp_path: Path, trouble: Any, kind: type[Exception]
) -> None:
    source = two_series(stub)
    stub.answers["/instances/cd-2/file"] = [(500, b"")]
    stub.answers["/changes?last"] = [answer({"Last": 4}), trouble]
    one = desk(source, tmp_path / "state")
    with pytest.raises(kind):
        one.drain()
    assert (one.counts, one.memory.position(0), records(tmp_path / "state")) == ({}, 0, [])


def test_an_archive_that_came_back_meanwhile_is_asked_once_more(stub: Stub, tmp_path: Path) -> None:
    source = two_series(stub)
    stub.answers["/instances/cd-2/file"] = [*[(503, b"")] * 4, (200, b"no DICOM")]
    one = desk(source, tmp_path / "state")
    one.drain()
    assert one.counts == {"rejected": 2}


def test_a_series_that_is_deleted_while_it_is_fetched_is_gone(stub: Stub, tmp_path: Path) -> None:
    source = two_series(stub)
    stub.answers["/instances/cd-2/file"] = [(404, b"")]
    stub.answers["/series/ab-1"] = [answer(SERIES), (404, b"")]
    one = desk(source, tmp_path / "state")
    one.drain()
    assert one.counts == {"gone": 1, "rejected": 1}


def batch_of(cases: Mapping[str, str]) -> Any:
    """A batch that makes a SEG with this UID of each case, and fails where there is none."""

    def work(_: Path, output: Path) -> Exit:
        store, made = Store(output), Made(input="", bundle="", settings="")
        store.prepare()
        for key, uid in cases.items():
            if not uid:
                store.refuse(key, made, CaseError("truncated", "half"), {})
                continue
            path = SegWriter(private=naming.private_folder(output)).path_of(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            seg = pydicom.Dataset()
            seg.SOPClassUID, seg.SOPInstanceUID, seg.SeriesInstanceUID = SegmentationStorage, f"{uid}.1", uid
            seg.file_meta = pydicom.dataset.FileMetaDataset()
            seg.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            seg.save_as(path, enforce_file_format=True)
            with store.stage(key) as folder:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                store.commit(key, folder, made, {"dicom_seg": {"sha256": digest}})
        return Exit.DONE

    return work


A, B = "case-" + 16 * "a", "case-" + 16 * "b"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in each series."""
    monkeypatch.setattr(pacs.Desk, "_keys", lambda one: {folder.name: [A, B] for folder in one.memory.inbox.iterdir()})


def storing(stub: Stub) -> Orthanc:
    return orthanc(stub, **{"instances/cd-2/file": b"x", "dicom-web/studies": STORED, "tools/lookup": []})


def removed(stub: Stub) -> list[bytes]:
    return sorted(body for _, path, _, body in stub.asked if path == "/tools/lookup")


@pytest.mark.usefixtures("cases")
def test_a_series_that_is_done_in_part_is_stored_and_not_done(stub: Stub, tmp_path: Path) -> None:
    source, state = storing(stub), tmp_path / "state"
    one = desk(source, state, batch_of({A: "1.5", B: ""}), again=True)
    one.drain()
    assert one.counts == {"rejected": 1}
    (record,) = records(state)
    assert (record["code"], record["stored"], record["superseded"]) == ("truncated", ["1.5"], [])
    one.memory.move(0)
    one.work = batch_of({A: "1.6", B: ""})  # which of the two the earlier SEG was of is not known: it stays
    one.drain()
    assert (records(state)[0]["superseded"], removed(stub)) == (["1.5"], [])
    one.memory.move(0)
    one.work = batch_of({A: "1.6", B: "1.7"})
    one.drain()
    (record,) = records(state)
    assert (record["status"], record["stored"], removed(stub)) == ("done", ["1.6", "1.7"], [b"1.5"])


@pytest.mark.usefixtures("cases")
@pytest.mark.parametrize("trouble", [(500, b""), (403, b""), (404, b"")])
def test_a_seg_that_is_not_taken_keeps_no_other_waiting(stub: Stub, tmp_path: Path, trouble: Any) -> None:
    source, state = storing(stub), tmp_path / "state"
    stub.answers["/dicom-web/studies"] = [(200, STORED), trouble]
    one = desk(source, state, batch_of({A: "1.5", B: "1.6"}))
    one.drain()
    (record,) = records(state)
    assert (record["status"], record["code"], record["stored"]) == ("failed", "not-stored", ["1.5"])
    assert (one.counts, one.memory.position(0)) == ({"failed": 1}, 3)


@pytest.mark.usefixtures("cases")
def test_another_model_does_a_series_again_and_takes_the_earlier_seg_away(stub: Stub, tmp_path: Path) -> None:
    source, state = storing(stub), tmp_path / "state"
    desk(source, state, batch_of({A: "1.5", B: "1.6"}), model={"bundle": "one"}).drain()
    for model, uids, counts in (("one", ("1.7", "1.8"), {"known": 1}), ("two", ("1.7", "1.8"), {"done": 1})):
        one = desk(source, state, batch_of(dict(zip((A, B), uids, strict=True))), model={"bundle": model})
        one.memory.move(0)
        one.drain()
        assert one.counts == counts
    assert removed(stub) == [b"1.5", b"1.6"]
    # The archive's failure with a late slice does not let it forget what it had stored.
    rows = [ROW, {"ID": "cd-3", "MainDicomTags": {"SOPInstanceUID": "1.2.3.5"}}]
    stub.answers["/series/ab-1/instances"] = [answer(rows)]
    one.memory.move(0)
    one.drain()
    (record,) = records(state)
    assert (record["code"], record["stored"]) == ("archive", ["1.7", "1.8"])


def test_an_archive_that_stays_away_is_asked_for_ever(tmp_path: Path) -> None:
    class Away(Orthanc):
        def arrivals(self, position: Any) -> Any:
            raise GoneError("the archive answers 404")

    class EndError(Exception):
        pass

    paused: list[float] = []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 1100:
            raise EndError

    with pytest.raises(EndError):
        desk(Away(server=Server(url="http://127.0.0.1:9")), tmp_path / "state").follow(5.0, sleep)
    assert paused[-1] == 300


def test_what_is_no_volume_is_said_once(stub: Stub, tmp_path: Path) -> None:
    source = orthanc(stub, **{"instances/cd-2/file": b"no DICOM"})
    one = desk(source, tmp_path / "state")
    one.drain()
    assert one.counts == {"rejected": 1}
    assert one.memory.position(0) == 3
    one.memory.move(0)
    one.drain()
    assert one.counts == {"rejected": 1, "known": 1}
    names = [path.name for path in (tmp_path / "state").rglob("*")]
    assert not any("1.2.3" in name for name in names)
    assert [path.stat().st_mode & 0o077 for path in (tmp_path / "state", tmp_path / "state" / "in")] == [0, 0]


def test_a_batch_that_cannot_go_on_moves_nothing(stub: Stub, tmp_path: Path) -> None:
    source = orthanc(stub, **{"instances/cd-2/file": b"x"})
    one = desk(source, tmp_path / "state", lambda *_: Exit.OUTPUT)
    for _ in range(2):
        with pytest.raises(RunError, match="could not go on"):
            one.drain()
    assert one.memory.position(0) == 0
    assert stub.paths().count("/instances/cd-2/file") == 1  # what was fetched is kept


def test_the_archive_may_go_away_and_come_back(stub: Stub, tmp_path: Path) -> None:
    source = orthanc(stub)
    one = desk(source, tmp_path / "state")
    stub.answers["/changes"] = [(503, b"")] * 8 + [(404, b"")]
    paused: list[float] = []

    class EndError(Exception):
        pass

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            orthanc(stub, changes={"Changes": [], "Done": True, "Last": 0})
        if len(paused) == 5:
            raise EndError

    stub.answers["/changes"] = [(503, b"")]
    with pytest.raises(EndError):
        one.follow(5, sleep)
    assert paused == [10, 20, 40, 5, 5]


def invoke(url: str, state: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["pacs", url, str(state), *words], env={pacs_http.PASSWORD: SECRET})


def test_the_command_ends_politely(stub: Stub, tmp_path: Path) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    words = ["-b", str(bundle), "--trust-bundle", "--workers", "0", "--modality", "CT", "--tries", "1", "--poll", "0.1"]
    orthanc(stub, changes={"Changes": [], "Done": True, "Last": 0})
    state = tmp_path / "state"
    assert invoke(stub.url, state, *words, "--once").exit_code == 0
    asked = len(stub.asked)

    def end() -> None:
        while len(stub.asked) < asked + 2:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    result = invoke(stub.url, state, *words, "--poll", "30")  # it sleeps then
    assert (result.exit_code, "the same command goes on" in result.output) == (143, True)
    with hold(state / "lock"):
        assert invoke(stub.url, state, *words, "--once").exit_code == 7
    result = invoke("http://127.0.0.1:9", tmp_path / "other", *words, "--once")
    assert (result.exit_code, "cannot be reached" in result.output) == (5, True)
    result = invoke("http://127.0.0.1:9", state, *words, "--once")
    assert (result.exit_code, "STATE is that of another URL" in result.output) == (2, True)
    state.chmod(0o750)
    result = invoke(stub.url, state, *words, "--once")
    assert (result.exit_code, "(chmod 700)" in result.output) == (2, True)
    state.chmod(0o700)
    stub.answers["/changes"] = [(404, b"")]
    result = invoke(stub.url, state, *words, "--once")
    assert (result.exit_code, "the archive answers 404" in result.output) == (5, True)
    for more, why in (
        (["--attack", "pgd"], "does not attack"),
        (["--dicom-seg", "none"], "expected --dicom-seg binary or labelmap"),
    ):
        result = invoke(stub.url, state, *words, *more)
        assert (result.exit_code, why in result.output) == (2, True)
    (tmp_path / "file").touch()
    result = invoke(stub.url, tmp_path / "file" / "state", *words, "--once")
    assert (result.exit_code, "STATE cannot be made" in result.output) == (6, True)
    result = invoke(stub.url, state, "-b", str(bundle))
    assert (result.exit_code, "expected --modality" in result.output) == (2, True)
    assert SECRET not in (state / "pacs.jsonl").read_text()


def test_what_the_command_asks_for_is_known_before_it_connects(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle.make(tmp_path / "bundle")
    words = ["-b", str(bundle), "--trust-bundle", "--once"]
    for wrong in ("ct", "SEG"):
        result = invoke(stub.url, tmp_path / "state", *words, "--modality", wrong)
        assert (result.exit_code, f"expected --modality CT, MR, PT or any, got {wrong}" in result.output) == (2, True)
    assert (stub.asked, (tmp_path / "state").exists()) == ([], False)
    told: list[Any] = []

    def run(_: Path, options: Mapping[str, Any], **more: Any) -> Exit:
        assert options["modality"] == list(more["modalities"])
        told.append((more["modalities"], more["model"]))
        return Exit.DONE

    monkeypatch.setattr(pacs_command, "_run", run)
    for more in (["--modality", "any"], ["--modality", "CT"], ["--modality", "CT", "--dicom-seg", "labelmap"]):
        assert invoke(stub.url, tmp_path / "state", *words, *more).exit_code == 0
    with (bundle / "models" / "model.pt").open("ab") as file:
        file.write(b"other")
    assert invoke(stub.url, tmp_path / "state", *words, "--modality", "CT").exit_code == 0
    assert [modalities for modalities, _ in told] == [("CT", "MR", "PT"), ("CT",), ("CT",), ("CT",)]
    assert len({json.dumps(model) for _, model in told}) == 4
    about = {"network_data_format": {"inputs": {"image": {"modality": "US"}}}}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(about))
    result = invoke(stub.url, tmp_path / "state", *words)
    assert (result.exit_code, "names none of these" in result.output) == (2, True)
