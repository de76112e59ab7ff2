"""Metrics of a run go to JSON lines and to the trackers that are wanted; what is not there is refused first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sspruner
from sspruner.recipes.train import Settings
from sspruner.training.gradual import likelihood
from sspruner.training.log import check_trackers
from sspruner.training.loop import train
from support.tiny import tiny_model
from support.training import SMALL, text

tracking = pytest.importorskip("accelerate.tracking", reason="needs the extra sspruner[train]")


class Kept(tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "kept", True, None
    runs: list[Any] = []

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.run_name, self.logging_dir, self.lines, self.state = run_name, logging_dir, [], "made"
        Kept.runs.append(self)

    def start(self) -> None:
        self.state = "started"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise AssertionError(values)

    def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        assert self.state == "started"
        self.lines.append({"step": step, **values})

    def finish(self) -> None:
        self.state = "finished"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Kept)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["trackio"])
    Kept.runs = []
    return Kept


def test_a_tracker_gets_what_the_file_gets(kept: type[Kept], tmp_path: Path) -> None:
    settings = replace(SMALL, log_with=("trackio",))
    train(tiny_model(), text(tmp_path), settings, likelihood, tmp_path)
    (run,) = kept.runs
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert run.lines == lines
    assert len(lines) > settings.steps
    assert (run.run_name, run.logging_dir, run.state) == (tmp_path.name, tmp_path, "finished")


def test_it_is_finished_also_when_the_run_fails(kept: type[Kept], tmp_path: Path) -> None:
    def fails(*given: Any) -> Any:
        raise KeyError("in the loss")

    with pytest.raises(KeyError):
        train(tiny_model(), text(tmp_path), replace(SMALL, log_with=("trackio",)), fails, tmp_path)
    assert kept.runs[0].state == "finished"


@pytest.mark.parametrize(("name", "says"), [("nothing", "accelerate knows .*tensorboard"), ("wandb", "not installed")])
def test_a_tracker_that_is_not_there_is_refused_before_anything(
    name: str, says: str, kept: type[Kept], tmp_path: Path
) -> None:
    with pytest.raises(sspruner.InputError, match=says):
        train(tiny_model(), text(tmp_path), replace(SMALL, log_with=(name,)), likelihood, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    check_trackers(())


def test_where_metrics_go_does_not_identify_a_run() -> None:
    assert Settings(log_with=("wandb",)).identity() == Settings().identity()
