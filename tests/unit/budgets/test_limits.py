"""Budgets in users' units: what the texts mean, and sizes that are what a real cut has."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.compute.forward import cache_in
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection, Selection
from sspruner.recipes.parts import Limits
from sspruner.surgery.proof import measured_state_bytes
from sspruner.surgery.sizes import Sizes, sizes
from sspruner.testing.plans import directions, plans, random_plan
from support.examples import examples
from support.tiny import tokens
from support.zoo import FAMILIES, zoo, zoo_models


@pytest.mark.parametrize(
    ("option", "text", "field", "value"),
    [
        ("state_bytes", "25MB", "state_bytes", 25e6),
        ("state_bytes", "25 MiB", "state_bytes", 25 * 2**20),
        ("state_bytes", "1.5kB", "state_bytes", 1500),
        ("state_bytes", "2KiB", "state_bytes", 2048),
        ("state_bytes", "4000", "state_bytes", 4000),
        ("state_bytes", "4000B", "state_bytes", 4000),
        ("state_bytes", "1e6", "state_bytes", 1e6),
        ("state_bytes", "1E3 KB", "state_bytes", 1e6),
        ("state_bytes", ".5MB", "state_bytes", 5e5),
        ("params", "0.8x", "parameters", 0.8),
        ("params", "900M", "parameters", 9e8),
        ("params", "1.1B", "parameters", 1.1e9),
        ("params", "3800000", "parameters", 3.8e6),
        ("max_ppl_increase", "1%", "perplexity_increase", 0.01),
        ("max_ppl_increase", "0.5 %", "perplexity_increase", 0.005),
        ("max_ppl_increase", "0.02", "perplexity_increase", 0.02),
        ("max_kl", 0.01, "kl", 0.01),
    ],
)
def test_what_texts_mean(option, text, field, value):
    limits = Limits(**{field: text})
    assert getattr(limits, field) == pytest.approx(value)
    assert limits.to_json() == {field: pytest.approx(value)}


def test_memory_and_batch_go_together():
    limits = Limits(max_batch=256, memory="80GB", state_bytes=None)
    assert (limits.max_batch, limits.memory, limits.of_size, limits.of_damage) == (256, 80e9, True, False)
    assert not Limits(state_bytes=None, kl=None)
    for half in ({"max_batch": 4}, {"memory": "1GB"}):
        with pytest.raises(sspruner.InputError, match="max-batch and memory go together"):
            Limits(**half)


@pytest.mark.parametrize(
    "text",
    ["", "MB", "25XB", "25MBit", "-25MB", "1.2.3MB", "nan", "inf", "twenty", "25%", "0MB", "1i", "1e999", "٢٥MB"],
)
def test_what_is_no_size(text):
    with pytest.raises(sspruner.InputError, match=r"--state-bytes '.*': "):
        Limits(state_bytes=text)


@pytest.mark.parametrize("text", ["1.5x", "x", "0x", "0.8", "1%", "-1x", "0.8 what"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(sspruner.InputError, match=r"--params '"):
        Limits(parameters=text)


@pytest.mark.parametrize("given", [{"kl": -1}, {"kl": float("nan")}, {"max_batch": 0, "memory": 1}, {"state_bytes": 0}])
def test_limits_are_above_zero(given):
    with pytest.raises(sspruner.InputError, match="must be a number above 0"):
        Limits(**given)


def conv_bytes(model: torch.nn.Module) -> int:
    """Of the convolution states in the model's own cache, per sequence."""
    probe = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad():
        out = model(input_ids=probe, use_cache=True)
    found = 0
    (cache,) = cache_in(out).values()
    for layer in cache.layers:
        states = getattr(layer, "conv_states", None) or []
        for state in states.values() if isinstance(states, dict) else states:
            found += state.numel() * state.element_size() if state is not None else 0
    return found // 2


def measured(model: torch.nn.Module) -> Sizes:
    probe = torch.zeros(2, 5, dtype=torch.int64)
    return Sizes(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() * p.element_size() for p in model.parameters()),
        measured_state_bytes(model, probe),
        conv_bytes(model),
    )


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_model(family, dtype):
    model = zoo(family).to(dtype)
    assert sizes(model, sspruner.trace(model)) == measured(model)


@pytest.mark.slow
@examples(40)
@given(data=st.data(), projected=st.booleans())
def test_predicted_sizes_are_those_of_the_real_cut(data, projected):
    model = data.draw(zoo_models())
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    if projected:
        plan = directions(plan, graph, seed=data.draw(st.integers(0, 99)))
    predicted = sizes(model, graph, plan)
    sspruner.apply(model, plan)
    assert predicted == measured(model)


def last_dropped(graph: sspruner.SSMGraph, axis: str) -> tuple[str, Selection, str]:
    """The dependency group of whole modules without the last one that holds a mixer, and the path of that mixer."""
    (group,) = graph.on_axis(axis).values()
    unit, mixer = max(
        (unit, site.path)
        for unit, block in enumerate(group.blocks)
        for site in graph.layers
        if f"{site.path}.".startswith(f"{block.path}.")
    )
    return group.name, Selection(group.units, (tuple(i for i in range(group.units) if i != unit),)), mixer


@pytest.mark.cover
@pytest.mark.parametrize("axis", ["block", "mixer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_go_take_their_convolution_states_with_them(family, axis):
    model = zoo(family)
    graph = sspruner.trace(model)
    if axis not in graph.axes:
        assert axis == "mixer"
        return
    name, selection, _ = last_dropped(graph, axis)
    plan = Plan({name: selection})
    predicted = sizes(model, graph, plan)
    sspruner.apply(model, plan)
    assert predicted == measured(model)


@pytest.mark.cover
@pytest.mark.parametrize("family", ["mamba2", "bamba", "zamba2"])
@pytest.mark.parametrize("also", ["block", "group"])
@pytest.mark.parametrize("again", [False, True])
def test_bases_of_what_goes_are_not_counted(family, also, again):
    model = zoo(family)
    graph = sspruner.trace(model)
    name, selection, mixer = last_dropped(graph, "block")
    if again:  # on top of a basis that the mixer has
        state = graph.groups[f"{mixer}:state"]
        whole = Selection(state.units, (tuple(range(state.units - 1)),) * state.groups)
        sspruner.apply(model, directions(Plan({state.name: whole}), graph, seed=3))
        graph = sspruner.trace(model)
    if also == "group":
        sets = graph.groups[f"{mixer}:group"]
        name, selection = sets.name, Selection(sets.units, (tuple(range(1, sets.units)),))
    state = graph.groups[f"{mixer}:state"]
    half = Selection(state.units, (tuple(range(state.units // 2)),) * state.groups)
    plan = directions(Plan({state.name: half, name: selection}), graph, seed=4)
    assert isinstance(plan.groups[state.name], Projection)
    predicted = sizes(model, graph, plan)
    sspruner.apply(model, plan)
    assert predicted == measured(model)


def test_a_mixer_without_a_convolution_has_no_state_of_one():
    model = zoo("mamba2")
    graph = sspruner.trace(model)
    whole = sizes(model, graph)
    for site in graph.layers:
        del model.get_submodule(site.path).conv1d
    assert sizes(model, graph) == replace(whole, conv_bytes=0)


def test_biases_that_a_refit_adds_are_counted():
    model = zoo("mamba2", bias=False)
    graph = sspruner.trace(model)
    plan = random_plan(graph, ("head",), seed=1)
    path = f"{next(iter(plan.groups)).removesuffix(':head')}.out_proj.bias"
    width = model.config.hidden_size
    plan = Plan(plan.groups, updates={path: torch.ones(width)})
    predicted = sizes(model, graph, plan)
    cut = copy.deepcopy(model)
    sspruner.apply(cut, plan)
    assert predicted == measured(cut)


def test_a_limit_that_is_exceeded_says_by_what():
    dense = Sizes(1000, 4000, 800, 200)
    assert not dense.exceeds(Limits(state_bytes=800, parameters=1.0, max_batch=2, memory=6000), dense)
    assert "800 B of state per sequence" in dense.exceeds(Limits(state_bytes=799), dense)
    assert "2 sequences take 6,000 B" in dense.exceeds(Limits(max_batch=2, memory=5999), dense)
    assert "params 800: 1,000 parameters" in dense.exceeds(Limits(parameters=0.8), dense)
    assert "params 999: 1,000 parameters" in dense.exceeds(Limits(parameters=999), dense)


@pytest.mark.parametrize("value", ["1", "2.5", 1, 100])
def test_an_increase_that_may_be_meant_as_a_percentage_is_refused(value):
    with pytest.raises(sspruner.InputError, match=rf"--max-ppl-increase {value}: as a fraction .* mean {value}%\?"):
        Limits(perplexity_increase=value)
    assert Limits(perplexity_increase="100%").perplexity_increase == 1
    assert Limits(perplexity_increase=1.0).perplexity_increase == 1  # as recipes are written


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_memory_of_states_alone(family):
    """The states of so many sequences, convolution included, and no weights."""
    model = zoo(family)
    now = sizes(model, sspruner.trace(model))
    each = now.state_bytes + now.conv_bytes
    assert not now.exceeds(Limits(max_batch=8, state_memory=8 * each), now)
    why = now.exceeds(Limits(max_batch=8, state_memory=8 * each - 1), now)
    assert why == f"state-memory {8 * each - 1:,}: the states of 8 sequences take {8 * each:,} B"
    limits = {"max_batch": 8, "state_memory": 8 * each - 1}
    result = sspruner.prune(model, "magnitude", calibration=tokens(4, 20), **limits)
    assert not sizes(model, sspruner.trace(model)).exceeds(Limits(**limits), now)
    assert "memory for the states of 8 sequences: " in str(result)
    with pytest.raises(sspruner.InputError, match="max-batch and state-memory"):
        Limits(state_memory=5)
