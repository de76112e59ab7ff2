"""Scores that are kept: used again while nothing has changed, and never when anything has."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sspruner
from sspruner.plugins.manager import load_file as load_plugin
from sspruner.plugins.manager import plugin_manager
from sspruner.scoring import cache
from support.command import TEXT, done, run, saved_model
from support.paths import ROOT
from support.scoring import calibrated
from support.tiny import tiny_model, tokens
from support.zoo import zoo

DATA = calibrated(tokens(4, 19))


@pytest.fixture(autouse=True)
def code_is_older_than_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while somebody edits it."""
    monkeypatch.setattr(cache, "STARTED", float("inf"))


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model(groups=2)


class Counter:
    """How often the blocks of a model have run."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.runs = 0
        for block in sspruner.trace(model).layers:
            model.get_submodule(block.path).register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.runs += 1

    def since(self) -> int:
        runs, self.runs = self.runs, 0
        return runs


def score(model: torch.nn.Module, scorer: Any = "ghost", **kwargs: Any) -> sspruner.Scores:
    return sspruner.score(model, scorer, **{"calibration": DATA, "cache": True, **kwargs})


def same(one: sspruner.Scores, other: sspruner.Scores) -> bool:
    return list(one.importance) == list(other.importance) and all(
        torch.equal(values, other.importance[name]) for name, values in one.importance.items()
    )


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("scorer", ["ghost", "taylor", "last"])
def test_a_second_time_nothing_runs(scorer: str, model: torch.nn.Module, own_cache: Path) -> None:
    """Bit for bit, with all that is said about them; and there is one file for it."""
    counter = Counter(model)
    first = score(model, scorer)
    assert counter.since() > 0
    assert not first.from_cache
    again = score(model, scorer)
    assert counter.since() == 0
    assert again.from_cache
    assert same(first, again)
    assert again.metadata == first.metadata
    assert [path.suffix for path in files(own_cache)] == [".safetensors"]
    assert same(score(copy.deepcopy(model), scorer), first)


def test_it_is_asked_for_in_python(model: torch.nn.Module, own_cache: Path) -> None:
    counter = Counter(model)
    for _ in range(2):
        assert not sspruner.score(model, "ghost", calibration=DATA).from_cache
        assert counter.since() > 0
    assert not own_cache.exists()


def one_bit(model: torch.nn.Module) -> None:
    """The smallest change of one weight that is no sample of the fingerprint, and vanishes in bf16."""
    weight = model.backbone.layers[1].mixer.in_proj.weight.data
    weight.view(torch.int32)[3, 2] += 1


def epsilon(model: torch.nn.Module) -> None:
    model.backbone.layers[0].mixer.norm.variance_epsilon = 0.3


def limit(model: torch.nn.Module) -> None:
    model.backbone.layers[0].mixer.time_step_limit = (0.0, 0.1)
    model.config.time_step_limit = (0.0, 0.1)


CHANGES: dict[str, tuple[Callable[[torch.nn.Module], Any], dict[str, Any]]] = {
    "one bit of one weight": (one_bit, {}),
    "half the precision": (lambda m: m.bfloat16(), {}),
    "an epsilon": (epsilon, {}),
    "a limit": (limit, {}),
    "other options": (lambda m: None, {"options": {"variant": "output"}}),
    "another seed": (lambda m: None, {"seed": 1}),
    "another axis": (lambda m: None, {"axis": "head"}),
    "one axis more": (lambda m: None, {"axis": ["state", "head"]}),
    "another scorer": (lambda m: None, {"scorer": "rrqr"}),
    "one token": (lambda m: None, {"calibration": replace(DATA, tokens=DATA.tokens.clone().fill_(3))}),
    "one sequence less": (lambda m: None, {"calibration": calibrated(tokens(4, 19)[:3])}),
    "other padding": (
        lambda m: None,
        {"calibration": calibrated(tokens(4, 19), torch.arange(19) < torch.tensor([[19], [19], [19], [9]]))},
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_is_scored_again(case: str, model: torch.nn.Module, own_cache: Path) -> None:
    """And it is what it would be without a cache; both are kept side by side."""
    change, asked = CHANGES[case]
    first = score(model)
    other = copy.deepcopy(model)
    change(other)
    counter = Counter(other)
    found = score(other, **asked)
    assert counter.since() > 0
    assert not found.from_cache
    assert same(found, score(other, **asked, cache=False))
    assert len(files(own_cache)) == 2
    assert same(score(other, **asked), found)
    assert same(score(model), first)
    assert score(model).from_cache


def test_what_does_not_matter_does_not_matter(model: torch.nn.Module) -> None:
    """Where text came from, training mode, gradients, who asks for other scorers beside."""
    first = score(model)
    model.train().requires_grad_(False)
    assert score(model, calibration=replace(DATA, source="elsewhere", held_out=DATA.held_out + 1)).from_cache
    both = sspruner.score(model, ["rrqr", "ghost"], calibration=DATA, cache=True)
    assert [scores.from_cache for scores in both.values()] == [False, True]
    assert same(both["ghost"], first)
    assert list(both) == ["rrqr", "ghost"]


def test_only_what_is_missing_is_scored(model: torch.nn.Module) -> None:
    alone = score(model, "rrqr", cache=False)
    counter = Counter(model)
    score(model, "rrqr", cache=False)
    one = counter.since()
    score(model, "ghost")
    counter.since()
    both = sspruner.score(model, ["ghost", "rrqr", "magnitude"], calibration=DATA, cache=True)
    assert counter.since() == one
    assert same(both["rrqr"], alone)
    both = sspruner.score(model, ["ghost", "rrqr", "magnitude"], calibration=DATA, cache=True)
    assert [scores.from_cache for scores in both.values()] == [True, True, False]
    assert counter.since() == 0  # weights alone: no block runs for them


PLUGIN = """
import torch, sspruner
class Mine(sspruner.Scorer):
    name, axes, needs = "mine", {"state"}, "activations"
    def observe(self, view):
        self.shape = view.B.shape[2:]
    def importance(self):
        return torch.arange(%s).float().expand(self.shape) + 1
@sspruner.hookimpl
def sspruner_scorers():
    return [Mine]
"""


@pytest.fixture
def plugins() -> Iterator[None]:
    """Whatever plugins the test loads are forgotten after it."""
    installed = {name for name, _ in plugin_manager().list_name_plugin()}
    yield
    for name, module in plugin_manager().list_name_plugin():
        if name not in installed:
            plugin_manager().unregister(module)


def reloaded(path: Path, text: str) -> None:
    """The plugin as a new process would find it: written anew, and loaded from there."""
    path.write_text(text)
    os.utime(path, (1e9, 1e9))  # the time does not tell it
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # nor may it tell Python that nothing has changed
    cache._source.cache_clear()
    for name, module in plugin_manager().list_name_plugin():
        if name == str(path):
            plugin_manager().unregister(module)
    load_plugin(path)


def first_sum(scores: sspruner.Scores) -> float:
    return float(next(iter(scores.importance.values())).sum())


@pytest.mark.usefixtures("plugins")
def test_an_edited_plugin_is_run_again(model: torch.nn.Module, tmp_path: Path) -> None:
    for change, total, hit in (("+ 1", 21, False), ("+ 2", 27, False), ("+ 1", 21, True)):
        reloaded(tmp_path / "mine.py", (PLUGIN % "6").replace("+ 1", change))
        found = score(model, "mine")
        assert first_sum(found) == 2 * total
        assert found.from_cache == hit
        assert score(model, "mine").from_cache


@pytest.mark.usefixtures("plugins")
def test_an_edited_base_class_counts(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another file, which the scorer's own does not show."""
    monkeypatch.syspath_prepend(tmp_path)
    heir = "import sspruner\nfrom base_of_mine import Mine\nclass Heir(Mine):\n    name = 'heir'\n"
    heir += "@sspruner.hookimpl\ndef sspruner_scorers():\n    return [Heir]\n"
    for change, total in (("+ 1", 21), ("+ 3", 33)):
        (tmp_path / "base_of_mine.py").write_text((PLUGIN % "6").replace("+ 1", change))
        os.utime(tmp_path / "base_of_mine.py", (1e9 + total, 1e9 + total))
        monkeypatch.delitem(sys.modules, "base_of_mine", raising=False)
        reloaded(tmp_path / "mine.py", heir)
        found = score(model, "heir")
        assert not found.from_cache
        assert first_sum(found) == 2 * total
        assert score(model, "heir").from_cache
    monkeypatch.delitem(sys.modules, "base_of_mine")


CHILD = """
import sys
sys.path.insert(0, "tests")
from unit.scoring.test_cache import DATA, PLUGIN, cache, score
from support.tiny import tiny_model
cache.STARTED = float("inf")
print(score(tiny_model(groups=2)).from_cache)
exec((PLUGIN % "6").partition("@")[0])
print(score(tiny_model(groups=2), Mine).from_cache, score(tiny_model(groups=2), Mine).from_cache)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_through_processes(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has kept another finds. But nobody knows the code of a class that was typed in, here or in a notebook:
    another of the same name is another scorer.
    """
    monkeypatch.setattr(cache, "STARTED", float("inf"))
    assert not score(tiny_model(groups=2)).from_cache
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == ["True", "False", "False"], found.stderr
    assert len(files(own_cache)) == 1


@pytest.mark.usefixtures("plugins")
def test_two_plugin_files_of_one_name(model: torch.nn.Module, tmp_path: Path) -> None:
    for folder, name, number in (("a", "mine", "6"), ("b", "yours", "6")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text((PLUGIN % number).replace('"mine"', f'"{name}"'))
        load_plugin(tmp_path / folder / "mine.py")
    assert not score(model, "mine").from_cache
    assert score(model, "mine").from_cache
    cache._source.cache_clear()
    (tmp_path / "a" / "mine.py").write_text(PLUGIN % "7")  # as another process would find it
    assert not score(model, "mine").from_cache
    assert not score(model, "yours").from_cache


@pytest.mark.usefixtures("plugins")
def test_code_that_changed_while_we_run_is_not_what_runs(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores by the old code under the name of the new one would be wrong for whoever comes next."""
    (tmp_path / "mine.py").write_text(PLUGIN % "6")
    load_plugin(tmp_path / "mine.py")
    monkeypatch.setattr(cache, "STARTED", (tmp_path / "mine.py").stat().st_mtime + 10)
    assert not score(model, "mine").from_cache
    assert score(model, "mine").from_cache
    os.utime(tmp_path / "mine.py", (2e9, 4e9))
    for _ in range(2):
        assert not score(model, "mine").from_cache


def test_the_engines_own_code_counts(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    score(model)
    right = cache._source
    for changed in ("ssm_graph.py", "state.py", "ghost.py", "modeling_mamba2.py", "mamba2_type.py"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, "_source", lambda file, name=changed: right(file) + "!" * (file.name == name))
            assert not score(model).from_cache, changed
            assert score(model).from_cache, changed
    assert score(model).from_cache
    monkeypatch.setattr(cache, "_source", lambda file: right(file) + "!" * (file.name == "wanda.py"))
    assert score(model).from_cache  # another scorer
    monkeypatch.setattr(cache, "_versions", lambda: "torch 9")
    assert not score(model).from_cache


def spoil_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8] + b"!" + path.read_bytes()[9:])


def spoil_values(path: Path) -> None:
    save_file({n: t * torch.nan for n, t in load_file(path).items()}, path, metadata={"cache_key": path.stem})


def spoil_key(path: Path) -> None:
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"cache_key": "f" * 64})


SPOILED: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "junk": lambda p: p.write_bytes(b"junk" * 99),
    "one byte short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "header": spoil_header,
    "nan": spoil_values,
    "another key": spoil_key,
    "no metadata": lambda p: save_file(load_file(p), p),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.cover(most=3)
@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_counts_as_none(case: str, model: torch.nn.Module, own_cache: Path) -> None:
    first = score(model)
    (path,) = files(own_cache)
    SPOILED[case](path)
    again = score(model)
    assert not again.from_cache
    assert same(first, again)
    assert again.metadata == first.metadata
    assert score(model).from_cache == (case != "a folder")  # which is not ours to remove


def test_a_cache_that_cannot_be_written_or_read(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    plain = score(model, cache=False)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/dev/null")):
        monkeypatch.setenv("SSPRUNER_CACHE", str(folder))
        for _ in range(2):
            found = score(model)
            assert not found.from_cache
            assert same(found, plain)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setenv("SSPRUNER_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(cache, "_sources", lambda classes: "code")  # those may be read
    for name in ("mkdir", "is_file", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(cache.Path, name, denied)
            assert same(score(model), plain)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSPRUNER_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("SSPRUNER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "sspruner"
    monkeypatch.delenv("SSPRUNER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / ".cache" / "sspruner"


def test_nobody_at_home(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container whose user has no home there is no cache, unless it is named."""

    def homeless(path: str) -> str:
        return path

    monkeypatch.setattr("os.path.expanduser", homeless)
    assert not score(model).from_cache
    assert score(model).from_cache
    monkeypatch.delenv("SSPRUNER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for _ in range(2):
        assert not score(model).from_cache
    assert not Path("~").exists()


@pytest.mark.parametrize(("scorer", "axis"), [("magnitude", "state"), ("random", "weight"), ("flap", "head")])
def test_quick_ones_and_those_that_change_weights_are_not_kept(
    scorer: str, axis: str, model: torch.nn.Module, own_cache: Path
) -> None:
    for _ in range(2):
        assert not score(model, scorer, axis=axis).from_cache
    assert not files(own_cache)


def test_one_that_changes_weights_spoils_its_whole_job(model: torch.nn.Module, own_cache: Path) -> None:
    scorers = {"state": "ghost", "head": "flap"}
    for _ in range(2):
        assert not score(model, scorers, axis=["state", "head"]).from_cache
    assert not files(own_cache)
    scorers = {"state": "ghost", "head": "magnitude"}
    assert not score(model, scorers, axis=["state", "head"]).from_cache
    assert score(model, scorers, axis=["state", "head"]).from_cache


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "zamba2", "jamba"])
def test_packed_or_shared_or_odd_models(family: str) -> None:
    model = zoo(family, dtype=torch.bfloat16)
    first = score(model)
    assert same(score(model), first)
    assert score(model).from_cache
    buffers = torch.nn.Module()
    buffers.register_buffer("odd", torch.zeros(3, dtype=torch.int8))
    model.extra = buffers
    assert not score(model).from_cache
    assert score(model).from_cache
    buffers.odd[1] = 1
    assert not score(model).from_cache


def test_weights_that_do_not_show_their_bytes_are_not_kept(own_cache: Path) -> None:
    model = tiny_model()

    class Packed(torch.Tensor):
        def view(self, *_: object) -> torch.Tensor:
            raise NotImplementedError("packed")

    model.register_buffer("packed", torch.ones(2).as_subclass(Packed))
    for _ in range(2):
        assert not score(model).from_cache
    assert not files(own_cache)


# prune


def prune(model: torch.nn.Module, **kwargs: Any) -> sspruner.Result:
    asked = {"sparsity": 0.5, "one_shot": True, "calibration": DATA, "cache": True, **kwargs}
    return sspruner.prune(copy.deepcopy(model), "ghost", **asked)


def test_a_one_shot_prune_takes_what_score_has_kept(model: torch.nn.Module) -> None:
    plain = prune(model, cache=False)
    scores = score(model)
    found = prune(model)
    assert found.scores.from_cache
    assert same(found.scores, scores)
    assert found.plan == plain.plan
    assert found.plan.to_json() == plain.plan.to_json()
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, plain.model.get_parameter(name))
    assert prune(model, sparsity=0.25).scores.from_cache  # another budget, the same scores
    assert prune(model, sparsity=0.4, one_shot=False, allocation="global").scores.from_cache


def test_and_score_what_a_one_shot_prune_has_kept(model: torch.nn.Module) -> None:
    found = prune(model)
    assert not found.scores.from_cache
    assert score(model).from_cache
    assert same(score(model), found.scores)


def test_a_sequential_prune_has_nothing_to_do_with_it(model: torch.nn.Module, own_cache: Path) -> None:
    plain = prune(model, one_shot=False, cache=False)
    assert same(prune(model, one_shot=False).scores, plain.scores)
    assert not files(own_cache)
    score(model)
    found = prune(model, one_shot=False)
    assert not found.scores.from_cache
    assert same(found.scores, plain.scores)
    assert not same(found.scores, score(model))
    assert len(files(own_cache)) == 1


# The command line


@pytest.fixture
def cheap(tmp_path: Path) -> list[object]:
    saved_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 100)
    return [tmp_path / "model", "--samples", 2, "--seq-len", 32, "--calibration", tmp_path / "text.txt"]


REMARK = "(from the cache: nothing has changed since; --no-cache scores again)"


@pytest.mark.slow
def test_the_command_line_says_so(cheap: list[object], tmp_path: Path, own_cache: Path) -> None:
    outs = [tmp_path / f"{i}.safetensors" for i in range(5)]
    assert REMARK not in done("score", *cheap, "--out", outs[0]).stdout
    assert REMARK in done("score", *cheap, "--out", outs[1]).stdout
    (kept,) = files(own_cache)
    before = kept.stat().st_mtime_ns
    assert REMARK not in done("score", *cheap, "--out", outs[2], "--no-cache").stdout
    assert kept.stat().st_mtime_ns == before
    first, again, third = (sspruner.Scores.load(out) for out in outs[:3])
    assert same(first, again)
    assert same(first, third)
    assert first.metadata == again.metadata
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    assert REMARK in done("score", moved, *cheap[1:], "--out", outs[3]).stdout
    said = done("score", moved, *cheap[1:], "--scorer", "last", "--scorer", "ghost", "--out", tmp_path / "both").stdout
    last, ghost = said.splitlines()
    assert "scored by last" in last
    assert REMARK not in last
    assert "scored by ghost" in ghost
    assert ghost.endswith(REMARK)


@pytest.mark.slow
def test_the_command_line_of_prune(cheap: list[object], tmp_path: Path) -> None:
    done("score", *cheap, "--out", tmp_path / "s.safetensors")
    said = f"scores of ghost {REMARK}"
    assert said in done("prune", *cheap, "--one-shot", "--out", tmp_path / "a").stdout
    assert REMARK not in done("prune", *cheap, "--one-shot", "--out", tmp_path / "b", "--no-cache").stdout
    assert REMARK not in done("prune", *cheap, "--out", tmp_path / "c").stdout
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    shown = run("prune", *cheap, "--one-shot", "--json", "-")
    assert json.loads(shown.stdout)["one_shot"]
    assert REMARK not in shown.stdout
