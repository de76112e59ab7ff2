"""The graph: index maps, counts, printing; and a family from a plugin, with a fold, through the whole engine."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import models, selections, tiny_model
from torch import nn

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.graph.family import Family, Projected
from sspruner.graph.group import Fold
from sspruner.graph.layout import Layout, Rows, Slot
from sspruner.planning.plan import Plan
from sspruner.plugins.manager import plugin_manager


@given(models())
def test_members_are_where_the_notes_say(model: torch.nn.Module) -> None:
    """in_proj [z | x | B | C | dt] and conv [x | B | C], B and C group-major: written out again, by hand."""
    for layer in sspruner.trace(model).layers:
        mixer = model.get_submodule(layer.path)
        D, G, N = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
        (group,) = layer.groups
        assert (group.axis, group.groups, group.units) == ("state", G, N)
        start = {"in_proj.weight": 2 * D, "in_proj.bias": 2 * D, "conv1d.weight": D, "conv1d.bias": D}
        found = {(m.parameter.removeprefix(f"{layer.path}."), m.rows): m.index for m in group.members}
        expected = {name for name in start if dict(mixer.named_parameters()).get(name) is not None}
        assert set(found) == {(name, rows) for name in expected for rows in "BC"}
        for (name, rows), index in found.items():
            for g in range(G):
                for n in range(N):
                    assert index[g, n].tolist() == [start[name] + (rows == "C") * G * N + g * N + n]


@given(models(), st.data())
def test_units_and_bytes_add_up(model: torch.nn.Module, data: st.DataObject) -> None:
    graph = sspruner.trace(model)
    assert graph.parameters == sum(p.numel() for p in model.parameters())
    assert graph.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in graph.layers:
        mixer, (group,) = model.get_submodule(layer.path), layer.groups
        assert layer.state_bytes == mixer.num_heads * mixer.head_dim * mixer.ssm_state_size * 4
        assert group.groups * group.units * group.state_bytes_per_unit == layer.state_bytes
        after = data.draw(st.integers(1, group.units))
        values = group.attribute_values(after)
        assert values["ssm_state_size"] == after
        assert values["conv_dim"] == mixer.intermediate_size + 2 * mixer.n_groups * after
        assert values["in_proj.out_features"] == mixer.intermediate_size + values["conv_dim"] + mixer.num_heads


def test_tracing_does_not_touch_values_and_works_on_meta() -> None:
    model = tiny_model()
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert str(sspruner.trace(empty)) == str(sspruner.trace(model))


def test_printing_shows_layers_members_and_totals() -> None:
    text = str(sspruner.trace(tiny_model(layers=2, groups=2, heads_per_group=1, head_dim=4, state=6)))
    lines = text.splitlines()
    assert lines[0].startswith("Mamba2ForCausalLM: ")
    assert lines[0].endswith("384 bytes of state per sequence")
    assert "backbone.layers.0.mixer (mamba2)" in text
    assert "state: 2 groups x 6 units, 18 parameters and 16 bytes of state each, same count in every group" in text
    assert text.count("in_proj.weight dim 0: rows of B, C") == 1  # the same in every layer: said once
    assert text.count("state: 2 groups x 6") == 2


def test_json_holds_the_same_numbers() -> None:
    data = sspruner.trace(tiny_model(layers=2, groups=2, heads_per_group=1, head_dim=4, state=6)).to_json()
    assert data["state_bytes"] == 384
    assert data["layers"][1]["axes"]["state"] == {
        "groups": 2, "units": 6, "parameters_per_unit": 18, "state_bytes_per_unit": 16,
    }  # fmt: skip


def test_a_model_without_state_space_layers() -> None:
    with pytest.raises(sspruner.ModelError, match=r"no state-space layer found \(it has 2 Linear, .*Mamba2Mixer"):
        sspruner.trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_an_axis_that_the_model_lacks() -> None:
    with pytest.raises(sspruner.InputError, match=r"axis 'head': Mamba2ForCausalLM has none; it has state"):
        sspruner.trace(tiny_model()).on_axis("head")


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
                Slot("gain", 0, (Rows("gain", ("state",)),), fold=Fold(eps="eps")),
            ),
            axes={"state": ()},
            state=("head", "state"),
            attributes={"state": (("state",),), "proj.out_features": (("head",), ("state",), ("state",))},
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
    plan = Plan("state", {n: data.draw(selections(1, g.units)) for n, g in groups.items()})
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    sliced = sspruner.apply(model, plan)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, rtol=1e-5, atol=1e-5)
    assert [b.state for b in sliced.blocks] == [s.after for s in plan.groups.values()]


@pytest.mark.usefixtures("normed_family")
def test_the_fold_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = NormedModel(6)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "random"), sparsity=0.5)
    monkeypatch.setattr("sspruner.surgery.slice._fold", lambda *args: None)
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
