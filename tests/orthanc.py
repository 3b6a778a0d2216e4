"""A real Orthanc, for tests only, in a network of its own: nothing outside this machine's loopback can reach it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = "/usr/sbin/Orthanc"
PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
URL, USER, PASSWORD = "http://127.0.0.1:18042", "reader", "canary-secret"
NEW_NETWORK = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def network() -> Iterator[None]:
    """Put this thread, and the processes that it starts, into a network with nothing but a loopback.

    Raises:
        OSError: the system does not allow it.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if LIBC.unshare(NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            if LIBC.setns(before, NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(before)


def missing() -> str:
    """Why it cannot run here; empty if it can."""
    if not (shutil.which(BINARY) and Path(PLUGIN).exists()):
        return "no Orthanc (apt-get install orthanc orthanc-dicomweb)"
    if not shutil.which("ip"):
        return "no ip (apt-get install iproute2)"
    try:
        with network():
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "no right to make a network namespace"


class Orthanc:
    """A server with its files in ``folder``, which survive it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.process = folder, None
        self.config = folder / "orthanc.json"
        settings: dict[str, Any] = {"Name": "test", "StorageDirectory": str(folder / "db")}
        settings |= {"IndexDirectory": str(folder / "db"), "HttpPort": 18042, "DicomPort": 14242, "StableAge": 1}
        settings |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": True, "OverwriteInstances": False}
        settings |= {"RegisteredUsers": {USER: PASSWORD}, "Plugins": [PLUGIN]}
        self.config.write_text(json.dumps(settings))

    process: subprocess.Popen[bytes] | None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([BINARY, str(self.config)], stdout=log, stderr=log)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                self.ask("system")
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.05)
        raise AssertionError("Orthanc did not start")

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def ask(self, path: str, body: bytes | None = None, method: str | None = None) -> Any:
        request = urllib.request.Request(f"{URL}/{path}", data=body, method=method)
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, URL, USER, PASSWORD)
        opener = urllib.request.build_opener(
            urllib.request.HTTPBasicAuthHandler(manager), urllib.request.ProxyHandler({})
        )
        with opener.open(request, timeout=10) as answer:
            return json.loads(answer.read())

    def upload(self, files: list[Path]) -> None:
        for path in files:
            self.ask("instances", path.read_bytes())

    def wait_until_stable(self) -> None:
        until = time.monotonic() + 20
        while not all(self.ask(f"series/{one}")["IsStable"] for one in self.ask("series")):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(0.3)  # the change is written after that

    def segs(self) -> list[dict[str, Any]]:
        """Every SEG instance: its series, its study, and where its file is."""
        found = []
        for one in self.ask("series"):
            about = self.ask(f"series/{one}")
            if about["MainDicomTags"]["Modality"] == "SEG":
                found += [{"id": instance, "study": about["ParentStudy"]} for instance in about["Instances"]]
        return found

    def file(self, instance: str) -> bytes:
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, URL, USER, PASSWORD)
        opener = urllib.request.build_opener(
            urllib.request.HTTPBasicAuthHandler(manager), urllib.request.ProxyHandler({})
        )
        with opener.open(f"{URL}/instances/{instance}/file", timeout=10) as answer:
            content: bytes = answer.read()
            return content
