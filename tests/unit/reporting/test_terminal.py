"""`sspruner inspect --plot`: bars as long as layers are large, heat maps as bright as scores, on any terminal."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sspruner
from sspruner.reporting.terminal import ASCII, BLOCKS, Bars, Heat, bars, heats, plots, sizes_of
from sspruner.scoring.scores import Scores
from support.command import done, refused
from support.tiny import half, tiny_model, tokens


def printed(picture: Any, *, width: int = 100, encoding: str = "utf-8", colour: Any = None) -> str:
    """What a terminal of that kind is sent."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(
        file=file, width=width, color_system=colour, force_terminal=colour is not None, legacy_windows=False
    )
    console.print(picture)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


sizes = st.dictionaries(
    st.from_regex(r"[a-z.]{1,40}[0-9]", fullmatch=True),
    st.tuples(st.integers(1, 300), st.floats(0, 1)).map(lambda x: (x[0], round(x[0] * x[1]))),
    min_size=1,
    max_size=6,
)


@given(sizes, st.integers(60, 160), st.sampled_from(["utf-8", "ascii"]))
def test_bars_are_as_long_as_layers_are_large(found: dict[str, tuple[int, int]], width: int, encoding: str) -> None:
    full, empty = "█░" if encoding == "utf-8" else "#."
    title, *lines = printed(Bars("kept", found), width=width, encoding=encoding).splitlines()
    assert title == "kept"
    assert len(lines) == len(found)
    most = max(was for was, _ in found.values())
    column = min(24, max(map(len, found)))
    bar_lengths = []
    for (name, (was, now)), line in zip(found.items(), lines, strict=True):
        assert len(line) <= width
        assert line[:column].rstrip() == name[-column:]
        bar, _, said = line[column + 2 :].partition(" ")
        assert said == (f"{now} of {was}" if now < was else str(now))
        assert bar == full * bar.count(full) + empty * bar.count(empty)
        bar_lengths += [(bar.count(full), now), (len(bar), was)]
    longest = max(length for length, _ in bar_lengths)
    assert longest >= 8
    for length, units in bar_lengths:
        assert length == pytest.approx(longest * units / most, abs=0.51)


rows = st.dictionaries(
    st.from_regex(r"l[0-9]{1,2}", fullmatch=True),
    st.lists(st.floats(-3, 0), min_size=1, max_size=200),
    min_size=1,
    max_size=4,
)


@given(rows, st.integers(40, 160), st.sampled_from(["utf-8", "ascii"]))
def test_a_heat_map_is_brighter_where_scores_are_higher(
    found: dict[str, list[float]], width: int, encoding: str
) -> None:
    scale = BLOCKS if encoding == "utf-8" else ASCII
    title, *lines = printed(Heat("scores", found), width=width, encoding=encoding).splitlines()
    column = max(map(len, found)) + 2
    each = math.ceil(max(map(len, found.values())) / (width - column))
    shown = lines[: len(found)]
    assert title == "scores"
    for (name, row), line in zip(found.items(), shown, strict=True):
        assert line[:column].strip() == name
        cells = line[column:]
        parts = [row[i : i + each] for i in range(0, len(row), each)]
        assert len(cells) == len(parts)
        for cell, part in zip(cells, parts, strict=True):
            level = 1 + sum(part) / len(part) / 3
            assert scale.index(cell) == pytest.approx(level * len(scale) - 0.5, abs=0.51)


def test_colours_where_the_terminal_has_them() -> None:
    heat = Heat("scores", {"a": [-3.0, 0.0]})
    assert "\x1b[38;2;0;34;78m█" in printed(heat, colour="truecolor")
    assert "\x1b[38;2;254;232;56m█" in printed(heat, colour="truecolor")
    assert "\x1b[38;5;" in printed(heat, colour="256")
    assert "\x1b" not in printed(heat)
    assert printed(heat, colour="truecolor", encoding="ascii").isascii()
    assert "@" in printed(heat, colour="truecolor", encoding="ascii")
    assert printed(Bars("b", {"a": (9, 4)}), encoding="ascii").isascii()


def test_only_axes_that_differ_are_drawn_or_all() -> None:
    same = {"l.0:state": (6, 6), "l.1:state": (6, 6), "l.0:head": (2, 2)}
    assert [picture.title for picture in bars(same)] == ["state units kept", "head units kept"]
    assert [picture.title for picture in bars(same | {"l.1:state": (6, 5)})] == ["state units kept"]
    assert [picture.title for picture in bars(same | {"l.1:head": (3, 3)})] == ["head units kept"]


def test_sizes_are_before_the_first_cut_and_after_the_last() -> None:
    model = tiny_model()
    name = next(iter(sspruner.trace(model).on_axis("state")))
    assert sizes_of(model)[name] == (6, 6)
    planned = half(sspruner.trace(model), "state")
    assert sizes_of(model, planned)[name] == (6, 3)
    result = sspruner.prune(model, "magnitude", keep=4, calibration=tokens(4, 16))
    assert sizes_of(result.model)[name] == (6, 4)
    result = sspruner.prune(result.model, "magnitude", keep=2, calibration=tokens(4, 16))
    assert sizes_of(result.model)[name] == (6, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = sspruner.prune(tiny_model(), "magnitude", keep=2, calibration=tokens(4, 16))
    return sspruner.save(result.model, tmp_path_factory.mktemp("saved") / "model", result=result)


@pytest.mark.slow
def test_inspect_draws_sizes_and_scores(saved: Path, tmp_path: Path) -> None:
    plain, plotted = (done("inspect", saved, *more).stdout for more in ((), ("--plot",)))
    first, last = plain.rsplit("\n\n", 1)  # what pays stands at the end of both
    assert "a decode step" in last
    assert plotted.startswith(first)
    assert plotted.endswith(last)
    drawn = plotted.removeprefix(first).removesuffix(last)
    assert drawn.count("2 of 6") == 2
    assert "scores of magnitude: state units" in drawn
    scores = Scores.load(saved / "sspruner" / "scores.safetensors")
    (heat,) = heats(scores)
    assert [max(row) for row in heat.rows.values()] == [0, 0]
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / "sspruner" / "scores.safetensors").unlink()
    assert "scores of" not in done("inspect", folder, "--plot").stdout
    (folder / "sspruner" / "scores.safetensors").write_bytes(b"no")
    refused(tmp_path, ("score again",), "inspect", folder, "--plot")


def test_scores_of_elements_are_not_drawn() -> None:
    scores = Scores({"a:weight": torch.ones(2, 2), "a:state": torch.ones(2, 2)})
    assert [(heat.title, list(heat.rows)) for heat in heats(scores)] == [
        ("scores: state units", ["a set 0", "a set 1"])
    ]
    assert len(plots(tiny_model(), None)) > 1
