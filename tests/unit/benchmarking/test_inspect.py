"""`sspruner inspect`: what a model takes, from its config alone, against caches, reads and published sizes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.benchmarking.footprint import Footprint, footprint
from sspruner.compute.forward import cache_in, forward
from sspruner.errors import ModelError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.recipes.parts import Limits
from sspruner.surgery.apply import apply_sizes
from sspruner.surgery.sizes import sizes
from support.command import done, refused
from support.footprints import CONTEXT, config_alone, taken
from support.published import CONFIGS, DIGITS, PUBLISHED
from support.tiny import half, tiny_model, tokens
from support.zoo import FAMILIES, zoo


def cached(model: Any) -> tuple[int, int, int]:
    """Bytes per sequence that the model's own cache holds after CONTEXT tokens: recurrent, convolution, keys/values."""
    batch = 2
    out = forward(model, tokens(batch, CONTEXT), use_cache=True)
    (cache,) = cache_in(out).values()
    found = []
    for kinds in (("recurrent_states",), ("conv_states",), ("keys", "values")):
        held = [getattr(layer, kind, None) for layer in cache.layers for kind in kinds]
        flat = [t for h in held for t in (h.values() if isinstance(h, dict) else [h]) if t is not None]
        found.append(sum(t.numel() * t.element_size() for t in flat) // batch)
    return found[0], found[1], found[2]


def cut_of(graph: SSMGraph, axis: str) -> Plan:
    """Half of an axis; of blocks the second: in zamba and zamba2 that whose parameters others share."""
    if axis in ("block", "mixer"):
        ((name, group),) = graph.on_axis(axis).items()
        return Plan({name: Selection(group.units, (tuple(i for i in range(group.units) if i != 1),))})
    return half(graph, axis)


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_hold_what_is_predicted(family: str, dtype: torch.dtype) -> None:
    model = zoo(family, dtype=dtype)
    found = taken(model)
    assert cached(model) == (found.state_bytes, found.conv_bytes, found.kv_bytes)
    assert found.sequence_bytes == sum(cached(model))
    assert (found.kv_bytes > 0) == (family not in ("mamba2", "mamba", "falcon_mamba"))


@pytest.mark.ci_cover(families=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_the_sizes_of_every_cut(family: str, tmp_path: Path) -> None:
    """Real cut = cut of a model without weights = what a config that records the cut describes, on every axis."""
    dense = sspruner.save(zoo(family, dtype=torch.bfloat16, hidden=16), tmp_path / "dense")
    for file in dense.glob("*.safetensors"):
        file.unlink()
    graph = sspruner.trace(skeleton(dense))
    assert taken(skeleton(dense)) == taken(zoo(family, dtype=torch.bfloat16, hidden=16))
    for axis in graph.axes:
        plan = cut_of(graph, axis)
        real = sspruner.apply(zoo(family, dtype=torch.bfloat16, hidden=16), plan)
        expected = taken(real)
        assert cached(real) == (expected.state_bytes, expected.conv_bytes, expected.kv_bytes), axis
        bare = skeleton(dense)
        assert apply_sizes(bare, plan).to_json() == sspruner.trace(real).to_json(), axis
        assert taken(bare) == expected, axis
        folder = sspruner.save(real, tmp_path / axis)
        saved = skeleton(folder)
        assert saved.config.to_dict() == sspruner.load(folder)[0].config.to_dict(), axis
        assert all(p.is_meta for p in saved.parameters())
        assert taken(saved) == expected, axis


@pytest.mark.slow
def test_projections_and_new_biases_without_weights(tmp_path: Path) -> None:
    folder = sspruner.save(zoo("mamba2", bias=False), tmp_path / "dense")
    bias = "backbone.layers.1.mixer.out_proj.bias"
    for scorer in ("balanced", "ghost"):
        model, _ = sspruner.load(folder)
        graph = sspruner.trace(model)
        plan = sspruner.plan(graph, sspruner.score(model, scorer, calibration=tokens(4, 32)), keep=2)
        if scorer == "ghost":
            plan = replace(plan, updates={bias: torch.ones(model.config.hidden_size)})
        expected = taken(sspruner.apply(model, plan))
        bare = skeleton(folder)
        apply_sizes(bare, plan)
        assert taken(bare) == expected != taken(skeleton(folder))
        assert taken(skeleton(sspruner.save(model, tmp_path / scorer))) == expected


@torch.no_grad()
def reads(model: Any) -> int:
    """Bytes of weights that one decode step reads whatever the batch: each module's own, as often as it is called; of
    a module whose weights its parent uses itself (a convolution), as often as the parent is."""
    calls: Counter[int] = Counter()
    handles = [m.register_forward_hook(lambda m, _args, _out: calls.update([id(m)])) for m in model.modules()]
    forward(model, tokens(1, 1), use_cache=False)
    for handle in handles:
        handle.remove()
    modules = dict(model.named_modules(remove_duplicate=False))
    table, total = model.get_input_embeddings(), 0
    for path, module in modules.items():
        if module is table:
            continue
        times = calls[id(module)] or calls[id(modules[path.rpartition(".")[0]])]
        own = [p for p in module.parameters(recurse=False) if not (p.ndim == 3 and "experts" in path)]
        total += times * sum(p.numel() * p.element_size() for p in own)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_as_often_as_they_are_used(family: str) -> None:
    model = zoo(family)
    found = taken(model)
    assert found.fixed_read_bytes == reads(model)
    tied = family in ("zamba", "zamba2")
    assert found.row_bytes == (0 if tied else 4 * text_config(model.config).hidden_size)
    if not tied and not found.expert_bytes:
        assert found.fixed_read_bytes == found.weight_bytes - 31 * found.row_bytes  # all but the table


def test_bytes_of_a_step() -> None:
    """By hand: 1 MB of weights, 10 B a row, 3 experts of 100 B of which a token takes 2, states of 7 B, KV of 5 B."""
    some = Footprint("bfloat16", 1, 10**6, 4, 3, 5, 100, 900_000, 10, expert_bytes=300, experts=3, experts_per_token=2)
    assert some.step_bytes(1) == 900_000 + 10 + 200 + 2 * 7 + 5 * 100 + 5
    assert some.step_bytes(4) == 900_000 + 40 + 300 + 4 * (2 * 7 + 5 * 100 + 5)
    assert some.ceiling(4, 1e9) == 4 * 1e9 / some.step_bytes(4)
    assert some.sequence_bytes == 4 + 3 + 500
    assert [some.sequences(10**6 + n) for n in (-1, 506, 507, 1014)] == [0, 0, 1, 2]


@pytest.mark.parametrize("family", ["jamba", "granitemoehybrid", "nemotron_h"])
def test_experts_are_read_where_tokens_go(family: str) -> None:
    found = taken(zoo(family))
    assert (found.experts, found.experts_per_token) == (6 if family == "nemotron_h" else 3, 2)
    batches = [found.step_bytes(b + 1) - found.step_bytes(b) for b in (1, 2, 3, 4)]
    per_expert = found.expert_bytes // found.experts
    same = [gain - per_expert * more for gain, more in zip(batches, [2, 2, 0, 0], strict=True)]
    assert (len(set(same)) == 1) == (family == "nemotron_h")  # 6 experts: two new ones for each of three tokens
    assert batches[2] == batches[3]


def test_sequences_that_fit_are_those_of_the_limits() -> None:
    model = tiny_model()
    graph = sspruner.trace(model)
    found, memory = footprint(model, graph, context=0), 123_456.0
    many = found.sequences(memory)
    assert many > 1
    for batch, fits in ((many, True), (many + 1, False)):
        limits = Limits(max_batch=batch, memory=memory)
        assert (sizes(model, graph).exceeds(limits, sizes(model, graph)) == "") is fits


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("name", CONFIGS)
def test_published_models(name: str, tmp_path: Path) -> None:
    """Built from config.json alone; no parameter has values; the total is the published one."""
    model = skeleton(config_alone(tmp_path / "model", CONFIGS[name]))
    assert all(p.is_meta for p in model.parameters())
    found = taken(model, 4096)
    assert abs(found.parameters - PUBLISHED[name]) <= DIGITS.get(name, 0) / 2
    assert found.weight_bytes == 2 * found.parameters
    assert (found.kv_bytes > 0) == (name.startswith(("Zamba2", "Nemotron")))


@pytest.mark.slow
def test_100_mb_of_state_for_mamba2_of_13_billion(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model", CONFIGS["Mamba2-1.3B"])
    found = json.loads(done("inspect", folder, "--memory", "24GB", "--json", "-").stdout)["footprint"]
    assert found["state_bytes"] == 48 * 64 * 64 * 128 * 4 == 100_663_296
    assert found["conv_bytes"] == 48 * (4096 + 2 * 128) * 4 * 2
    assert found["parameters"] == 1_343_757_312
    assert found["sequences"] == (24 * 10**9 - 2 * 1_343_757_312) // (found["state_bytes"] + found["conv_bytes"])
    shown = done("inspect", folder).stdout
    assert "101 MB" in shown
    assert "weights in bfloat16, as config.json says" in shown


@pytest.mark.slow
def test_each_layer_of_zamba2_has_a_kv_cache(tmp_path: Path) -> None:
    """96 KiB a token for the 1.2B: six layers, 32 heads of 128; the one block that they share is read six times."""
    model = skeleton(config_alone(tmp_path / "model", CONFIGS["Zamba2-1.2B"]))
    found = taken(model, 4096)
    assert found.kv_bytes_per_token == 6 * 2 * 32 * 128 * 2 == 96 * 1024
    block = model.model.layers[5].shared_transformer
    shared = sum(p.numel() for name, p in block.named_parameters() if "adapter" not in name)
    assert found.fixed_read_bytes == 2 * (found.parameters + 5 * shared)


@pytest.mark.slow
def test_a_plan_is_shown_beside_the_model(tmp_path: Path) -> None:
    model = zoo("bamba", dtype=torch.bfloat16)
    folder = sspruner.save(model, tmp_path / "model")
    graph = sspruner.trace(model)
    plan = tmp_path / "plan.json"
    made = Plan({**half(graph, "state").groups, **half(graph, "attn_head").groups}, {"fingerprint": "of another"})
    made.save(plan)
    (folder / "model.safetensors").unlink()
    options = ("--plan", plan, "--memory", "1MB", "--batch", "1,8", "--context", CONTEXT, "--bandwidth", "2TB/s")
    data = json.loads(done("inspect", folder, *options, "--json", "-").stdout)
    before, after = taken(model), taken(sspruner.apply(model, replace(made, model={})))
    for found, expected in ((data["footprint"], before), (data["with_plan"], after)):
        assert found == expected.to_json((1, 8), 1e6, 2e12)
        assert [step["batch"] for step in found["decode"]] == [1, 8]
        assert [step["tokens_per_second"] for step in found["decode"]] == [expected.ceiling(b, 2e12) for b in (1, 8)]
    assert data["parameters"] == before.parameters  # the graph is that of the model
    shown = done("inspect", folder, *options).stdout
    assert f"{after.state_bytes / before.state_bytes:.3f}x" in shown
    assert f"{before.step_bytes(8) / after.step_bytes(8):.3f}x" in shown
    assert f"{after.sequences(1e6):,}" in shown
    assert f"{after.ceiling(8, 2e12):,.0f}" in shown
    assert "tokens/s" not in done("inspect", folder).stdout


@pytest.mark.slow
def test_a_dtype_that_the_config_does_not_name(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIGS["Mamba2-130M"].items() if name != "dtype"}
    folder = config_alone(tmp_path / "model", config)
    assert taken(skeleton(folder)).weight_bytes == 4 * 128_989_632
    assert "weights in float32, assumed, for config.json names no dtype" in done("inspect", folder).stdout


SMALL = {
    "model_type": "mamba2",
    "hidden_size": 8,
    "num_heads": 4,
    "head_dim": 4,
    "state_size": 6,
    "vocab_size": 31,
    "n_groups": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "many"},
        {"hidden_size": 10**12},
        {"hidden_size": 0},
        {"state_size": 0},
        {"state_size": -3},
        {"state_size": 10**8},
        {"vocab_size": 10**30},
        {"num_heads": 5},
        {"head_dim": None},
        {"dtype": "float33"},
        {"sspruner": {"version": 1}},
        {"sspruner": {"version": 1, "stock": {}, "cuts": [{"version": 1, "groups": {"a:state": {}}}]}},
    ],
)
def test_configs_that_make_no_model(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config_alone(tmp_path / "model", {"num_hidden_layers": 1, **SMALL, **config})
    refused(tmp_path, (), "inspect", "./model")


def test_a_good_small_config(tmp_path: Path) -> None:
    """What the test above spoils is fine in itself."""
    done("inspect", config_alone(tmp_path / "model", {"num_hidden_layers": 1, **SMALL}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--batch 0", "--batch '0': expected whole numbers"),
        ("--batch 1,x", "--batch '1,x': expected whole numbers"),
        ("--batch ,", "--batch ',': expected whole numbers"),
        ("--context -1", "--context"),
        ("--memory much", "--memory 'much': expected a size"),
        ("--bandwidth 3TB", "--bandwidth '3TB': expected a rate such as 3.35TB/s"),
        ("--plan none.json", "plan none.json: cannot be read"),
        ("--plan other.json", "the nearest is backbone.layers.0.mixer:state"),
    ],
)
def test_options_that_make_no_sense(options: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config_alone(tmp_path / "model", {"num_hidden_layers": 1, **SMALL})
    Plan({"backbone.layers.7.mixer:state": Selection(6, ((0, 1),))}).save("other.json")
    refused(tmp_path, (says,), "inspect", "./model", *options.split())


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(sspruner.InputError, match="no such path"):
        skeleton(tmp_path / "none")
    with pytest.raises(ModelError, match="model type"):
        skeleton(config_alone(tmp_path / "model", {"model_type": "unrecognised_type"}))
