"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]  # (phase, done, total)


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
    """Show a progress bar on standard error, if that is a terminal; of several processes the first shows it.

    Yields the callback that the Python API takes as `progress`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from sspruner.compute.processes import rank

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=rank() > 0 or not console.is_terminal) as bar:
        task = bar.add_task("working", total=None)

        def report(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        yield report


@contextmanager
def live_table(draw: Callable[[Any], Any]) -> Iterator[tuple[Progress, Callable[[Any], None]]]:
    """Show a progress bar below a table that grows, on standard error, if that is a terminal.

    Yields the callbacks that the Python API takes as `progress` and `on_row`; `draw` makes a rich renderable of what
    `on_row` gets.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    task = bar.add_task("working", total=None)
    if not console.is_terminal:
        yield lambda phase, done, total: None, lambda rows: None
        return
    with Live(bar, console=console, transient=True) as live:
        yield (
            lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total),
            lambda rows: live.update(Group(draw(rows), bar)),
        )
