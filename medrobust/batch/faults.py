"""Why a case ends early, in words that fit every log: no path, no name, nothing of the file's free text."""

from __future__ import annotations

import enum
import errno
import traceback


class CaseError(ValueError):
    """A case cannot go on.

    Attributes:
        code: a short word that never changes its meaning, such as ``truncated``.
        message: what was expected, what came; numbers and fixed words only.
        kind: ``"rejected"`` where the file is at fault, ``"failed"`` where the work on it broke down.
    """

    def __init__(self, code: str, message: str, *, kind: str = "rejected") -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.kind = code, message, kind

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self.code, self.message, self.kind)


def _restore(code: str, message: str, kind: str) -> CaseError:
    return CaseError(code, message, kind=kind)


class Exit(enum.IntEnum):
    """What the command's exit code says."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    SOME_FAILED = 3
    NOTHING_FOUND = 4
    INPUT = 5
    OUTPUT = 6
    HELD = 7
    INTERRUPTED = 130
    TERMINATED = 143


class RunError(Exception):
    """The whole run cannot go on."""

    def __init__(self, exit_code: Exit, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


TRANSIENT = ("killed", "memory", "disk-full", "changed")
"""Codes of failures that another try may not meet."""

FULL = (errno.ENOSPC, errno.EDQUOT)


def fault_of(error: BaseException) -> CaseError:
    """Any exception as a fault. Its text is left out, since libraries put paths in it; its type and place are kept."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    for one in seen:
        if isinstance(one, CaseError):
            return one
        if isinstance(one, OSError) and one.errno in FULL:
            return CaseError("disk-full", "no space is left in OUTPUT", kind="failed")
        if isinstance(one, OSError) and one.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return CaseError("no-access", f"the system refused: {errno.errorcode[one.errno or 0]}", kind="failed")
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" or _says_memory(one):
            return CaseError("memory", "the case needs more memory than there is", kind="failed")
    root = seen[-1]
    frames = traceback.extract_tb(root.__traceback__)
    where = f" in {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
    return CaseError("error", f"{type(root).__name__}{where}; its text is in the private folder", kind="failed")


def _says_memory(error: BaseException) -> bool:
    """Torch's CPU allocator has no exception of its own."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
