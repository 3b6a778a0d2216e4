"""Talk to an archive over HTTP: patient, and never telling more than is needed.

TLS certificates are verified. Credentials go to the one host that was named: redirects are not followed, proxies of the
environment are not used, and plain HTTP is refused but for this machine. What is said of an error holds fixed words and
numbers, no address, no UID and no credentials.
"""

from __future__ import annotations

import base64
import errno
import http.client
import netrc
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medrobust.batch.faults import Exit, RunError

USER, PASSWORD, TOKEN = "MEDROBUST_PACS_USER", "MEDROBUST_PACS_PASSWORD", "MEDROBUST_PACS_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another try may not meet."""
AWAY = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET)
"""Errors of the network that Python has no class for; any other may be the disk's."""
LARGEST_ANSWER = 1 << 28
LARGEST_INSTANCE = 1 << 33
LONGEST_PAUSE = 60.0


class GoneError(Exception):
    """The archive does not have it (any more)."""


class AwayError(Exception):
    """The archive cannot be reached, or is in trouble, after all tries."""


class RefusedError(Exception):
    """The archive does not want this request, however often it comes."""


class DeniedError(RunError):
    """The archive refuses the credentials: for all that it has, or for one study."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One archive.

    Args:
        url: of its root, without credentials.
        headers: sent each time, such as the credentials.
        timeout: seconds without a byte.
        tries: how often a request is made that fails in passing.
        pause: seconds before the second try; each further one waits twice as long.
        context: of TLS.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 30.0
    tries: int = 5
    pause: float = 1.0
    context: ssl.SSLContext | None = field(default=None, repr=False)

    def get(self, path: str, accept: str = "application/json") -> bytes:
        """The body of an answer."""
        return self._ask("GET", path, {"Accept": accept})

    def post(self, path: str, body: bytes, kind: str, accept: str = "application/json") -> bytes:
        """Send ``body``; it may arrive twice, where an answer is lost."""
        return self._ask("POST", path, {"Accept": accept, "Content-Type": kind}, body)

    def delete(self, path: str) -> None:
        """Take away what is there; nothing happens if it is gone."""
        try:
            self._ask("DELETE", path, {})
        except GoneError:
            return

    def save(self, path: str, target: Path, accept: str = "application/dicom") -> str:
        """Write the body of an answer to a file; returns its content type."""

        def take(answer: Any) -> str:
            with target.open("wb") as file:
                shutil.copyfileobj(_Limited(answer, LARGEST_INSTANCE), file, 1 << 20)
            _whole(answer, target.stat().st_size)
            return str(answer.headers.get("Content-Type", ""))

        found: str = self._try("GET", path, {"Accept": accept}, None, take)
        return found

    def _ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> bytes:
        def take(answer: Any) -> bytes:
            content = _Limited(answer, LARGEST_ANSWER).read()
            _whole(answer, len(content))
            return content

        found: bytes = self._try(method, path, headers, body, take)
        return found

    def _try(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, take: Any) -> Any:
        """One request, as often as it makes sense.

        Raises:
            AwayError, DeniedError, GoneError, RefusedError: see there.
            RunError: its certificate is not trusted.
        """
        request = urllib.request.Request(
            f"{self.url}/{path.lstrip('/')}", data=body, headers={**self.headers, **headers}, method=method
        )
        why = ""
        for number in range(self.tries):
            if number:
                time.sleep(min(self.pause * 2 ** (number - 1), LONGEST_PAUSE))
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return take(answer)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (401, 403):
                    raise DeniedError(
                        Exit.USAGE, f"the archive refuses these credentials ({error.code}): set {USER} and {PASSWORD}"
                    ) from None
                if error.code in (404, 410):
                    raise GoneError(f"the archive answers {error.code}") from None
                if error.code not in PASSING:
                    raise RefusedError(f"the archive answers {error.code}") from None
                why = f"it answers {error.code}"
            except ssl.SSLCertVerificationError:
                raise _untrusted() from None
            except urllib.error.URLError as error:
                if isinstance(error.reason, ssl.SSLCertVerificationError):
                    raise _untrusted() from None
                why = _word(error.reason)
            except (TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError) as error:
                why = _word(error)
            except OSError as error:
                if error.errno not in AWAY:
                    raise
                why = errno.errorcode[error.errno or 0]
        raise AwayError(f"the archive cannot be reached: {why}, tried {self.tries} times")

    @property
    def _opener(self) -> urllib.request.OpenerDirector:
        made = urllib.request.OpenerDirector()
        secure = urllib.request.HTTPSHandler(context=self.context or ssl.create_default_context())
        for one in (urllib.request.HTTPHandler(), secure, urllib.request.HTTPErrorProcessor(), _NoRedirect()):
            made.add_handler(one)
        made.add_handler(urllib.request.HTTPDefaultErrorHandler())
        return made


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Credentials would be sent to whatever place an answer names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Limited:
    """A stream that ends with an error where it is longer than anybody meant."""

    def __init__(self, stream: Any, most: int) -> None:
        self.stream, self.left = stream, most

    def read(self, size: int = -1, /) -> bytes:
        found: bytes = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise RefusedError("an answer is larger than is believed")
        return found


def _whole(answer: Any, size: int) -> None:
    """A stream of which a part is read ends in silence where the connection does."""
    expected = answer.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and int(expected) != size:
        raise http.client.IncompleteRead(b"")


def connect(
    url: str, credentials: Path | None = None, authority: Path | None = None, *, plain: bool = False, **settings: Any
) -> Server:
    """An archive, with the credentials of a netrc file, or of the environment, which are taken out of it.

    Args:
        credentials: the file; where there is one, the environment's are not used.
        authority: certificates (PEM) to trust instead of the system's.
        plain: allow HTTP without TLS to another machine.

    Raises:
        RunError: the address or the file is none, or others may read the file.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RunError(Exit.USAGE, "expected URL such as https://archive.example:8042")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RunError(Exit.USAGE, f"expected no credentials or query in URL: set {USER} and {PASSWORD}")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not plain:
        raise RunError(
            Exit.USAGE, "expected https, got http to another machine: --plain-http sends patient data openly"
        )
    headers = {}
    name, word, token = (os.environ.pop(one, "") for one in (USER, PASSWORD, TOKEN))
    if credentials is not None:
        (name, word), token = _from_file(credentials, parts.hostname), ""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif name:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode("ascii")
    if any("\n" in value or "\r" in value for value in headers.values()):
        raise RunError(Exit.USAGE, "expected credentials of one line")
    try:
        context = ssl.create_default_context(cafile=str(authority) if authority else None)
    except (OSError, ssl.SSLError):
        raise RunError(Exit.USAGE, "expected certificates in PEM as --ca") from None
    return Server(url=url.rstrip("/"), headers=headers, context=context, **settings)


def _from_file(path: Path, host: str) -> tuple[str, str]:
    try:
        if path.stat().st_mode & 0o077:
            raise RunError(Exit.USAGE, "expected a --credentials file that only its owner may read (chmod 600)")
        found = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        raise RunError(
            Exit.USAGE, "expected --credentials as a netrc file: machine HOST login NAME password WORD"
        ) from None
    if found is None:
        raise RunError(Exit.USAGE, "the --credentials file has no line for the host of URL")
    return found[0], found[2] or ""


def _untrusted() -> RunError:
    return RunError(Exit.USAGE, "the archive's certificate is not trusted: pass its authority's as --ca")


def _word(error: Any) -> str:
    return type(error).__name__ if isinstance(error, BaseException) else "no connection"
