"""Progress without a terminal: lines on standard error, now and then, from the first process alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from sspruner.compute import processes, progress

Awaited = Callable[[str], None]


@pytest.fixture
def awaited(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Awaited:
    """Wait until a line begins with these words; lines come every hundredth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.01)

    def wait(words: str) -> None:
        until = time.monotonic() + 30
        while not any(line.startswith(words) for line in capsys.readouterr().err.splitlines()):
            assert time.monotonic() < until, words
            time.sleep(0.01)

    return wait


def test_lines_say_what_is_being_done(awaited: Awaited, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bars() as report:
        awaited("working, 0 s")  # nothing is reported yet, as while a model is loaded
        report("scoring", 1200, 4800)
        awaited("scoring, 1,200 of 4,800, ")
        report("saving", 0, 0)
        awaited("saving, ")
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_table_that_grows_leaves_lines_too(awaited: Awaited) -> None:
    with progress.live_table(str) as (report, on_row):
        report("measuring", 1, 2)
        on_row("a row")
        awaited("measuring, 1 of 2, ")


def test_other_processes_and_short_runs_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.bars() as report:
        report("scoring", 1, 2)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    with progress.bars() as report:
        report("scoring", 1, 2)
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")
