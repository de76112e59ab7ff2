"""The graph: index maps, counts, printing; and a family from a plugin, with a fold, through the whole engine."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.graph.family import Family, Projected
from sspruner.graph.group import DependencyGroup, as_rows, drop_rows
from sspruner.graph.layout import Fold, Layout, Rows, Slot
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.plugins.manager import plugin_manager
from sspruner.surgery.slice import slice_model
from support.examples import examples
from support.family_plans import AXES, DELTA, KDA, WITH_EXPERTS
from support.tiny import models, selections, tiny_model
from support.zoo import FAMILIES, zoo, zoo_models

Owned = dict[tuple[str, tuple[int, ...]], list[int]]  # (tensor, dims) -> rows


def found(group: DependencyGroup, g: int, unit: int) -> Owned:
    """The rows that one unit owns, tensor by tensor, as the graph says: each once."""
    rows: Owned = {}
    for m in group.members:
        rows.setdefault((m.tensor.removeprefix(f"{group.layer}."), m.dims), []).extend(m.index[g, unit].tolist())
    assert all(len(r) == len(set(r)) for r in rows.values())
    return {key: sorted(r) for key, r in rows.items()}


def there(mixer: nn.Module, expected: Owned) -> Owned:
    """Of the expected rows those whose tensor this mixer has: biases are optional."""
    held = {n for n, t in [*mixer.named_parameters(), *mixer.named_buffers()]}
    return {(tensor, dims): sorted(rows) for (tensor, dims), rows in expected.items() if tensor in held}


def mamba2_unit(mixer: nn.Module, axis: str, g: int, unit: int) -> Owned:
    """in_proj [z: D | x: D | B: G*N | C: G*N | dt: H], conv [x: D | B: G*N | C: G*N], written out again by hand."""
    D, G, N, P, H = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size, mixer.head_dim, mixer.num_heads
    K = H // G
    if axis == "state":  # set g: one B/C group
        heads, channels, states = [], [], [g * N + unit]
    elif axis == "head":  # set g: the heads of one B/C group
        heads, states = [g * K + unit], []
        channels = [heads[0] * P + p for p in range(P)]
    elif axis == "head_dim":  # set g: one head
        heads, channels, states = [], [g * P + unit], []
    else:  # a B/C group with all its heads
        heads, states = [unit * K + k for k in range(K)], [unit * N + n for n in range(N)]
        channels = [h * P + p for h in heads for p in range(P)]
    conv = [*channels, *(D + n for n in states), *(D + G * N + n for n in states)]
    in_proj = [*channels, *(D + c for c in conv), *(2 * D + 2 * G * N + h for h in heads)]
    rows = {
        **dict.fromkeys((("in_proj.weight", (0,)), ("in_proj.bias", (0,)), ("mup_vector", (2,))), in_proj),
        **dict.fromkeys((("conv1d.weight", (0,)), ("conv1d.bias", (0,))), conv),
        **dict.fromkeys((("dt_bias", (0,)), ("A_log", (0,)), ("D", (0,))), heads),
        **dict.fromkeys((("norm.weight", (0,)), ("out_proj.weight", (1,))), channels),
    }
    return {key: r for key, r in rows.items() if r}


def mamba1_unit(mixer: nn.Module, axis: str, g: int, unit: int) -> Owned:
    """in_proj [x: D | z: D], x_proj [dt: R | B: N | C: N], dt_proj (D, R), A_log (D, N), D (D)."""
    D, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
    if axis == "state":
        norms = {(f"{letter}_layernorm.weight", (0,)): [unit] for letter in "bc"}
        return {("x_proj.weight", (0,)): [R + unit, R + N + unit], ("A_log", (1,)): [unit], **norms}
    if axis == "dt_rank":
        jamba = {("dt_layernorm.weight", (0,)): [unit]} if type(mixer).__name__.startswith("Jamba") else {}
        return {("x_proj.weight", (0,)): [unit], ("dt_proj.weight", (1,)): [unit], **jamba}
    one = [("conv1d.weight", (0,)), ("conv1d.bias", (0,)), ("x_proj.weight", (1,)), ("dt_proj.weight", (0,)),
           ("dt_proj.bias", (0,)), ("A_log", (0,)), ("D", (0,)), ("out_proj.weight", (1,))]  # fmt: skip
    if type(mixer).__name__.startswith("FalconMamba"):
        one.append(("dt_layernorm.weight", (0,)))  # ones, as wide as D though they norm R
    return {key: [unit] for key in one} | {
        (name, (0,)): [unit, D + unit] for name in ("in_proj.weight", "in_proj.bias")
    }


def zamba_unit(mixer: nn.Module, axis: str, g: int, unit: int) -> Owned:
    """in_proj rows 2c: x_c, 2c+1: z_c, c = h*P + p; by head h: x_proj_weight (h, R+2N, P), dt_proj_weight (h, P, R)."""
    P, N, R = mixer.mamba_head_dim, mixer.ssm_state_size, mixer.time_step_rank
    if axis == "state":  # set g: one head
        start = g * (R + 2 * N) + R + unit
        return {("x_proj_weight", (0, 1)): [start, start + N], ("A_log", (0, 2)): [g * N + unit]}
    if axis == "dt_rank":
        return {("x_proj_weight", (0, 1)): [g * (R + 2 * N) + unit], ("dt_proj_weight", (0, 2)): [g * R + unit]}
    channels = [g * P + unit] if axis == "head_dim" else [unit * P + p for p in range(P)]
    rows = dict.fromkeys((("conv1d.weight", (0,)), ("conv1d.bias", (0,)), ("out_proj.weight", (1,))), channels)
    for name in ("in_proj.weight", "in_proj.bias"):
        rows[name, (0,)] = [2 * c + i for c in channels for i in (0, 1)]
    by_head = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    if axis == "head":
        return rows | {(name, (0,)): [unit] for name in by_head}
    return rows | {(name, (0, 2 if name == "x_proj_weight" else 1)): channels for name in by_head}


def kda_unit(mixer: nn.Module, axis: str, g: int, unit: int) -> Owned:
    """q, k, decay (H, K), v, gate (H, V), b, A_log (H), conv [q: H*K | k: H*K | v: H*V], o_norm (V,), o_proj (H, V)."""
    H, K, V = len(mixer.b_proj.weight), len(mixer.q_proj.weight), len(mixer.v_proj.weight)
    K, V = K // H, V // H
    if axis == "state":  # set g: one head
        keys, values = [g * K + unit], []
    elif axis == "head_dim":  # set g: one head
        keys, values = [], [g * V + unit]
    else:
        keys, values = [unit * K + n for n in range(K)], [unit * V + p for p in range(V)]
    heads = [unit] * (axis == "head")
    gate = ("forget_gate.f_proj.weight", "forget_gate.f_b_proj.weight", "forget_gate.dt_bias")
    rows = {
        **dict.fromkeys([(n, (0,)) for n in ("q_proj.weight", "k_proj.weight", *gate)], keys),
        **dict.fromkeys([(n, (0,)) for n in ("v_proj.weight", "g_proj.weight", "g_b_proj.weight")], values),
        ("conv1d.weight", (0,)): [*keys, *(H * K + n for n in keys), *(2 * H * K + p for p in values)],
        ("b_proj.weight", (0,)): heads,
        ("forget_gate.A_log", (2 if mixer.forget_gate.A_log.ndim == 4 else 0,)): heads,
        ("o_proj.weight", (1,)): values,
    }
    return {key: r for key, r in rows.items() if r}


def delta_unit(mixer: nn.Module, axis: str, g: int, unit: int) -> Owned:
    """conv [q: G*K | k: G*K | v: G*R*V]; rows of q, k (G, K), v, z (G, R, V), b, a (G, R) in one tensor or several."""
    G, H, K, V = mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim
    R = H // G
    keys: list[tuple[int, int]] = []  # (key head, channel)
    heads: list[tuple[int, int]] = []  # (key head, value head of it)
    values: list[tuple[int, int, int]] = []  # (key head, value head of it, channel)
    if axis == "state":
        keys = [(g, unit)]
    elif axis == "head_dim":  # set g: one value head
        values = [(*divmod(g, R), unit)]
    elif axis == "head":
        heads, values = [(g, unit)], [(g, unit, p) for p in range(V)]
    else:
        keys, heads = [(unit, n) for n in range(K)], [(unit, r) for r in range(R)]
        values = [(unit, r, p) for r in range(R) for p in range(V)]
    k, h, v = [a * K + n for a, n in keys], [a * R + r for a, r in heads], [(a * R + r) * V + p for a, r, p in values]
    out = "o_proj" if hasattr(mixer, "o_norm") else "out_proj"
    conv = [*k, *(G * K + n for n in k), *(2 * G * K + p for p in v)]
    rows: Owned = {
        ("conv1d.weight", (0,)): conv,
        **dict.fromkeys([("dt_bias", (0,)), ("A_log", (0,))], h),
        (f"{out}.weight", (1,)): v,
    }
    if hasattr(mixer, "in_proj_qkvz"):  # for each key head [ q | k | v | z ] and [ b | a ]
        width = 2 * K + 2 * R * V
        at = [a * width + n + i * K for a, n in keys for i in (0, 1)]
        at += [a * width + 2 * K + r * V + p + i * R * V for a, r, p in values for i in (0, 1)]
        rows |= {("in_proj_qkvz.weight", (0,)): at}
        rows |= {("in_proj_ba.weight", (0,)): [a * 2 * R + r + i * R for a, r in heads for i in (0, 1)]}
    elif hasattr(mixer, "in_proj_qkv"):
        rows |= {("in_proj_qkv.weight", (0,)): conv, ("in_proj_z.weight", (0,)): v}
        rows |= {(f"in_proj_{name}.weight", (0,)): h for name in "ba"}
    else:
        rows |= {(f"{name}_proj.weight", (0,)): part for name, part in zip("qkvgba", (k, k, v, v, h, h), strict=True)}
    return {key: r for key, r in rows.items() if r}


MAMBA1 = ("mamba", "falcon_mamba", "jamba")
UNITS = {f: zamba_unit if f == "zamba" else mamba1_unit if f in MAMBA1 else mamba2_unit for f in FAMILIES}
UNITS |= dict.fromkeys(KDA, kda_unit) | dict.fromkeys(DELTA, delta_unit)


@examples(25)
@given(st.one_of(zoo_models(), models()))
def test_members_are_where_the_notes_say(model: nn.Module) -> None:
    """Every unit of every axis of every mixer, and nothing beside it."""
    graph = sspruner.trace(model)
    for layer in graph.layers:
        mixer = model.get_submodule(layer.path)
        for group in graph.groups_of(layer):
            for g in range(group.groups):
                for unit in range(group.units):
                    expected = UNITS[layer.kind](mixer, group.axis, g, unit)
                    assert found(group, g, unit) == there(mixer, expected), (group.name, g, unit)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_axes_of_a_mixer(family: str) -> None:
    """Which there are, and sets x units: 2 groups of 2 heads of 4 channels, 6 states; in Mamba1 16 channels, rank 3."""
    graph = sspruner.trace(zoo(family))
    P = {"granitemoehybrid": 16, "zamba": 8}.get(family, 4)
    if UNITS[family] is mamba2_unit:
        own = {"state": (2, 6), "head": (2, 2), "head_dim": (4, P), "group": (1, 2)}
    elif UNITS[family] is delta_unit:
        own = {"state": (2, 6), "head": (2, 2), "head_dim": (4, 4), "group": (1, 2)}
    elif UNITS[family] is kda_unit:
        own = {"state": (2, 6), "head": (1, 2), "head_dim": (2, 6)}
    elif family == "zamba":
        own = {"state": (2, 6), "head": (1, 2), "head_dim": (2, P), "dt_rank": (2, 3)}
    else:
        own = {"state": (1, 6), "channel": (1, 16), "dt_rank": (1, 3)}
    for layer in graph.layers:
        assert {g.axis: (g.groups, g.units) for g in graph.groups_of(layer)} == own
        assert layer.kind == family
    around = {"hidden", "block"} & set(AXES[family])
    if family not in ("mamba2", "mamba", "falcon_mamba"):
        around |= {"attn_head", "mlp"}
    if family in WITH_EXPERTS:
        around |= {"expert", "expert_mlp"} | ({"latent"} if family == "nemotron_h" else set())
    if "mixer" in AXES[family]:  # an MLP is left, or attention
        around |= {"mixer"}
    assert set(graph.axes) == {*own, *around}
    assert "group" not in sspruner.trace(zoo(family, groups=1)).axes


@examples(25)
@given(zoo_models(), st.data())
def test_units_and_bytes_add_up(model: nn.Module, data: st.DataObject) -> None:
    """Totals; and on every axis: parameters and state of the units make up what is cut if all but some go."""
    graph = sspruner.trace(model)
    assert graph.parameters == sum(p.numel() for p in model.parameters())
    assert graph.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in graph.layers:
        mixer = model.get_submodule(layer.path)
        if hasattr(mixer, "forget_gate"):
            channels, states = len(mixer.v_proj.weight), len(mixer.k_proj.weight) // mixer.num_heads
        elif hasattr(mixer, "head_k_dim"):
            channels, states = mixer.num_v_heads * mixer.head_v_dim, mixer.head_k_dim
        else:
            channels, states = mixer.intermediate_size, mixer.ssm_state_size
        assert layer.state_bytes == channels * states * 4
        for group in graph.groups_of(layer):
            in_state = group.axis != "dt_rank"
            assert group.groups * group.units * group.state_bytes_per_unit == layer.state_bytes * in_state
    group = data.draw(st.sampled_from([g for g in graph.groups.values() if not g.blocks and g.units > g.multiple_of]))
    after = data.draw(st.sampled_from(range(group.multiple_of, group.units, group.multiple_of)))
    keep = data.draw(selections(group.groups, group.units, exactly=after))
    slice_model(model, Plan({group.name: keep}), graph)
    gone = group.groups * (group.units - after)
    again = sspruner.trace(model)
    if group.axis != "hidden":  # a matrix of hidden x hidden loses less than twice its rows
        shared = (group.units - after) * (group.gain is not None)  # the weight of a norm that all sets share
        assert graph.parameters - again.parameters == gone * group.parameters_per_unit + shared
    assert graph.state_bytes - again.state_bytes == gone * group.state_bytes_per_unit
    if group.axis != "group" or after > 1:  # one group alone is no axis
        assert again.groups[group.name].units == after


@examples(25)
@given(zoo_models(), st.data())
def test_the_attributes_that_a_forward_reads_follow_the_cut(model: nn.Module, data: st.DataObject) -> None:
    """After a cut on any axis the sizes that modules keep are those of a model that was built that small."""
    graph = sspruner.trace(model)
    name = data.draw(st.sampled_from([n for n, g in graph.groups.items() if not g.blocks and g.units > g.multiple_of]))
    group = graph.groups[name]
    after = data.draw(st.sampled_from(range(group.multiple_of, group.units, group.multiple_of)))
    slice_model(model, Plan({name: data.draw(selections(group.groups, group.units, exactly=after))}), graph)
    for site in sspruner.trace(model).layers:
        mixer = model.get_submodule(site.path)
        rows = 0 if site.kind in KDA else mixer.in_proj.weight.shape[0]
        if site.kind in KDA:
            keys, values = len(mixer.forget_gate.dt_bias), mixer.o_proj.in_features
            assert (len(mixer.q_proj.weight), len(mixer.k_proj.weight), len(mixer.v_proj.weight)) == (
                keys,
                keys,
                values,
            )
            assert mixer.qkv_dim == mixer.num_heads * mixer.head_dim == values
            assert mixer.forget_gate.qkv_dim == mixer.forget_gate.num_heads * mixer.forget_gate.head_dim == keys
            assert mixer.num_heads == mixer.forget_gate.num_heads == mixer.forget_gate.A_log.numel()
            assert mixer.conv_dim == 2 * keys + values == mixer.conv1d.weight.shape[0]
        elif site.kind in MAMBA1:
            assert rows == 2 * mixer.intermediate_size
            assert mixer.x_proj.weight.shape[0] == mixer.time_step_rank + 2 * mixer.ssm_state_size
        elif site.kind == "zamba":
            assert rows == 2 * mixer.intermediate_size == 2 * mixer.n_mamba_heads * mixer.mamba_head_dim
            assert mixer.x_proj_weight.shape[1] == mixer.time_step_rank + 2 * mixer.ssm_state_size
        else:
            G, N = mixer.n_groups, mixer.ssm_state_size
            assert mixer.intermediate_size == mixer.num_heads * mixer.head_dim == mixer.out_proj.in_features
            assert mixer.conv_dim == mixer.intermediate_size + 2 * G * N == mixer.conv1d.weight.shape[0]
            assert rows == mixer.intermediate_size + mixer.conv_dim + mixer.num_heads
            if hasattr(mixer.norm, "weight"):
                assert mixer.norm.weight.numel() == mixer.intermediate_size
                assert getattr(mixer.norm, "group_size", rows) in (rows, mixer.intermediate_size // G)
        assert mixer.conv1d.groups == mixer.conv1d.in_channels == mixer.conv1d.weight.shape[0]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
            assert module.bias is None or len(module.bias) == module.out_features


@given(st.data())
def test_dropping_rows_of_several_dimensions_seen_as_one(data: st.DataObject) -> None:
    """drop_rows(t, (0, d)) takes other rows along d from every t[i], as plain indexing does."""
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    d = data.draw(st.sampled_from([1, 2]))
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    keep = data.draw(selections(shape[0], shape[d]))
    gone = torch.tensor([i * shape[d] + j for i in range(shape[0]) for j in keep.dropped(i)], dtype=torch.long)
    expected = torch.stack([tensor[i].index_select(d - 1, torch.tensor(keep.keep[i])) for i in range(shape[0])])
    assert torch.equal(drop_rows(tensor, (0, d), gone), expected)
    assert torch.equal(as_rows(tensor, (0, d))[gone], as_rows(tensor, (0, d)).index_select(0, gone))


@examples(25)
@given(zoo_models())
def test_every_parameter_is_described_for_the_hidden_axis(model: nn.Module) -> None:
    """A unit of `hidden` owns one row or column of every tensor that is as wide, a tied one once."""
    graph = sspruner.trace(model)
    assume(not (graph.family and graph.family.stream_refused))
    (group,) = graph.on_axis("hidden").values()
    width = model.get_input_embeddings().weight.shape[1]
    assert (group.groups, group.units) == (1, width)
    owned = Counter(id(_get(model, m.tensor)) for m in group.members)
    assert all(_get(model, m.tensor).shape[m.dims[0]] == m.index.numel() for m in group.members)
    assert owned[id(model.get_input_embeddings().weight)] == 1
    assert owned[id(model.get_output_embeddings().weight)] == 1


def _get(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def test_tracing_does_not_touch_values_and_works_on_meta() -> None:
    model = tiny_model()
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert str(sspruner.trace(empty)) == str(sspruner.trace(model))


def test_printing_shows_layers_members_and_totals() -> None:
    text = str(sspruner.trace(tiny_model(layers=2, groups=2, heads_per_group=1, head_dim=4, state=6)))
    lines = text.splitlines()
    assert lines[0].startswith("Mamba2ForCausalLM: ")
    assert lines[0].endswith("384 B of state per sequence")
    assert "backbone.layers.{0, 1}.mixer (mamba2): " in text  # both are alike
    assert "state: 2 groups x 6 units, 18 parameters and 16 B of state each, same count in every group" in text
    assert "head: 2 groups x 1 units, 79 parameters and 96 B of state each, same count in every group" in text
    assert "group: 2 units, 187 parameters and 96 B of state each\n" in text
    assert "backbone:hidden: 4 units, " in text
    assert "backbone.layers:block: 2 units, whole modules" in text
    assert text.count("in_proj.weight dim 0: rows of B, C") == 1  # the same in every layer: said once
    assert text.count("state: 2 groups x 6") == 1


def test_printing_shows_each_size_of_a_layer() -> None:
    model = tiny_model(layers=4, state=6)
    graph = sspruner.trace(model)
    sspruner.apply(model, Plan({graph.layers[1].path + ":state": Selection(6, ((0, 1, 2),))}))
    lines = [line[4:].split(" (")[0] for line in str(sspruner.trace(model)).splitlines() if "(mamba2)" in line]
    assert lines == ["backbone.layers.{0, 2, 3}.mixer", "backbone.layers.1.mixer"]


def test_printing_says_what_is_shared_once() -> None:
    """zamba2 MAMAA with two blocks: layer 4 calls the block of layer 1."""
    text = str(sspruner.trace(zoo("zamba2")))
    line = next(line for line in text.splitlines() if "layers.1.shared_transformer.self_attn (attention)" in line)
    assert line.endswith(", shared by 2 layers")
    assert text.count("(attention)") == 2
    assert [line[4:].split(" (")[0] for line in text.splitlines() if "(zamba2)" in line] == [
        "model.layers.{0, 2}.mamba", "model.layers.{1, 3, 4}.mamba_decoder.mamba"]  # fmt: skip


def test_json_holds_the_same_numbers() -> None:
    data = sspruner.trace(tiny_model(layers=2, groups=2, heads_per_group=1, head_dim=4, state=6)).to_json()
    assert data["state_bytes"] == 384
    assert data["layers"][1]["axes"]["state"] == {
        "groups": 2, "units": 6, "parameters_per_unit": 18, "state_bytes_per_unit": 16,
    }  # fmt: skip
    assert list(data["layers"][1]["axes"]) == ["state", "head", "head_dim", "group"]
    assert data["model"]["backbone.layers:block"] == {"groups": 1, "units": 2, "parameters_per_unit": 0}
    assert data["model"]["backbone:hidden"]["units"] == 4


def test_a_model_without_state_space_layers() -> None:
    with pytest.raises(sspruner.ModelError, match=r"no state-space layer found \(it has 2 Linear, .*Mamba2Mixer"):
        sspruner.trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_an_axis_that_the_model_lacks() -> None:
    with pytest.raises(sspruner.InputError, match=r"axis 'channel': Mamba2ForCausalLM has none; it has state, head, "):
        sspruner.trace(tiny_model()).on_axis("channel")


# --- A family that the engine has never seen: one head, a state that passes an RMS norm (so that a cut needs a fold).


class NormedState(nn.Module):
    """y_t = C_t . norm(h_t), h_t = a h_{t-1} + x_t B_t, an RMS norm over the N states; rows [x: 1 | B: N | C: N]."""

    def __init__(self, hidden: int, state: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden, 1 + 2 * state)
        self.gain = nn.Parameter(torch.rand(state) + 0.5)
        self.out = nn.Linear(1, hidden)
        self.state, self.eps = state, 0.1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, B, C = self.proj(hidden_states).split([1, self.state, self.state], -1)
        h, ys = torch.zeros_like(B[:, 0]), []
        for t in range(x.shape[1]):
            h = 0.5 * h + x[:, t] * B[:, t]
            normed = self.gain * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
            ys.append((C[:, t] * normed).sum(-1, keepdim=True))
        return hidden_states + self.out(torch.stack(ys, 1))


class NormedModel(nn.Module):
    """Embeddings, a ModuleList of blocks, a head, and just enough of a Hugging Face model's manners."""

    def __init__(self, state: int, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.blocks = nn.ModuleList(NormedState(4, state) for _ in range(layers))
        self.config = SimpleNamespace(bos_token_id=0)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, use_cache=False, inputs_embeds=None):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            hidden = block(hidden)
        state = [SimpleNamespace(recurrent_states=[hidden.new_zeros(len(hidden), b.state)]) for b in self.blocks]
        out = {"logits": self.head(hidden), "cache_params": SimpleNamespace(layers=state) if use_cache else None}
        return _Output(out)


class _Output(dict):
    def __getattr__(self, name: str) -> object:
        return self[name]


class NormedFamily(Family):
    name, mixer_class = "normed", "NormedState"

    def layout(self, mixer: nn.Module) -> Layout:
        rows = (Rows("x", ("head",)), Rows("B", ("state",)), Rows("C", ("state",)))
        return Layout(
            sizes={"head": 1, "state": mixer.state},
            slots=(
                Slot("proj.weight", 0, rows),
                Slot("proj.bias", 0, rows),
                Slot("gain", 0, (Rows("gain", ("state",)),)),
            ),
            axes={"state": ()},
            state=("head", "state"),
            attributes={"state": (("state",),)},
            folds=(Fold("gain", ("state",), 0.5), Fold("eps", ("state",), 1.0)),
        )

    def project(self, mixer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        x, B, C = mixer.proj(hidden).split([1, mixer.state, mixer.state], -1)
        dt = torch.ones_like(x)
        return Projected(x[..., None], x, dt, torch.tensor([0.5]).log(), B[:, :, None], C[:, :, None], torch.zeros(1))


@pytest.fixture
def normed_family():
    plugin = SimpleNamespace(sspruner_families=sspruner.hookimpl(lambda: [NormedFamily()]))
    plugin_manager().register(plugin, name="normed")
    yield
    plugin_manager().unregister(plugin)


@pytest.mark.usefixtures("normed_family")
@given(st.integers(2, 9), st.data())
def test_a_family_from_a_plugin_is_cut_with_its_fold(state: int, data: st.DataObject) -> None:
    """Gain and epsilon of the norm are folded, or sliced and masked would differ; the engine has no line for it."""
    torch.manual_seed(state)
    model = NormedModel(state)
    groups = sspruner.trace(model).on_axis("state")
    plan = Plan({n: data.draw(selections(1, state, exactly=data.draw(st.integers(1, state - 1)))) for n in groups})
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    sliced = sspruner.apply(model, plan)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, rtol=1e-5, atol=1e-5)
    assert [b.state for b in sliced.blocks] == [s.after for s in plan.groups.values()]
    assert all(b.proj.out_features == 1 + 2 * b.state for b in sliced.blocks)


@pytest.mark.usefixtures("normed_family")
def test_the_fold_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = NormedModel(6)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "random"), sparsity=0.5)
    monkeypatch.setattr("sspruner.surgery.slice.fold_values", lambda *args: None)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, plan)


@pytest.mark.usefixtures("normed_family")
def test_ghost_scores_a_family_that_it_has_never_seen() -> None:
    torch.manual_seed(0)
    model, ids = NormedModel(5), torch.randint(11, (3, 8))
    mask = torch.ones_like(ids, dtype=torch.bool)
    result = sspruner.prune(
        model, "ghost", keep=2, calibration=Calibration(ids, mask, ids, mask, "tokens", 0, held_out_is_separate=False)
    )
    assert [b.state for b in model.blocks] == [2, 2]
    assert F.relu(next(iter(result.scores.importance.values()))).sum() > 0
