"""Layer-by-layer replay equals the model's own forward, under any attention mask, one block on the device at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.calibrate.replay import Inputs, Replay
from sspruner.graph.site import within
from sspruner.plans.plan import Plan
from sspruner.surgery.mask import is_masked, mask_group
from support.examples import examples
from support.family_plans import AXES
from support.tiny import models, plans, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models
from support.zoo_variants import VARIANTS

ONE_STREAM = tuple(f for f in FAMILIES if "block" in AXES[f])  # the others' last block puts out several copies
FINAL_NORMS = ("backbone.norm_f", "model.norm_f", "model.final_layernorm", "model.norm")  # what follows the last block


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


def final_hidden(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What leaves the last block in the model's own forward."""
    modules, seen = dict(model.named_modules()), []
    norm = next(modules[name] for name in FINAL_NORMS if name in modules)
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    hook.remove()
    (hidden,) = seen
    return hidden


def check_replay(model: nn.Module, mask: torch.Tensor, plan: Plan) -> None:
    """What leaves the last block, bit for bit, in every batch; every block observed, cut, then run, as `prune` does."""
    ids = tokens(*mask.shape)
    graph = sspruner.trace(model)
    replay = Replay(model, graph, [(ids[:3], mask[:3]), (ids[3:], mask[3:])], "cpu")
    for block in replay.blocks:
        replay.observe(
            block, [s.path for s in graph.layers if within(s.path, block)], lambda path, hidden, mask, inputs: None
        )
        for name, selection in plan.groups.items():
            if within(graph.groups[name].layer, block):
                mask_group(model, graph.groups[name], selection)
        replay.advance(block)
    for rows, carried in ((slice(0, 3), replay.hidden[0]), (slice(3, 4), replay.hidden[1])):
        (hidden,) = carried
        assert hidden.device.type == "cpu"
        assert torch.equal(hidden, final_hidden(model, ids[rows], mask[rows]))


@given(models(least_state=2), st.data())
def test_replay_is_the_models_own_forward(model: nn.Module, data: st.DataObject) -> None:
    plan = data.draw(plans(sspruner.trace(model), ("state", "head", "head_dim")))
    check_replay(model, data.draw(masks(4, 11)), plan)


IN_LAYERS = ("state", "head", "head_dim", "group", "channel", "dt_rank")


@examples(25)
@given(zoo_models(ONE_STREAM), st.data())
def test_replay_is_the_models_own_forward_in_every_family(model: nn.Module, data: st.DataObject) -> None:
    """Each block is given its own masks, positions and embeddings: those that the model gives it."""
    plan = data.draw(plans(sspruner.trace(model), IN_LAYERS))
    check_replay(model, data.draw(masks(4, 11)), plan)


@given(zoo_models(ONE_STREAM), st.data())
def test_a_block_that_ran_for_an_observer_has_run(model: nn.Module, data: st.DataObject) -> None:
    """Where nothing is cut: some observers ask for the inputs of linear layers or of the scan, in some batches, others
    do not; half of them observe other values than the block's own.
    """
    mask, ids, graph = data.draw(masks(4, 11)), tokens(4, 11), sspruner.trace(model)
    replay = Replay(model, graph, [(ids[:3], mask[:3]), (ids[3:], mask[3:])], "cpu")
    asks = st.booleans()
    for block in replay.blocks:
        families = {site.path: site.family for site in graph.layers if within(site.path, block)}

        def observer(path: str, hidden: torch.Tensor, mask: torch.Tensor, inputs: Inputs) -> None:
            if data.draw(asks):
                factor = data.draw(st.sampled_from([1.0, 0.5]))
                families[path].project(model.get_submodule(path), hidden * factor, mask)  # noqa: B023
            if data.draw(asks):
                inputs()

        replay.observe(block, list(families), observer, advance=True)
        replay.advance(block)
    for rows, (hidden,) in zip((slice(0, 3), slice(3, 4)), replay.hidden, strict=True):
        assert torch.equal(hidden, final_hidden(model, ids[rows], mask[rows]))


def _name(variant: tuple[str, dict]) -> str:
    return "-".join([variant[0], *(f"{k}={v}" for k, v in variant[1].items())])


@pytest.mark.cover(most=5)
@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_scorer_sees_is_what_the_model_gives_its_modules(variant: tuple[str, dict], dtype: torch.dtype) -> None:
    """The input of every described module inside a block, shared ones in every layer that calls them; and what the
    block makes of it all: `outputs`.
    """
    model = zoo(variant[0], dtype=dtype, **variant[1])
    ids, mask = tokens(3, 19), torch.ones(3, 19, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 15:] = False
    graph = sspruner.trace(model)
    sites = [s for s in graph.sites if s.family or s.kind in ("attention", "mlp")]
    paths = [path for site in sites for path in (site.path, *site.aliases) if within(path, graph.blocks)]
    expected: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}

    def note(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            expected[path] = next(iter(given.values()))
            made[path] = out[0] if isinstance(out, tuple) else out

        return hook

    blocks = [f"{graph.blocks}.{i}" for i in range(len(model.get_submodule(graph.blocks)))]
    handles = [model.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in [*blocks, *paths]]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()

    replay = Replay(model, graph, [(ids, mask)], "cpu")
    assert replay.blocks == blocks
    seen: dict[str, torch.Tensor] = {}
    for block in blocks:
        inside = [path for path in paths if within(path, block)]
        replay.observe(block, inside, lambda path, hidden, m, inputs: seen.setdefault(path, hidden))
        ((before, after, m),) = replay.outputs(block)
        assert torch.equal(before, expected[block])
        assert torch.equal(after, made[block])
        assert torch.equal(m, mask)
        replay.advance(block)
    assert set(seen) == set(paths) == set(expected) - set(blocks)
    assert {path for path, hidden in seen.items() if torch.equal(hidden, expected[path])} == set(paths)


def test_the_layers_of_zamba2_are_given_their_own_arguments() -> None:
    """The original embeddings go to hybrid layers, which read them beside the hidden states."""
    model, ids = zoo("zamba2"), tokens(2, 9)
    replay = Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "cpu")
    assert set(replay.inputs[0]) == set(replay.blocks)
    hybrid = next(i for i, kind in enumerate(model.config.layers_block_type) if kind == "hybrid")
    args, kwargs = replay.inputs[0][replay.blocks[hybrid]]
    embedded = model.get_input_embeddings()(ids)
    given = [*args, *kwargs.values()]
    assert any(isinstance(v, torch.Tensor) and v.shape == embedded.shape and torch.equal(v, embedded) for v in given)


def test_a_block_that_the_forward_never_calls() -> None:
    model, ids = tiny_model(layers=2), tokens(2, 9)
    model.backbone.layers.append(tiny_model(layers=1).backbone.layers[0])
    model.config.num_hidden_layers = 2
    forward, every = model.backbone.forward, model.backbone.layers

    def first_two(*args: object, **kwargs: object) -> object:
        model.backbone.layers = every[:2]
        try:
            return forward(*args, **kwargs)
        finally:
            model.backbone.layers = every

    model.backbone.forward = first_two
    with pytest.raises(sspruner.ModelError, match=r"layers\.2: the model's forward never calls this block"):
        Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "cpu")
    assert not any("forward" in vars(block) for block in every)


def test_a_module_of_a_block_that_never_runs() -> None:
    model, ids = tiny_model(layers=1), tokens(2, 9)
    model.backbone.layers[0].spare = nn.LayerNorm(2)
    replay = Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "cpu")
    paths = [f"backbone.layers.0.{name}" for name in ("mixer", "spare")]
    with pytest.raises(sspruner.ModelError, match=r"spare: not called by its block"):
        replay.observe("backbone.layers.0", paths, lambda path, hidden, mask, inputs: None)
    assert not any(m._forward_pre_hooks for m in model.modules())


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The numbers of the blocks whose out_proj is given 6 sequences of 12 tokens, in order."""
    ran: list[int] = []
    handles = [
        block.mixer.out_proj.register_forward_pre_hook(
            lambda _, args, i=i: ran.append(i) if args[0].shape[:2] == (6, 12) else None
        )
        for i, block in enumerate(model.backbone.layers)
    ]
    yield ran
    for handle in handles:
        handle.remove()


def test_each_block_runs_once_to_be_observed_and_once_after_its_cut() -> None:
    """The mixer's scan runs only in the second; the last block has no successor to feed. Before that, two tokens of
    one sequence go through the model to see what its blocks return.
    """
    model = tiny_model(layers=3)
    data = sspruner.calibration(tokens(8, 12), model, samples=6, held_out=2)
    with counted(model) as ran:
        sspruner.score(model, "ghost", calibration=data)
    assert ran == [0, 1]


def test_a_run_for_the_inputs_of_linear_layers_feeds_the_next_block_unless_the_block_is_cut() -> None:
    model = tiny_model(layers=3)
    data = sspruner.calibration(tokens(8, 12), model, samples=6, held_out=2)
    with counted(model) as ran:
        sspruner.score(model, "wanda", calibration=data)
    assert ran == [0, 1, 2]
    with counted(model) as ran:
        sspruner.prune(model, "wanda", sparsity=0.5, calibration=data, mode="mask")
    assert ran[:5] == [0, 0, 1, 1, 2]  # then it is measured


def test_blocks_are_found_in_order() -> None:
    model, ids = tiny_model(layers=12), tokens(2, 9)
    graph = sspruner.trace(model)
    replay = Replay(model, graph, [(ids, torch.ones_like(ids, dtype=torch.bool))], "cpu")
    assert graph.blocks == "backbone.layers"
    assert replay.blocks == [f"backbone.layers.{i}" for i in range(12)]


def test_a_mixer_outside_a_list_of_blocks() -> None:
    mixer = tiny_model().backbone.layers[0].mixer
    model = nn.ModuleDict({"only": mixer})
    graph = sspruner.trace(model)
    assert graph.blocks == ""
    assert "state" in graph.axes
    assert "block" not in graph.axes
    with pytest.raises(sspruner.ModelError, match=r"mixer only is not inside a ModuleList"):
        Replay(model, graph, [], "cpu")


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
    assert not is_masked(model)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "random"), sparsity=0.5)
    assert sspruner.apply(model, plan, mode="mask") is model


@pytest.mark.cover
@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
def test_the_rest_of_the_model_on_what_leaves_the_last_block(variant: tuple[str, dict]) -> None:
    """`head` gives the model's own logits, in batches as they were and one by one; no block runs for it."""
    model = zoo(variant[0], **variant[1])
    ids, mask = tokens(3, 19), torch.ones(3, 19, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 15:] = False
    whole = Replay(model, sspruner.trace(model), [(ids[:2], mask[:2]), (ids[2:], mask[2:])], "cpu")
    whole.advance(whole.blocks[0])
    single = whole.one_by_one()
    assert [m.shape for m in single.masks] == [(1, 19)] * 3
    for replay, rest in ((whole, whole.blocks[1:]), (single, whole.blocks)):
        for block in rest:
            replay.advance(block)
        mixers = [model.get_submodule(site.path) for site in sspruner.trace(model).layers]
        handles = [mixer.register_forward_pre_hook(lambda *_: pytest.fail("a block ran")) for mixer in mixers]
        with torch.no_grad():
            seen = [replay.head(batch, hidden).logits for batch, hidden in enumerate(replay.hidden)]
        for handle in handles:
            handle.remove()
        start = 0
        for logits in seen:
            rows = slice(start, start + len(logits))
            with torch.no_grad():
                expected = model(input_ids=ids[rows], attention_mask=mask[rows].long(), use_cache=False).logits
            assert torch.equal(logits, expected)
            start = rows.stop
        assert start == 3
