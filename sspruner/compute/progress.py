"""Progress on standard error: bars in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]  # (phase, done, total)

EVERY = 10.0  # seconds between lines


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Yield a callback unchanged, for True one that draws bars, and None for False and None."""
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        with bars() as callback:
            yield callback
    else:
        yield None


@contextmanager
def bars() -> Iterator[Progress]:
    """Show a progress bar on standard error; lines instead if that is not a terminal.

    Yields the callback that the Python API takes as `progress`. Of several processes the first shows it.
    """
    from sspruner.compute.processes import rank

    console = _console()
    if rank() > 0 or not console.is_terminal:
        with lines(shown=rank() == 0) as report:
            yield report
        return
    with _bar(console=console, transient=True) as bar:
        yield _report_to(bar)


@contextmanager
def live_table(draw: Callable[[Any], Any]) -> Iterator[tuple[Progress, Callable[[Any], None]]]:
    """Show a progress bar below a table that grows, on standard error; lines instead if that is not a terminal.

    Yields the callbacks that the Python API takes as `progress` and `on_row`; `draw` makes a rich renderable of what
    `on_row` gets.
    """
    from rich.console import Group
    from rich.live import Live

    console = _console()
    if not console.is_terminal:
        with lines() as report:
            yield report, lambda rows: None
        return
    bar = _bar()
    report = _report_to(bar)
    with Live(bar, console=console, transient=True) as live:
        yield report, lambda rows: live.update(Group(draw(rows), bar))


@contextmanager
def lines(shown: bool = True) -> Iterator[Progress]:
    """Print what is being done to standard error every EVERY seconds, for logs and pipes."""
    began, state, ended, stream = time.monotonic(), ["working"], threading.Event(), sys.stderr

    def report(phase: str, done: int, total: int) -> None:
        state[0] = f"{phase}, {done:,} of {total:,}" if total else phase

    def speak() -> None:
        while not ended.wait(EVERY):
            print(f"{state[0]}, {time.monotonic() - began:.0f} s", file=stream, flush=True)

    speaker = threading.Thread(target=speak, daemon=True)
    if shown:
        speaker.start()
    try:
        yield report
    finally:
        ended.set()
        if shown:
            speaker.join()


def _console() -> Any:
    """Return the console of standard error."""
    from rich.console import Console

    return Console(stderr=True)


def _bar(**options: Any) -> Any:
    """Return a bar with the phase, the part that is done, and the time that remains."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), **options)


def _report_to(bar: Any) -> Progress:
    """Return the callback that draws on a bar."""
    task = bar.add_task("working", total=None)
    return lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total)
