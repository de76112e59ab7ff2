"""Resident memory of this process and its peak, on Linux."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start() -> int | None:
    """Return the bytes that are resident now, and reset the peak. None where the system does not report it.

    Freed memory is first returned to the system, so that it does not count as memory that the next job gets for free.
    The next job pays for it with page faults: do not measure time between this call and `peak`.
    """
    with suppress(AttributeError, OSError, TypeError):  # TypeError: no C library by that name, on Windows
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    try:
        CLEAR.write_text("5", encoding="ascii")
        return _bytes("VmRSS")
    except (OSError, LookupError):
        return None


def peak() -> int:
    """Return the peak of resident bytes since `start`, which must have succeeded."""
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes. Raises LookupError if the system does not list it."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)
