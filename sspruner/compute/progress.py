"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]  # phase, done, total


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show a progress bar on standard error, if that is a terminal; of several processes the first shows one.

    Yields the callback that long-running functions take as `progress`.
    """
    from rich.console import Console

    from sspruner.compute.processes import rank

    console = Console(stderr=True)
    with _columns(console=console, transient=True, disable=rank() > 0 or not console.is_terminal) as bar:
        yield _report_to(bar)


@contextmanager
def live_table(draw: Callable[[Any], Any]) -> Iterator[tuple[Report, Callable[[Any], None]]]:
    """Show a progress bar below a growing table on standard error, if that is a terminal.

    Yields the callbacks that long-running functions take as `progress` and `on_row`; `draw` makes a rich renderable of
    what `on_row` gets.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda phase, done, total: None, lambda rows: None
        return
    bar = _columns()
    report = _report_to(bar)
    with Live(bar, console=console, transient=True) as live:
        yield report, lambda rows: live.update(Group(draw(rows), bar))


def _columns(**options: Any) -> Any:
    """A rich progress display: description, bar, percentage, remaining time."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, **options)


def _report_to(bar: Any) -> Report:
    """A callback that shows phase, done and total as the one task of a progress display."""
    task = bar.add_task("working", total=None)

    def report(phase: str, done: int, total: int) -> None:
        bar.update(task, description=phase, completed=done, total=total)

    return report
