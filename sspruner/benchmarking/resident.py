"""Resident memory of this process and its peak, where the system tells: on Linux."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start() -> int | None:
    """Bytes that are resident now; the peak is counted from here on. None where the system does not tell.

    What was freed before goes back to the system first, so that it is not memory that the next job gets for nothing.
    That costs the next job page faults: time nothing between this and `peak`.
    """
    with suppress(AttributeError, OSError, TypeError):  # TypeError: no C library by that name, on Windows
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    try:
        CLEAR.write_text("5", encoding="ascii")
        return _bytes("VmRSS")
    except (OSError, LookupError):
        return None


def peak() -> int:
    """The most bytes that were resident at a time since `start`, which has to have worked."""
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    """Raises LookupError if the system does not list it."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)
