"""Names of cases: stable, free of patient data, never alike, never outside OUTPUT.

A case is called ``case-`` and the first 16 hex digits of HMAC-SHA256(secret, path below INPUT, as it is on the disk).
Nothing of the path is in the name, and without the secret nobody can try out paths to find it. The same path has the
same name in every run with that secret, whatever else lies in the tree. The secret, and the table that says which name
is which path, are patient data: they are in a folder of their own beside OUTPUT, ``OUTPUT.private`` (mode 0700).
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from medrobust.atomic import replacing
from medrobust.batch.faults import Exit, RunError
from medrobust.batch.locks import hold

KEY = re.compile(r"case-[0-9a-f]{16}")
SECRET, NAMES, DETAILS = "secret", "names.csv", "details"


def case_key(secret: bytes, relative: str) -> str:
    """The name of the file at ``relative`` below INPUT."""
    digest = hmac.new(secret, os.fsencode(relative), hashlib.sha256).hexdigest()
    return f"case-{digest[:16]}"


def name_all(secret: bytes, relatives: Iterable[str]) -> dict[str, str]:
    """Name -> path below INPUT.

    Raises:
        RunError: two paths have one name (one in 10^9 for 100,000 cases): nothing is done then.
    """
    found: dict[str, str] = {}
    for relative in relatives:
        key = case_key(secret, relative)
        if found.setdefault(key, relative) != relative:
            raise RunError(Exit.USAGE, f"two inputs would share the name {key}: choose another --private folder")
    return found


def folder_of(cases: Path, key: str) -> Path:
    """The folder of a case, which lies in ``cases``.

    Raises:
        ValueError: the name is not one that :func:`case_key` gave.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"expected a name such as case-0123456789abcdef, got {key!r}")
    return cases / key


def private_folder(output: Path, chosen: Path | None = None) -> Path:
    """Where patient data may be kept, made when missing.

    Raises:
        RunError: it lies in OUTPUT, or cannot be made.
    """
    folder = chosen or output.with_name(output.name + ".private")
    if folder.resolve() == output.resolve() or output.resolve() in folder.resolve().parents:
        raise RunError(Exit.USAGE, "expected --private outside OUTPUT: OUTPUT holds no patient data")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / DETAILS).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise RunError(
            Exit.OUTPUT, f"the folder beside OUTPUT cannot be made: {error.strerror}: pass --private"
        ) from None
    return folder


def secret_of(private: Path) -> bytes:
    """The secret in the private folder, drawn when there is none; two runs that begin at once get the same."""
    path = private / SECRET
    if not path.exists():
        partial = private / f".{SECRET}-{os.getpid()}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # the first one stays
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    found = path.read_text(encoding="ascii").strip()
    if len(found) < 32:
        raise RunError(Exit.USAGE, "expected a secret of at least 32 characters in the private folder")
    return found.encode("ascii")


def bind(state: Path, secret: bytes) -> None:
    """Tie OUTPUT to its secret: with another one every case would be done again under another name.

    Raises:
        RunError: OUTPUT is tied to another.
    """
    path, proof = state / "names", hmac.new(secret, b"medrobust batch", hashlib.sha256).hexdigest()
    if not path.exists():
        partial = state / f".names-{os.getpid()}"
        partial.write_text(proof, encoding="ascii")
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    if path.read_text(encoding="ascii") != proof:
        raise RunError(
            Exit.USAGE,
            "the names in OUTPUT were made with another secret: pass the --private folder that it was made with",
        )


def keep_names(private: Path, names: Mapping[str, str]) -> None:
    """Add names to the table in the private folder; two runs at once lose none."""
    path = private / NAMES
    with hold(private / ".lock", wait=60.0):
        known = {}
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                known = {row["case"]: row["path"] for row in csv.DictReader(file)}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(["case", "path"])
        writer.writerows(sorted({**known, **names}.items()))
        with replacing(path) as partial:
            partial.touch(mode=0o600)
            partial.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))
