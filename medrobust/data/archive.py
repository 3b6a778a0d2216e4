"""Fetch a pinned source archive from the package index, once, and take single files out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from medrobust.atomic import replacing
from medrobust.hashing import sha256_of_file


def cache_folder() -> Path:
    """The user's cache folder for medrobust; the environment variable ``MEDROBUST_CACHE`` overrides it."""
    chosen = os.environ.get("MEDROBUST_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("medrobust")


@dataclass(frozen=True, kw_only=True)
class SourceArchive:
    """A source distribution on the package index, pinned by version and sha256.

    Attributes:
        name: project name on the index.
        version: exact version.
        sha256: hex digest of the ``.tar.gz``; anything else is refused before it is opened or built.
    """

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"

    def fetch(self, folder: Path) -> Path:
        """Download the archive with pip into ``folder`` unless it is there already; return its path.

        pip is used because it knows the user's index, proxy and certificates. It checks the hash before anything
        in the archive is read.

        Raises:
            ConnectionError: pip could not fetch it, or the file's hash is not the pinned one.
        """
        target = folder / self.file_name
        if target.is_file() and sha256_of_file(target) == self.sha256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
            pins = Path(work) / "requirements.txt"
            pins.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", self.name]
            command += ["--require-hashes", "--dest", work, "--requirement", str(pins)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
            fetched = Path(work) / self.file_name
            if done.returncode or not fetched.is_file():
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ConnectionError(
                    f"expected pip to download {self.name} {self.version} (sha256 {self.sha256[:12]}), got: {reason}."
                    f" Check the network, or put {self.file_name} into {folder} by hand"
                )
            os.replace(fetched, target)
        return target


def extract(archive: Path, members: dict[str, Path]) -> None:
    """Copy single regular files out of a ``.tar.gz``: ``members`` maps a path inside it to where it goes.

    Nothing is written outside the named places, whatever the archive says, and each file appears whole or not at all.

    Raises:
        ValueError: a member is missing or no regular file.
    """
    left = {str(PurePosixPath(inside)): place for inside, place in members.items()}
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            place = left.get(entry.name)
            if place is None:
                continue
            stream = tar.extractfile(entry) if entry.isreg() else None
            if stream is None:
                raise ValueError(f"expected a regular file {entry.name} in {archive.name}, got another kind of entry")
            with replacing(place) as partial:
                partial.write_bytes(stream.read())
            del left[entry.name]
    if left:
        raise ValueError(f"expected {sorted(left)} in {archive.name}, got an archive without: was it altered?")
