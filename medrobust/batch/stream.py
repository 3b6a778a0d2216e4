"""The bytes of a file that nobody trusts: regular files only, archives to their checksum, a bounded part at a time."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib

from medrobust.batch.faults import CaseError

PORTION, CHUNK = 1 << 18, 1 << 22
"""Bytes taken from the disk, and bytes decompressed, at a time."""


class Stream:
    """The uncompressed bytes of a file, never more at a time than were asked for; hashes what is on the disk."""

    def __init__(self, path: str | os.PathLike[str], *, sniff: bool = True) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except (OSError, ValueError) as error:
            raise CaseError(
                "unreadable", f"the file cannot be opened ({type(error).__name__})", kind="failed"
            ) from None
        try:
            self.file = os.fdopen(descriptor, "rb", buffering=0)
        except IsADirectoryError:
            os.close(descriptor)
            raise CaseError("not-a-file", "expected a regular file, got a folder") from None
        try:
            self.before = os.fstat(self.file.fileno())
            if not stat.S_ISREG(self.before.st_mode):
                raise CaseError("not-a-file", "expected a regular file, got a pipe or a device")
            self.size = self.before.st_size
            self.digest = hashlib.sha256()
            self.taken = 0
            self.warnings: list[str] = []
            self.pending = self._raw() if sniff else b""
            if sniff and not self.pending:
                raise CaseError("empty", "the file has no bytes")
            self.inflater = zlib.decompressobj(31) if self.pending[:2] == b"\x1f\x8b" else None
            if sniff and (self.inflater is not None) != str(path).lower().endswith(".gz"):
                was = "compressed" if self.inflater else "not compressed"
                raise CaseError("misnamed", f"the file is {was}, which its ending does not say: rename it")
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _raw(self) -> bytes:
        try:
            chunk = self.file.read(PORTION) or b""
        except OSError as error:
            raise CaseError("unreadable", f"the disk reports an error ({error.errno})", kind="failed") from None
        self.digest.update(chunk)
        self.taken += len(chunk)
        return chunk

    def drain(self) -> None:
        """Read what is left, for its hash."""
        while self._raw():
            pass

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes; none at the end.

        Raises:
            CaseError: a compressed stream that is cut or damaged.
        """
        if self.inflater is None:
            self.pending = self.pending or self._raw()
            found, self.pending = self.pending[:count], self.pending[count:]
            return found
        while True:
            if self.inflater.eof and not self._next_member():
                return b""
            try:
                found = self.inflater.decompress(self.pending, count)
            except zlib.error:
                raise CaseError("corrupt", "the compressed stream is damaged or its checksum is wrong") from None
            self.pending = self.inflater.unconsumed_tail
            if found:
                return found
            if not self.inflater.eof and not self.pending:
                self.pending = self._raw()
                if not self.pending:
                    raise CaseError("truncated", "the compressed stream ends before its end mark")

    def _next_member(self) -> bool:
        """Several gzip streams in one file are one; anything else behind the last is garbage."""
        assert self.inflater is not None
        rest = self.inflater.unused_data
        while len(rest) < 2 and (more := self._raw()):
            rest += more
        if rest[:2] == b"\x1f\x8b":
            self.inflater, self.pending = zlib.decompressobj(31), rest
            return True
        if rest and "trailing-garbage" not in self.warnings:
            self.warnings.append("trailing-garbage")
        self.drain()
        return False

    def exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self.read(count - len(found))
            if not piece:
                raise CaseError("truncated", f"expected {count} bytes of header, got {len(found)}")
            found += piece
        return found

    def skip(self, count: int) -> None:
        while count > 0:
            piece = self.read(min(count, CHUNK))
            if not piece:
                raise CaseError("truncated", "the file ends before its voxels begin")
            count -= len(piece)

    def check_unchanged(self) -> None:
        now = os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns) or self.taken != self.size:
            raise CaseError("changed", "the file was written to while it was read", kind="failed")
