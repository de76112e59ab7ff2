"""`--max-batch` in a named target: the sequences run in the engine, by its own count, and whole layers in groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.engine_limit import engine_limit, layer_notes
from sspruner.benchmarking.engine_memory import engine_cache
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.serving import EngineOptions
from sspruner.surgery.sizes import sizes
from support.command import refused, run, saved_model, saved_zoo
from support.tiny import half, tokens
from support.zoo import zoo

POOL, CONTEXT = 60_000, 64


def hybrid() -> Any:
    return zoo("granitemoehybrid", state=16)


def in_engine(model: Any, engine: str, pool: float = POOL, **options: Any) -> int:
    """Return the sequences that run at once."""
    layers = cache_layers(model, sspruner.trace(model))
    return engine_cache(engine, layers, EngineOptions(**options)).sequences(pool, CONTEXT)


def keeping(units: int) -> Any:
    """Return the hybrid, cut to so many states in every layer."""
    model = hybrid()
    graph = sspruner.trace(model)
    none = sspruner.Scores({name: torch.zeros(g.groups, g.units) for name, g in graph.on_axis("state").items()})
    return sspruner.apply(model, sspruner.plan(graph, none, keep=units))


@pytest.mark.parametrize("options", [{}, {"prefix_caching": True, "state_dtype": "bfloat16"}])
def test_the_budget_is_met_in_the_engine(options: dict[str, Any]) -> None:
    """The mildest cut whose sequences fit: any state more, and they do not, though the memory is enough on paper."""
    model = hybrid()
    dense = in_engine(model, "vllm", **options)
    wanted = dense + 1
    limits = {"max_batch": wanted, "state_memory": POOL, "context": CONTEXT, **options}
    assert sizes(model, sspruner.trace(model)).states(wanted) < POOL
    result = sspruner.prune(model, "magnitude", target="vllm", calibration=tokens(4, 20), **limits)
    reached = in_engine(model, "vllm", **options)
    assert reached >= wanted
    (kept,) = {group.after for group in result.plan.groups.values()}
    assert all(in_engine(keeping(more), "vllm", **options) < wanted for more in range(kept + 1, 16))
    found = dict(result.report.search["engine"])
    assert bool(found.pop("notes")) is not options.get("prefix_caching", False)  # vLLM would turn it on
    assert found == {
        "name": "vllm", "context": CONTEXT, "pool_bytes": float(POOL), "sequences": {"dense": dense, "pruned": reached},
    }  # fmt: skip
    assert f"{wanted} sequences of 64 tokens in vllm wanted, {dense} before, {reached} fit" in str(result)


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_the_limit_is_that_of_the_engine(engine: str) -> None:
    """Within `memory` the weights come first; the plan's are smaller."""
    model = hybrid()
    graph = sspruner.trace(model)
    now, plan = sizes(model, graph), half(graph, "state")
    after = sizes(model, graph, plan)
    for limits, pool, cut_pool in (
        ({"state_memory": POOL}, POOL, POOL),
        ({"memory": POOL + now.weight_bytes}, POOL, POOL + now.weight_bytes - after.weight_bytes),
    ):
        recipe = Recipe.of(axis="state", target=engine, context=CONTEXT, max_batch=7, **limits)
        limit = engine_limit(model, graph, recipe)
        assert limit is not None
        assert (limit.pool(), limit.pool(plan)) == (pool, cut_pool)
        assert limit.sequences() == in_engine(model, engine, pool)
        assert limit.sequences(plan) == in_engine(sspruner.apply(hybrid(), plan), engine, cut_pool)
        for wanted, fits in ((limit.sequences(), True), (limit.sequences() + 1, False)):
            recipe = Recipe.of(axis="state", target=engine, context=CONTEXT, max_batch=wanted, **limits)
            again = engine_limit(model, graph, recipe)
            assert again is not None
            assert (again.exceeds() == "") is fits
    assert engine_limit(model, graph, Recipe.of(target="hf", max_batch=2, state_memory=POOL)) is None
    assert engine_limit(model, graph, Recipe.of(target=engine, state_bytes=5)) is None


def test_a_limit_that_no_cut_meets_and_one_that_is_met() -> None:
    say = r"max-batch 9000: vllm runs \d+ sequences of 64 tokens in 60.0 kB for caches even with 93.8% of the axis"
    some = {"target": "vllm", "context": CONTEXT, "state_memory": POOL, "calibration": tokens(4, 20)}
    with pytest.raises(sspruner.InputError, match=say):
        sspruner.prune(hybrid(), "magnitude", max_batch=9000, **some)
    dense = in_engine(hybrid(), "vllm")
    with pytest.raises(sspruner.InputError, match=rf"within the limits: vllm runs {dense} sequences of 64 tokens"):
        sspruner.prune(hybrid(), "magnitude", max_batch=dense, **some)


@pytest.mark.parametrize("axis", ["block", "mixer"])
def test_groups_of_layers_are_said_before_a_plan(axis: str) -> None:
    model = zoo("granitemoehybrid", layers="MMMMMMAA", state=2)
    graph = sspruner.trace(model)
    said = layer_notes(model, graph, [axis], Recipe.of(target="vllm", context=CONTEXT))
    assert "vllm counts layers in groups: of 6 recurrent layers, removing fewer than 2 frees nothing" in said
    assert layer_notes(model, graph, ["state"], Recipe.of(target="vllm")) == []
    assert layer_notes(model, graph, [axis], Recipe.of(target="hf")) == []
    assert layer_notes(model, graph, [axis], Recipe.of(target="llama.cpp")) == []  # there each layer counts


def test_the_command_line_says_it_first(tmp_path: Path) -> None:
    folder = saved_zoo(tmp_path / "m", "granitemoehybrid", layers="MMMMMMAA", state=2)
    small = ("--samples", 2, "--seq-len", 16, "--scorer", "magnitude", "--axis", "block", "--keep", 7)
    result = run("prune", folder, "--target", "vllm", *small, "--json", "-")
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("vllm counts layers in groups: ")]
    assert lines, result.stderr
    assert json.loads(result.stdout)["pruned"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--spec", 2), "spec: decides how many sequences an engine holds: give max-batch and target"),
        (("--prefix-caching", "--target", "vllm"), "prefix-caching: decides how many"),
        (("--state-dtype", "int4", "--max-batch", 2, "--state-memory", "1MB"), "state-dtype 'int4': must be one of"),
        (("--context", "4q"), "--context '4q': expected a number of tokens"),
        (("--context", "0"), "--context '0': expected a number of tokens of at least 1"),
        (("--replayssm", "--target", "vllm", "--max-batch", 9, "--state-memory", "1kB"), "vLLM 0.33 has it for"),
    ],
)
def test_options_that_make_no_sense(options: tuple[object, ...], says: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "m", layers=1)
    refused(tmp_path, (says,), "prune", folder, *options)
