"""Layer-by-layer replay equals the model's own forward, under any attention mask, one block on the device at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import models, tiny_model, tokens
from torch import nn

import sspruner
from sspruner.calibrate.replay import Replay, find_blocks
from sspruner.planning.plan import Plan, Selection
from sspruner.surgery.mask import mask_group


@st.composite
def masks(draw: st.DrawFn, rows: int, length: int) -> torch.Tensor:
    """Anything a user might pass: full, left or right padding, holes, a row with nothing in it."""
    kind = draw(st.sampled_from(["full", "left", "right", "holes"]))
    if kind == "full":
        return torch.ones(rows, length, dtype=torch.bool)
    if kind == "holes":
        bits = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
        return torch.tensor(bits).view(rows, length)
    pads = torch.tensor(draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))[:, None]
    position = torch.arange(length).expand(rows, -1)
    return position >= pads if kind == "left" else position < length - pads


@given(models(), st.data())
def test_replay_is_the_models_own_forward(model: torch.nn.Module, data: st.DataObject) -> None:
    """Every block's output, bit for bit, in every batch; also after a layer has been cut on the way."""
    mask = data.draw(masks(4, 11))
    ids = tokens(4, 11)
    graph = sspruner.trace(model)
    replay = Replay(model, graph, [(ids[:3], mask[:3]), (ids[3:], mask[3:])], "cpu")
    group = data.draw(st.sampled_from(list(graph.groups.values())))
    for block in replay.blocks:
        if group.layer.startswith(block):
            mask_group(model, group, Selection(group.units, (tuple(range(0, group.units, 2)),) * group.groups))
        replay.advance(block)
    for rows, hidden in ((slice(0, 3), replay.hidden[0]), (slice(3, 4), replay.hidden[1])):
        seen: list[torch.Tensor] = []
        hook = model.backbone.norm_f.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids[rows], attention_mask=mask[rows].long(), use_cache=False)
        hook.remove()
        assert hidden.device.type == "cpu"
        assert torch.equal(hidden, seen[0])


def test_each_block_runs_once_to_be_observed_and_once_after_its_cut() -> None:
    """The mixer's scan runs only in the second; the last block has no successor to feed."""
    model, ran = tiny_model(layers=3), []
    for i, block in enumerate(model.backbone.layers):
        block.mixer.out_proj.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    data = sspruner.calibration(tokens(8, 12), model, samples=6, held_out=2)
    sspruner.score(model, "ghost", calibration=data)
    assert ran == [0, 1]


def test_one_block_at_a_time_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block goes to the compute device before it runs and home after it, and no two are there at once."""
    model = tiny_model(layers=3)
    there: set[int] = set()
    log: list[tuple[int, ...]] = []
    travel = nn.Module.to
    names = {id(block): i for i, block in enumerate(model.backbone.layers)}
    device = torch.device("cpu", 0)  # stands for an accelerator: the same memory under another name

    def to(self: nn.Module, target: torch.device) -> nn.Module:
        if id(self) in names:
            (there.add if target is device else there.discard)(names[id(self)])
            log.append(tuple(there))
        return travel(self, target)

    monkeypatch.setattr(nn.Module, "to", to)
    ids = tokens(2, 9)
    replay = Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "cpu")
    replay.device = device
    for block in replay.blocks:
        replay.observe(block, lambda path, hidden, mask: None)
        replay.advance(block)
    assert log == [(0,), (), (0,), (), (1,), (), (1,), (), (2,), (), (2,), ()]


def test_blocks_are_found_in_order() -> None:
    model = tiny_model(layers=3)
    assert find_blocks(model, sspruner.trace(model)) == [f"backbone.layers.{i}" for i in range(3)]


def test_a_mixer_outside_a_list_of_blocks() -> None:
    mixer = tiny_model().backbone.layers[0].mixer
    model = nn.ModuleDict({"only": mixer})
    with pytest.raises(sspruner.ModelError, match=r"mixer only is not inside a ModuleList"):
        find_blocks(model, sspruner.trace(model))


def test_training_mode_and_hooks_are_restored_after_an_error() -> None:
    model = tiny_model().train()

    class Fails(sspruner.Scorer):
        name, axes = "fails", {"state"}

        def observe(self, view: sspruner.SSMView) -> None:
            raise RuntimeError("in a plugin")

        def importance(self) -> torch.Tensor:
            return torch.zeros(1)

    with pytest.raises(sspruner.PluginError, match=r"scorer 'fails' on backbone.layers.0.mixer:state failed: .*plugin"):
        sspruner.prune(model, Fails, sparsity=0.5, calibration=tokens(4, 9))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_later_layer_undoes_the_cuts_of_the_earlier() -> None:
    model = tiny_model(layers=3)
    before = {n: p.clone() for n, p in model.named_parameters()}

    class FailsLate(sspruner.Scorer):
        name, axes = "late", {"state"}

        def observe(self, view: sspruner.SSMView) -> None:
            self.late = view.layer.startswith("backbone.layers.2")

        def importance(self) -> torch.Tensor:
            return torch.full((1, 6), float("nan") if self.late else 1.0)

    with pytest.raises(sspruner.PluginError, match="6 of 6 values that are NaN"):
        sspruner.prune(model, FailsLate, sparsity=0.5, calibration=tokens(4, 9))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert sspruner.apply(model, Plan("state", {}), mode="mask") is model  # and it is not masked
