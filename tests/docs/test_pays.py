"""The page "When it pays": its tables are the library's bytes and what another page measured, and it quotes them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.benchmarking.gains import kept
from sspruner.io.skeleton import skeleton
from sspruner.units import as_bytes
from support.footprints import config_alone, taken
from support.paths import ROOT
from support.pictures import check_drawn, script
from support.published import CONFIGS

RECIPE = yaml.safe_load((ROOT / "benchmarks/recipes/pays.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/when-it-pays.md").read_text(encoding="utf-8")
DECODE = (ROOT / "docs/results/decode.md").read_text(encoding="utf-8")
PICTURE = script("pays")
Table = dict[str, dict[str, str]]  # row -> column -> cell


def tables(text: str, part: str) -> list[Table]:
    """The tables of a part of a page."""
    text = text.partition(f"<!-- {part}: begin -->")[2].partition(f"<!-- {part}: end -->")[0]
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        found.append({cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in body})
    return found


SIZES, SPEED, FIT = tables(PAGE, "pays")


def numbers(cell: str) -> list[float]:
    """The numbers of a cell such as `1.05 / 1.37` or `1,208 (1.97)`."""
    return [float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?", cell)]


def test_measured_cells_are_those_of_the_page_on_decode() -> None:
    (quoted,), expected = tables(PAGE, "pays_measured"), {}
    for name, (engine, shape) in RECIPE["measured"].items():
        (measured,) = tables(DECODE, name)
        for row, cells in measured.items():
            label = f"{engine}, {shape}, batch {row.split()[-1]}"
            expected[label] = [cells[f"state {states} / dense"] for states in (64, 32, 16)]
    assert {row: list(cells.values())[1::2] for row, cells in quoted.items()} == expected


def test_what_bytes_allow_beside_them_is_what_decode_shows_where_bytes_are_the_limit() -> None:
    """At one sequence of the 130M shape no operations matter: both pages count the same bytes."""
    (quoted,) = tables(PAGE, "pays_measured")
    for part, engine in (("engine-llama-130m", "llama.cpp"), ("engine-vllm-130m", "vLLM")):
        (measured,) = tables(DECODE, part)
        allowed = numbers(measured["mamba2-130m, decode, batch 1"]["bytes and operations allow"])
        cells = list(quoted[f"{engine}, mamba2-130m, batch 1"].values())
        assert [float(cell) for cell in cells[::2]] == pytest.approx(allowed, abs=0.011)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row", "context"),
    [
        ("Mamba2-1.3B", "mamba2-1.3b", 1),
        ("Nemotron-H-8B", "Nemotron-H-8B, 2k", 2048),
        ("Nemotron-H-8B", "Nemotron-H-8B, 128k", 131072),
    ],
)
def test_cells_are_the_bytes_of_the_published_config(name: str, row: str, context: int, tmp_path: Path) -> None:
    model, room = skeleton(config_alone(tmp_path / name, CONFIGS[name])), float(RECIPE["memory"])
    graph, dense = sspruner.trace(model), taken(model, context)
    sizes = SIZES[row.partition(",")[0]]
    assert sizes["weights"] == as_bytes(dense.weight_bytes)
    assert sizes["state of a sequence"] == as_bytes(dense.state_bytes)
    for way, (axis, share, dtype) in RECIPE["ways"].items():
        cut = dense if share == 1 else kept(model, graph, axis, share, dense)
        assert cut
        cut = cut.stored(dtype)
        found = [dense.step_bytes(batch) / cut.step_bytes(batch) for batch in RECIPE["batches"]]
        assert numbers(SPEED[row][way]) == pytest.approx(found, abs=0.0051), way
        assert numbers(FIT[row][way])[0] == cut.sequences(room)
    assert numbers(FIT[row]["fp32 state"]) == [dense.sequences(room)]


def config_of(name: str) -> dict[str, Any]:
    config = dict(RECIPE["shapes"][name])
    if layers := config.pop("layers", None):
        field, most, some, at = layers
        config[field] = [some if i in at else most for i in range(config["num_hidden_layers"])]
    return config


def test_shapes_are_the_published_ones() -> None:
    """Those that the tests have, too, say the same; of the others, the parameters are the published number."""
    both = {*RECIPE["shapes"]} & {*CONFIGS}
    assert both
    for name in both:
        assert {key: CONFIGS[name][key] for key in config_of(name)} == config_of(name)
    for name, billions in {"Granite-4.0-H-Small": 32.2, "Qwen3.5-9B": 9.0, "Zamba2-7B": 7.4}.items():
        assert numbers(SIZES[name]["weights"])[0] == pytest.approx(2 * billions, rel=0.01)


def test_the_page_quotes_its_tables() -> None:
    """`1.70 at 64 (mamba2-1.3b; half of the state)` and `391 fit instead of 197 (...)` stand in the tables."""
    text = " ".join(PAGE.split())
    quoted = re.findall(r"([\d.]+) at (\d+) \(([^();]+); ([^();]+)\)", text)
    assert len(quoted) >= 5
    for times, batch, row, way in quoted:
        assert numbers(SPEED[row][way])[RECIPE["batches"].index(int(batch))] == float(times), (row, way)
    rooms = re.findall(r"([\d,]+) fit instead of ([\d,]+) \(([^();]+); ([^();]+)\)", text)
    assert rooms
    for many, before, row, way in rooms:
        assert (FIT[row][way].split()[0], FIT[row]["fp32 state"]) == (many, before)


def test_the_page_quotes_what_was_measured() -> None:
    """From 32 sequences on: the least and the most of the medians, and of what bytes allow."""
    (measured,), text = tables(PAGE, "pays_measured"), " ".join(PAGE.split())
    many = [list(cells.values()) for row, cells in measured.items() if int(row.split()[-1]) >= 32]
    for name, place in (("Half of the state", 0), ("A quarter", 2)):
        allowed, found = ([numbers(cells[at])[0] for cells in many] for at in (place, place + 1))
        spans = [f"{min(values):.2f} to {max(values):.2f}" for values in (found, allowed)]
        assert f"{name}: {spans[0]} where bytes allow {spans[1]}." in text


def test_the_readme_quotes_the_page() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    half = numbers(SPEED["mamba2-1.3b"]["half of the state"])
    assert f"at most {half[3]:.1f} times the speed with 256 sequences" in readme
    assert f"(at most {half[0]:.2f} times the speed)" in readme


def test_the_picture_is_that_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    batches, found = PICTURE["curves"](PAGE)
    assert batches == RECIPE["batches"]
    assert found == {row: numbers(SPEED[row]["half of the state"]) for row in PICTURE["LINES"]}
    PICTURE["main"](tmp_path)
    check_drawn(tmp_path, "pays")


@given(st.dictionaries(st.text(max_size=3), st.floats(1, 2), max_size=8))
def test_names_in_the_picture_do_not_overlap(values: dict[str, float]) -> None:
    placed = sorted(PICTURE["heights"](values).items(), key=lambda item: item[1])
    assert all(b - a >= PICTURE["APART"] * 0.999 for (_, a), (_, b) in itertools.pairwise(placed))
    assert all(place >= values[name] for name, place in placed)
    assert [values[name] for name, _ in placed] == sorted(values.values())
