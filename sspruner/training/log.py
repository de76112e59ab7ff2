"""Metrics of a run: JSON lines, one for each step, and the trackers of accelerate that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sspruner.compute.processes import rank
from sspruner.errors import InputError, install
from sspruner.files import strict_json


class Log:
    """Log file of JSON lines, and trackers by name (`tensorboard`, `wandb`, ...); only the first process writes."""

    def __init__(self, file: Path, log_with: Sequence[str] = ()) -> None:
        self.file = file
        self.log_with = log_with
        self.lines: IO[str] | None = None
        self.trackers: list[Any] = []

    def __enter__(self) -> Log:
        if rank() == 0:
            self.trackers = [_tracker(name, self.file.parent) for name in self.log_with]
            self.lines = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lines is not None:
            self.lines.close()
        for tracker in self.trackers:
            tracker.finish()

    def write(self, step: int, **metrics: float) -> None:
        """Write the metrics of one step."""
        if self.lines is not None:
            self.lines.write(strict_json.dumps({"step": step, **metrics}) + "\n")
            self.lines.flush()
        for tracker in self.trackers:
            tracker.log(metrics, step=step)


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that accelerate does not know, or that is not installed."""
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise InputError(f"log-with {', '.join(names)}: needs the package accelerate: {install('train')}") from error
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"log-with {name!r}: accelerate knows {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise InputError(f"log-with {name}: its package is not installed")


def _tracker(name: str, folder: Path) -> Any:
    """Start a tracker for the run in `folder`."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the loggers of accelerate want it
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(folder.name, logging_dir=folder) if kind.requires_logging_directory else kind(folder.name)
    tracker.main_process_only = False  # there is none but in the first process
    tracker.start()
    return tracker


def forget_after(file: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a half-written line."""
    if rank() or not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if strict_json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    file.write_text("".join(kept), encoding="utf-8")
