"""Check that malformed input gives a result or one clear error, in bounded time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sspruner

SECONDS = 20  # for any one case; good input takes a tenth of one


@contextmanager
def bounded() -> Iterator[None]:
    """The block ends in time, or fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still at work after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(call: Callable[[], Any]) -> BaseException | None:
    """The call returns, or raises an error that the command line prints as one line; that error."""
    with bounded():
        try:
            call()
        except sspruner.SSPrunerError as error:
            found = error
        else:
            return None
    assert 0 < len(str(found)) < 2000
    return found
