"""Leaderboard: rows are added, never changed; an interrupted run continues; seeds are pooled; order has one rule."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.sources import HELD_OUT
from sspruner.comparison import leaderboard as making
from sspruner.comparison.board import RATIO, RECALL, Dense, Entry, Leaderboard, Refusal, Row, Settings
from sspruner.comparison.leaderboard import BESIDE, CELLS, pooled
from sspruner.evaluation.paired import Interval, perplexity_ratio
from sspruner.plugins.manager import plugin_manager
from sspruner.recipes.leaderboard import MEASURED, WINDOWS
from sspruner.reporting.board import picture
from sspruner.reporting.figures import LIGHT
from sspruner.reporting.folder import read_folder
from sspruner.reporting.sections import sections
from support.command import done, refused, saved_model
from support.tiny import tiny_model

SMALL: dict[str, Any] = {"sparsities": (0.5,), "samples": 2, "seq_len": 20, "measured": "self", "windows": 3}
SMALL |= {"seeds": (0, 1)}
PLUGIN = '''
import torch

import sspruner


class Mine(sspruner.Scorer):
    """Keeps the first units."""

    name, axes, needs = "mine", sspruner.AXES, "weights"

    def observe(self, view):
        self.shape = view.group.groups, view.group.units

    def importance(self):
        return -torch.arange(self.shape[1], dtype=torch.float32).expand(self.shape)


@sspruner.hookimpl
def sspruner_scorers():
    return [Mine]
'''


def loader(**others: int) -> tuple[Callable[[str], tuple[Any, Any]], list[str]]:
    """Return a stand-in for `sspruner.load`, name -> a tiny model of its own, and the names that it loaded."""
    loaded: list[str] = []

    def load(name: str) -> tuple[Any, Any]:
        loaded.append(name)
        return tiny_model(state=6, seed=others.get(name, len(name))), None

    return load, loaded


def entry(ratio: float, **others: Any) -> Entry:
    measures = {RATIO: Interval(ratio, ratio / 2, 2 * ratio), "kl_to_dense": Interval.exactly(0.1)}
    plain = Entry(measures, 8, 9, 0.5, 1.5, None, {"hf": ""}, (0, 1), "key", "0.1.0")
    return replace(plain, **others)


def test_a_row_that_is_added_leaves_the_others_bit_for_bit(tmp_path: Path) -> None:
    load, loaded = loader()
    first = sspruner.leaderboard(tmp_path, ["magnitude"], models=("a", "bb"), load=load, **SMALL)
    assert loaded == ["a", "bb"]
    before, cells = tree_of(tmp_path), sorted((tmp_path / CELLS).iterdir())
    again = sspruner.leaderboard(tmp_path, ["magnitude"], load=load)
    assert loaded == ["a", "bb"]  # nothing to do, and what is left at its default is that of the folder
    assert again == first
    assert tree_of(tmp_path) == before
    second = sspruner.leaderboard(tmp_path, ["random"], load=load)
    assert set(second.rows) == {"random", "magnitude"}
    after = tree_of(tmp_path)
    assert after["rows"]["magnitude"] == before["rows"]["magnitude"]
    assert after["dense"] == before["dense"]
    assert set(cells) < set((tmp_path / CELLS).iterdir())
    assert Leaderboard.load(tmp_path) == second
    third = sspruner.leaderboard(tmp_path, models=("ccc",), load=load)  # a model more: for all rows
    assert loaded == ["a", "bb"] * 2 + ["ccc"]
    assert all(isinstance(row.of("ccc", 0.5), Entry) for row in third.rows.values())
    assert tree_of(tmp_path)["rows"]["random"]["entries"]["a"] == after["rows"]["random"]["entries"]["a"]
    section = sections(read_folder(tmp_path))[0]
    assert section.title == "Leaderboard"
    assert len(section.figures) + len(section.tables) == 3  # a table for each model, the first below the picture


def tree_of(folder: Path) -> Any:
    return json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_continues(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, _ = loader()
    made: list[int] = []
    prune = making.prune

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(len(made))
        if len(made) == after + 1:
            raise KeyboardInterrupt
        return prune(*args, **kwargs)

    monkeypatch.setattr(making, "prune", counted)
    how: dict[str, Any] = {"models": ("a",), "load": load, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        sspruner.leaderboard(tmp_path, ["magnitude", "random"], **how)
    kept = {file: file.read_bytes() for file in (tmp_path / CELLS).iterdir()}
    assert len(kept) == after
    found = sspruner.leaderboard(tmp_path, ["magnitude", "random"], **how)
    assert len(made) == 2 * 2 + 1  # two rows, two seeds, and the one that was interrupted
    assert all(file.read_bytes() == content for file, content in kept.items())
    monkeypatch.undo()
    whole = sspruner.leaderboard(tmp_path.with_name(f"{tmp_path.name}-whole"), ["random", "magnitude"], **how)
    assert [*map(str, found.ranked)] == whole.ranked
    for label in found.rows:
        one, other = found.rows[label].of("a", 0.5), whole.rows[label].of("a", 0.5)
        assert isinstance(one, Entry)
        assert isinstance(other, Entry)
        assert (one.measures, one.state_bytes, one.key) == (other.measures, other.state_bytes, other.key)


def test_entries_are_those_of_prunes_of_their_own(tmp_path: Path) -> None:
    load, _ = loader()
    how: dict[str, Any] = {"models": ("a",), "load": load, **SMALL, "seeds": (3,)}
    board = sspruner.leaderboard(tmp_path, ["ghost"], **how)
    found = board.rows["ghost"].of("a", 0.5)
    assert isinstance(found, Entry)
    model, dense = load("a")[0], load("a")[0]
    data = sspruner.calibration("self", model, samples=2, seq_len=20, held_out=BESIDE, seed=3)
    text = sspruner.calibration("self", dense, samples=3, seq_len=20, held_out=0).tokens
    sspruner.prune(model, "ghost", sparsity=0.5, calibration=data, seed=3)
    assert not data.seen.among(text, torch.ones_like(text, dtype=torch.bool)).any()
    own = sspruner.evaluate(model, against=dense, text=text, max_length=19, metrics=["perplexity"])
    ratio = own["perplexity"].change
    assert ratio is not None
    assert found.measures[RATIO].value == pytest.approx(ratio.value, rel=1e-6)
    assert found.measures["kl_to_dense"].value == pytest.approx(own["kl_to_dense"].value.value, rel=1e-4)
    assert found.state_bytes == sspruner.trace(model).state_bytes
    assert found.loads["hf"] == ""
    assert RECALL not in found.measures  # it was not trained on recall


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    load, _ = loader()
    board = sspruner.leaderboard(tmp_path / "b", ["magnitude"], models=("a",), load=load, **SMALL)
    before = tree_of(tmp_path / "b")
    for other in ({"sparsities": (0.25,)}, {"samples": 3}, {"windows": WINDOWS}, {"measured": MEASURED}):
        with pytest.raises(sspruner.InputError, match="another folder"):
            sspruner.leaderboard(tmp_path / "b", ["random"], load=load, **other)
    for vain in ({"metrics": ("recall",)}, {"lambada": "x.jsonl"}, {"baseline": "small"}, {"seed": 1}):
        with pytest.raises(sspruner.InputError, match=f"--{next(iter(vain))}"):
            sspruner.leaderboard(tmp_path / "b", ["random"], load=load, **vain)
    for vain in ({"axis": "head"}, {"refit": "output"}, {"multiple_of": 2}, {"refit_steps": 3}):
        with pytest.raises(sspruner.InputError, match=f"{next(iter(vain))}: says how a row is made, and none is named"):
            sspruner.leaderboard(tmp_path / "b", load=load, **vain)
    with pytest.raises(sspruner.InputError, match="axis: a recipe says this"):
        sspruner.leaderboard(tmp_path / "b", sspruner.CompareRecipe.of(["random"]), load=load, axis="head")
    with pytest.raises(sspruner.InputError, match="a: the model is not the one"):
        sspruner.leaderboard(tmp_path / "b", ["random"], load=loader(a=9)[0])
    # Text that is sampled like what is measured: as many windows in all, held-out ones included, with the same seed.
    same = {**SMALL, "samples": SMALL["windows"] + HELD_OUT - BESIDE, "seeds": (0,)}
    with pytest.raises(sspruner.InputError, match="text self: window 1 was calibrated on"):
        sspruner.leaderboard(tmp_path / "c", ["ghost"], models=("a",), load=load, **same)
    assert tree_of(tmp_path / "b") == before
    assert board.settings.seeds == (0, 1)


def test_a_fraction_of_many_digits_is_found_again(tmp_path: Path) -> None:
    load, loaded = loader()
    how = {**SMALL, "sparsities": (115 / 128, 115.0001 / 128)}
    first = sspruner.leaderboard(tmp_path, ["magnitude"], models=("a",), load=load, **how)
    assert len([*(tmp_path / CELLS).iterdir()]) == 4  # each has a file of its own, for each seed
    assert Leaderboard.load(tmp_path) == first
    assert sspruner.leaderboard(tmp_path, ["magnitude"], load=load) == first
    assert loaded == ["a"]


def test_lines_name_seeds_that_are_missing_and_reasons_name_their_cuts() -> None:
    settings = Settings(("m", "n"), (0, 1), (0.5, 0.75), {"source": "s", "samples": 2, "seq_len": 8}, "page", 4)
    whole, alone = entry(1.5, loads={"hf": "no"}), entry(2.0, seeds=(1,), loads={"hf": "too large"})
    rows = {"a": Row({}, {"m": {0.5: whole, 0.75: alone}, "n": {0.75: whole}})}
    dense = Dense("f", {"perplexity": Interval.exactly(9.0)}, 8, 9, "t")
    board = Leaderboard(settings, {"m": dense, "n": dense}, rows)
    assert [line[0] for _, _, lines in board.tables() for line in lines] == ["a", "a (seeds 1 alone)", "a"]
    assert board.notes()[1:] == ["hf, m 50 %, n 75 %: no", "hf, m 75 %: too large"]


@pytest.mark.parametrize("value", [1.5, math.inf, math.nan])
@pytest.mark.parametrize("low", [0.5, math.nan, -math.inf])
def test_the_picture_of_a_ruined_model_is_drawn(low: float, value: float) -> None:
    settings = Settings(("m",), (0, 1), (0.5, 0.75), {"source": "s", "samples": 2, "seq_len": 8}, "page", 4)
    ruined = entry(1.5, measures={RATIO: Interval(value, low, math.inf)})
    dense = Dense("f", {"perplexity": Interval.exactly(9.0)}, 8, 9, "t")
    board = Leaderboard(settings, {"m": dense}, {"a": Row({}, {"m": {0.5: entry(0.9), 0.75: ruined}})})
    (panel,) = picture(board)(LIGHT).axes
    lowest = [0.45, *[low] * math.isfinite(low)]  # the ends of intervals
    assert panel.get_ylim()[0] < 100 * (min(lowest) - 1)


def test_an_impossible_cut_is_a_reason(tmp_path: Path) -> None:
    load, _ = loader()
    board = sspruner.leaderboard(tmp_path, ["magnitude"], models=("a",), load=load, **{**SMALL, "sparsities": (0.01,)})
    found = board.rows["magnitude"].of("a", 0.01)
    assert isinstance(found, Refusal)
    assert f"magnitude, a: {found.error}" in board.to_markdown()
    assert not [*(tmp_path / ".cells").iterdir()]  # a reason is not kept


def test_a_refused_row_is_tried_again_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason may be gone in the next version; without its name a row is left as it was."""
    load, _ = loader()
    tried = []

    def refuse(*_: Any, **__: Any) -> Any:
        tried.append(1)
        raise sspruner.InputError("not yet")

    with monkeypatch.context() as patch:
        patch.setattr("sspruner.comparison.leaderboard.prune", refuse)
        for scorers in (["magnitude"], None, ["magnitude"]):
            board = sspruner.leaderboard(tmp_path, scorers, models=("a",), load=load, **SMALL)
    cuts = board.settings.sparsities
    assert len(tried) == 2 * len(cuts) * len(board.settings.seeds)
    assert all(isinstance(board.rows["magnitude"].of("a", cut), Refusal) for cut in cuts)
    board = sspruner.leaderboard(tmp_path, ["magnitude"], load=load)
    assert all(isinstance(board.rows["magnitude"].of("a", cut), Entry) for cut in cuts)


@given(st.lists(st.lists(st.floats(0.1, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_seeds_are_pooled_by_window(rows: list[list[float]]) -> None:
    shared = {"dense_nll": [1.0, 2.0, 3.0, 4.0], "tokens": [4, 4, 4, 2], "state_bytes": 8, "parameters": 9,
              "forwards": 2.0, "memory": None, "loads": {}}  # fmt: skip
    cells = [{**shared, "nll": row, "kl": row, RECALL: row, "seconds": i} for i, row in enumerate(rows)]
    found = pooled(cells, range(len(rows)), "key")
    assert isinstance(found, Entry)
    mean = torch.tensor(rows, dtype=torch.float64).mean(0)
    dense, tokens = (torch.tensor(shared[name]) for name in ("dense_nll", "tokens"))
    assert found.measures[RATIO] == perplexity_ratio(mean, dense, tokens)
    assert found.measures[RECALL].value == pytest.approx(float(mean.mean()))
    assert found.seconds == pytest.approx(sum(range(len(rows))) / len(rows))
    noted = pooled([{**cells[0], "memory": 5, "seconds": 1000.0}, *cells[1:]], range(len(rows)), "key")
    assert isinstance(noted, Entry)
    others = [*range(1, len(rows))] or [1000]  # where memory was noted, time is not, unless there is no other
    assert (noted.memory, noted.seconds) == (5, pytest.approx(sum(others) / len(others)))
    assert pooled([*cells, {"error": "no"}], range(9), "key") == Refusal("no", "key")


LABELS = st.dictionaries(st.sampled_from(["ghost", "random", "taylor", "mine|odd"]), st.floats(0.5, 3), min_size=1)


@given(LABELS, st.randoms(use_true_random=False))
def test_the_order_of_rows_is_that_of_damage_however_they_came_in(ratios: dict[str, float], draw: Any) -> None:
    settings = Settings(("m",), (0, 1), (0.5, 0.75), {"source": "self", "samples": 2, "seq_len": 8}, "page", 4)
    rows = {n: Row({}, {"m": {0.5: entry(r), 0.75: entry(r * r)}}) for n, r in ratios.items()}
    rows["lacks one"] = Row({}, {"m": {0.5: entry(1e-3), 0.75: Refusal("cannot", "key")}})
    rows["new"] = Row({})
    board, order = Leaderboard(settings, {}, rows), [*rows]
    draw.shuffle(order)
    mixed = Leaderboard(settings, {}, {name: rows[name] for name in order})
    assert mixed.to_json() == board.to_json()
    assert board.ranked[-2:] == ["lacks one", "new"]
    damage = [math.log(ratios[name]) for name in board.ranked[:-2]]
    assert damage == sorted(damage)
    back = Leaderboard.from_json(board.to_json())
    assert back == board
    assert back.to_json() == board.to_json()
    assert [*itertools.chain(*(rows for _, _, rows in board.tables()))] == []  # no dense model yet


@pytest.fixture
def plugins() -> Iterator[None]:
    """Afterwards the plugins are those of before."""
    before = {name for name, _ in plugin_manager().list_name_plugin()}
    yield
    for name in {name for name, _ in plugin_manager().list_name_plugin()} - before:
        plugin_manager().unregister(name=name)


@pytest.mark.usefixtures("plugins")
def test_a_plugin_author_adds_a_row_with_one_command(tmp_path: Path) -> None:
    model, board = saved_model(tmp_path / "model"), tmp_path / "board"
    text = ["--text", "self", "--windows", 3, "--samples", 2, "--seq-len", 20, "--sparsity", "0.5", "--seeds", "0"]
    done("compare", model, "--leaderboard", board, "--scorers", "magnitude", *text)
    before = tree_of(board)
    (tmp_path / "mine.py").write_text(PLUGIN, encoding="utf-8")
    shown = done("compare", "--leaderboard", board, "--plugin", tmp_path / "mine.py", "--scorers", "mine").stdout
    after = tree_of(board)
    assert set(after["rows"]) == {"magnitude", "mine"}
    assert after["rows"]["magnitude"] == before["rows"]["magnitude"]
    assert "mine" in shown
    assert "| mine | 50 % |" in (board / "leaderboard.md").read_text(encoding="utf-8")
    assert (board / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    refused(tmp_path, ("--leaderboard",), "compare", model, "--seeds", "1")
    refused(tmp_path, ("give one",), "compare", model, "--leaderboard", board, "--out", tmp_path / "t")
    refused(tmp_path, ("another folder",), "compare", "--leaderboard", board, "--scorers", "mine", "--windows", "5")
    refused(tmp_path, ("--no-cache",), "compare", "--leaderboard", board, "--scorers", "mine", "--no-cache")
