"""The layers that keep a cache: read from the graph, before and after a plan, on every family and axis."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest

import sspruner
from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.footprint import footprint
from sspruner.errors import ModelError
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.apply import apply_sizes
from support.family_plans import DELTA, KDA
from support.tiny import half, tiny_model, tokens
from support.zoo import FAMILIES, zoo

INDEXED = ("qwen4_exp_text", "glm5_next_text")  # attention with an indexer, whose keys are not counted
COUNTED = [f for f in FAMILIES if f not in INDEXED]


@pytest.mark.cover(families=4)
@pytest.mark.parametrize("family", COUNTED)
def test_sizes_are_those_of_the_caches(family: str) -> None:
    """Against the footprint, which is tested against transformers' caches. Those keep a column more."""
    model = zoo(family)
    graph = sspruner.trace(model)
    found, memory = cache_layers(model, graph), footprint(model, graph)
    layer = found.layer
    assert found.recurrent * layer.state * 4 == memory.state_bytes
    assert found.recurrent * layer.conv_channels() * layer.kernel * 4 == memory.conv_bytes
    assert found.attention * found.kept() * 4 == memory.kv_bytes_per_token
    assert layer.delta == (family in (*DELTA, *KDA))
    assert (found.dtype, found.family, found.uneven) == ("float32", family, False)
    assert layer.bc_channels == (2 * layer.groups * model_state(model) if layer.groups else 0)


def model_state(model: object) -> int:
    graph = sspruner.trace(model)  # type: ignore[arg-type]
    return graph.layers[0].layout.sizes["state"]


@pytest.mark.cover(families=4)
@pytest.mark.parametrize("family", COUNTED)
def test_a_plan_leaves_the_layers_of_the_cut_model(family: str) -> None:
    model = zoo(family, hidden=16)
    graph = sspruner.trace(model)
    for axis in graph.axes:
        if axis in ("block", "mixer"):
            ((name, group),) = graph.on_axis(axis).items()
            plan = Plan({name: Selection(group.units, (tuple(i for i in range(group.units) if i != 1),))})
        else:
            plan = half(graph, axis)
        before, cut = copy.deepcopy(model), copy.deepcopy(model)
        predicted = cache_layers(before, graph, plan)
        assert predicted == cache_layers(cut, apply_sizes(cut, plan)), axis
        dense = cache_layers(before, graph)
        if axis not in ("block", "mixer"):  # Nemotron-H's second block is an MLP
            smaller = axis in ("state", "head", "head_dim", "group", "channel", "attn_head")
            smaller = smaller and not (axis == "attn_head" and dense.latent)  # one vector for all heads
            assert (predicted != dense) == smaller, axis


@pytest.mark.parametrize("family", INDEXED)
def test_keys_of_an_indexer_are_not_left_out_in_silence(family: str) -> None:
    model = zoo(family)
    with pytest.raises(ModelError, match="engines keep keys of its indexer beside the others, which are not counted"):
        cache_layers(model, sspruner.trace(model))


def test_a_projected_state_keeps_the_rows_of_b_and_c() -> None:
    model = tiny_model(groups=2, state=6)
    graph = sspruner.trace(model)
    plan = sspruner.plan(graph, sspruner.score(model, "balanced", calibration=tokens(4, 32)), keep=2)
    dense, cut = cache_layers(model, graph), cache_layers(model, graph, plan)
    assert cut.layer.state * 6 == dense.layer.state * 2
    assert cut.layer.bc_channels == dense.layer.bc_channels
    assert cut == cache_layers(model, apply_sizes(model, plan))


def test_layers_that_differ_count_in_the_largest_size() -> None:
    model = tiny_model(layers=2, state=6)
    graph = sspruner.trace(model)
    first, second = graph.on_axis("state")
    plan = Plan({first: Selection(6, ((0, 1),)), second: Selection(6, ((0, 1, 2, 3),))})
    dense, cut = cache_layers(model, graph), cache_layers(model, graph, plan)
    assert (cut.uneven, dense.uneven) == (True, False)
    assert cut.layer.state == dense.layer.state * 4 // 6
    assert not cache_layers(model, graph, half(graph, "state")).uneven


def test_what_the_config_says_of_the_state() -> None:
    model = zoo("nemotron_h")
    model.config.mamba_ssm_cache_dtype = "bfloat16"
    found = cache_layers(model, sspruner.trace(model))
    assert found.state_dtype("mamba_ssm_cache_dtype") == "bfloat16"
    assert found.state_dtype("mamba_ssm_dtype") is None


def test_a_block_that_layers_share_has_a_cache_in_each() -> None:
    model = skeleton("zamba2-books")
    found = cache_layers(model, sspruner.trace(model))
    assert (found.recurrent, found.attention, found.kv_heads, found.head_dim) == (6, 3, 6, 64)


def test_a_plan_that_leaves_no_recurrent_layer() -> None:
    model = zoo("nemotron_h")
    graph = sspruner.trace(model)
    ((name, group),) = graph.on_axis("block").items()
    mixers = {site.path for site in graph.layers}
    keep = tuple(i for i, block in enumerate(group.blocks) if not any(m.startswith(f"{block.path}.") for m in mixers))
    with pytest.raises(ModelError, match="leaves no recurrent layer"):
        cache_layers(model, graph, Plan({name: Selection(group.units, (keep,))}))


def test_every_size_counts() -> None:
    """Fields that would be added to a layer must be read, too: this test names all."""
    model = tiny_model(groups=2, heads_per_group=3, head_dim=4, state=5, conv=3)
    layer = cache_layers(model, sspruner.trace(model)).layer
    assert {f.name: getattr(layer, f.name) for f in fields(layer)} == {
        "channels": 24, "state": 120, "kernel": 3, "heads": 6, "groups": 2, "bc_channels": 20, "delta": False,
    }  # fmt: skip
