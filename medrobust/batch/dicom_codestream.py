"""Compressed frames are seen to be whole, and of the size that the header says, before a decoder makes room."""

from __future__ import annotations

import struct

from pydicom.encaps import generate_frames

from medrobust.batch.faults import CaseError

END = b"\xff\xd9"
"""What a frame of the JPEG family ends with."""
LENGTHLESS = (0x01, *range(0xD0, 0xD9))
NO_SIZE = (0xC4, 0xC8, 0xCC)


def check(pixels: bytes, rows: int, columns: int, frames: int) -> None:
    """Look at the frames of JPEG, JPEG-LS and JPEG 2000 pixel data.

    Raises:
        CaseError: one is cut, has another size, or they are fewer or more than ``frames``.
    """
    count = 0
    for frame in generate_frames(pixels, number_of_frames=frames):
        if not frame.rstrip(b"\0").endswith(END):
            raise CaseError("truncated", "a compressed slice ends before its end mark")
        if size_of(frame) != (rows, columns):
            raise CaseError("bad-dicom", f"expected compressed slices of {rows} rows and {columns} columns")
        count += 1
    if count != frames:
        raise CaseError("truncated", f"expected {frames} frames, got {count}")


def size_of(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a frame says of itself; ``None`` where it does not."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 256)
    if start >= 0 and len(frame) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF or marker in LENGTHLESS:
            place += 1 if marker == 0xFF else 2
        elif (0xC0 <= marker <= 0xCF and marker not in NO_SIZE) or marker == 0xF7:
            rows, columns = struct.unpack_from(">2H", frame, place + 5)
            return rows, columns
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
