"""The metrics of a run: JSON lines, one for each step, and TensorBoard's events where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sspruner.compute.processes import rank
from sspruner.files import strict_json


class Log:
    """Appends to a file of JSON lines; only the first process writes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: IO[str] | None = None
        self.board: Any = None

    def __enter__(self) -> Log:
        if rank() == 0:
            self.lines = self.file.open("a", encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.file.parent / "tensorboard")
            except ImportError:
                pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self.lines, self.board):
            if part is not None:
                part.close()

    def write(self, step: int, **metrics: float) -> None:
        """One line."""
        if self.lines is not None:
            self.lines.write(strict_json.dumps({"step": step, **metrics}) + "\n")
            self.lines.flush()
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, which a run that goes on from `step` takes again, and what is half-written."""
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
