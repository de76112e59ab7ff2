"""Gradients and squared gradients, of the whole model and block by block, against plain autograd in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.calibrate.gradients import check_differentiable, mean_and_fisher, mean_gradients, predicted_tokens
from sspruner.calibrate.local import LocalGradients
from sspruner.calibrate.replay import Replay
from sspruner.graph.site import within
from sspruner.surgery.mask import mask_group
from support import native
from support.examples import examples
from support.native import native_model
from support.tiny import half, tiny_model, tokens
from support.zoo import FAMILIES, zoo

Gradients = dict[str, torch.Tensor]

IDS = tokens(4, 19)
MASK = torch.ones(4, 19, dtype=torch.bool)
MASK[0, :4] = False
MASK[1, 12:] = False
MASK[3] = False
MASK[3, 7] = True  # a single token predicts nothing
EVERY = torch.ones_like(MASK)

each_family = pytest.mark.parametrize("family", FAMILIES)


def split(sizes: list[int], ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(ids.split(sizes), mask.split(sizes), strict=True))


def double(family: str) -> nn.Module:
    model = zoo(family).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no fp64
    return model


def local(model: nn.Module, batches: list[Any], fisher: bool = False) -> LocalGradients:
    """On the model as it is, block by block."""
    replay = Replay(model, sspruner.trace(model), batches, "cpu")
    found = LocalGradients(replay, fisher=fisher)
    for block in replay.blocks:
        found.add(block)
        replay.advance(block)
    return found


def inside(gradients: Gradients, model: nn.Module) -> Gradients:
    blocks = sspruner.trace(model).blocks
    return {name: g for name, g in gradients.items() if within(name, blocks)}


def check(actual: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    """To a part of the largest value of each tensor, and of the largest of all where a tensor is next to zero."""
    assert set(actual) == set(expected)
    floor = 1e-6 * max(float(e.abs().max()) for e in expected.values())
    for name, e in expected.items():
        assert actual[name].dtype == torch.float32
        assert actual[name].device.type == "cpu"
        error = float((actual[name] - e).abs().max())
        assert error <= tolerance * float(e.abs().max()) + floor, (name, error, float(e.abs().max()))


def plain(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Gradients, Gradients]:
    """Stock's own loss on one sequence after another: the gradient of the mean over all tokens, and the Fisher."""
    names = dict(model.named_parameters(remove_duplicate=False))
    mean, fisher = ({n: torch.zeros_like(p) for n, p in names.items()} for _ in range(2))
    counts = []
    for row, seen in zip(ids, mask, strict=True):
        labels = torch.full_like(row, -100)
        for t in range(1, len(row)):
            if seen[t - 1] and seen[t]:
                labels[t] = row[t]
        counts.append(int((labels >= 0).sum()))
        if counts[-1]:
            model.zero_grad()
            out = model(input_ids=row[None], attention_mask=seen[None].long(), labels=labels[None], use_cache=False)
            out.loss.backward()
            for n, p in names.items():
                if p.grad is not None:
                    mean[n] += p.grad * counts[-1]
                    fisher[n] += p.grad**2
    model.zero_grad()
    sequences = sum(count > 0 for count in counts)
    return {n: g / sum(counts) for n, g in mean.items()}, {n: f / sequences for n, f in fisher.items()}


@pytest.fixture
def native_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins of mamba_ssm write to their window and state in place: here they do not, so that they have
    gradients, as the package has.
    """
    caches = native.Recurrent.caches

    def convolve(self: Any, row: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        if getattr(self, "given", None) is not window:
            self.given = self.now = window
        self.now = torch.cat([self.now[..., 1:], row[..., None].to(window)], -1)
        out = (self.now.float() * self.conv1d.weight[:, 0].float()).sum(-1)
        return self.act(out if self.conv1d.bias is None else out + self.conv1d.bias.float())

    def apart(self: Any, batch: int, params: Any) -> Any:
        window, state = caches(self, batch, params)
        return window, state.double()  # `.float()` copies it

    monkeypatch.setattr(native.Recurrent, "convolve", convolve)
    monkeypatch.setattr(native.Recurrent, "caches", apart)


@pytest.mark.cover
@each_family
def test_the_whole_model_is_a_plain_loop_over_sequences(family: str) -> None:
    model = double(family)
    mean, fisher = plain(model, IDS, MASK)
    check(mean_gradients(model, split([3, 1]), predicted_tokens(MASK)), mean)
    for actual, expected in zip(
        mean_and_fisher(model, split([3, 1]), predicted_tokens(MASK)), (mean, fisher), strict=True
    ):
        check(actual, expected)


@pytest.mark.slow
@pytest.mark.cover
@each_family
def test_block_by_block_on_the_dense_model_is_the_whole_model(family: str) -> None:
    """Shared parameters: the gradient sums over the calls; the Fisher sums the squares of each call."""
    model = double(family)
    mean, _ = plain(model, IDS, MASK)
    check(local(model, split([3, 1])).gradients, inside(mean, model))
    by_sequence = local(model, split([3, 1]), fisher=True)
    check(by_sequence.gradients, inside(mean, model))

    apart = copy.deepcopy(model)
    layers = apart.get_submodule(sspruner.trace(apart).blocks)
    for i in range(len(layers)):
        layers[i] = copy.deepcopy(layers[i])  # a copy of what it shares, too
    _, squares = plain(apart, IDS, MASK)
    shared: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        shared.setdefault(p, []).append(name)
    calls = {name: sum(squares[n] for n in names) for names in shared.values() for name in names}
    check(by_sequence.fisher, inside(calls, model))
    assert (len(shared) < len(dict(model.named_parameters(remove_duplicate=False)))) == (family in ("zamba", "zamba2"))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["Mamba2", "Mamba1"])
@pytest.mark.usefixtures("native_backward")
def test_block_by_block_where_blocks_pass_two_tensors_on(layer: str) -> None:
    """mamba_ssm's (hidden states, residual): both have a gradient. It takes no mask."""
    model = native_model(layer, layers=3)
    batches, count = split([3, 1], mask=EVERY), EVERY[:, 1:].numel()
    mean, fisher = mean_and_fisher(model, batches, count)
    check(local(model, batches).gradients, inside(mean, model))
    by_sequence = local(model, batches, fisher=True)
    check(by_sequence.gradients, inside(mean, model))
    check(by_sequence.fisher, inside(fisher, model))
    check(mean_gradients(model, batches, count), mean)


@examples(6)
@given(st.sampled_from(FAMILIES), st.sampled_from([[1, 1, 1, 1], [2, 2], [4], [1, 3]]), st.integers(0, 5))
def test_neither_the_split_nor_padding_matters(family: str, sizes: list[int], pads: int) -> None:
    """Padding on the right: on the left stock's in_proj.bias goes through it."""
    model, count = double(family), predicted_tokens(MASK)
    expected = mean_and_fisher(model, split([3, 1]), count)
    by_sequence = local(model, split([3, 1]), fisher=True)
    ids, mask = (nn.functional.pad(rows, (0, pads)) for rows in (IDS, MASK))
    batches = split(sizes, ids, mask)
    for actual, e in zip(mean_and_fisher(model, batches, count), expected, strict=True):
        check(actual, e)
    check(mean_gradients(model, batches, count), expected[0])
    found = local(model, batches, fisher=True)
    check(found.gradients, by_sequence.gradients)
    check(found.fisher, by_sequence.fisher)
    check(local(model, batches).gradients, by_sequence.gradients)


def by_hand(dense: nn.Module, cut: nn.Module, ids: torch.Tensor, mask: torch.Tensor, number: int, total: int) -> Any:
    """Gradients of <g, block(h')> in one block's parameters: g of the dense model, h' of the cut one. No hooks."""
    hidden, outputs = dense.backbone.embeddings(ids), []
    for block in dense.backbone.layers:
        hidden = block(hidden, attention_mask=mask)
        outputs.append(hidden)
    logits = dense.lm_head(dense.backbone.norm_f(hidden))
    loss = logits.new_zeros(())
    for b, t in (mask[:, 1:] & mask[:, :-1]).nonzero().tolist():
        loss = loss - logits[b, t].log_softmax(-1)[ids[b, t + 1]] / total
    (g,) = torch.autograd.grad(loss, outputs[number])
    with torch.no_grad():
        hidden = cut.backbone.embeddings(ids)
        for block in cut.backbone.layers[:number]:
            hidden = block(hidden, attention_mask=mask)
    block = cut.backbone.layers[number]
    return torch.autograd.grad((g * block(hidden, attention_mask=mask)).sum(), list(block.parameters()))


@pytest.mark.slow
def test_after_cuts_of_the_blocks_before() -> None:
    model = tiny_model(layers=3, groups=2, heads_per_group=2, bias=True).double()
    dense, graph = copy.deepcopy(model), sspruner.trace(model)
    replay = Replay(model, graph, split([3, 1]), "cpu")
    mean, fisher = LocalGradients(replay), LocalGradients(replay, fisher=True)
    counts = [predicted_tokens(row[None]) for row in MASK]
    differs = []
    for number, block in enumerate(replay.blocks):
        mean.add(block)
        fisher.add(block)
        names = [f"{block}.{n}" for n, _ in model.get_submodule(block).named_parameters()]
        expected = by_hand(dense, model, IDS, MASK, number, sum(counts))
        rows = [
            by_hand(dense, model, row[None], seen[None], number, count)
            for row, seen, count in zip(IDS, MASK, counts, strict=True)
            if count
        ]
        check({n: mean.gradients[n] for n in names}, dict(zip(names, expected, strict=True)))
        check({n: fisher.gradients[n] for n in names}, dict(zip(names, expected, strict=True)))
        squares = [sum(g**2 for g in of) / len(rows) for of in zip(*rows, strict=True)]
        check({n: fisher.fisher[n] for n in names}, dict(zip(names, squares, strict=True)))
        uncut = by_hand(dense, dense, IDS, MASK, number, sum(counts))
        differs.append(any(not torch.allclose(a, b, rtol=0.05) for a, b in zip(expected, uncut, strict=True)))
        for name, selection in half(graph).groups.items():
            if within(name, block):
                mask_group(model, graph.groups[name], selection)
        replay.advance(block)
    assert differs == [False, True, True]
    assert mean.fisher == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_work_in_fp32(dtype: torch.dtype) -> None:
    """The first block, whose inputs are not rounded, to fp32's precision; every weight comes back as it was."""
    model = tiny_model(layers=2, dtype=dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    wide = copy.deepcopy(model).double()
    mean, squares = plain(wide, IDS, MASK)
    found = local(model, split([3, 1]), fisher=True)
    first = {n: g for n, g in mean.items() if within(n, "backbone.layers.0")}
    check({n: found.gradients[n] for n in first}, first, 1e-4)
    check({n: found.fisher[n] for n in first}, {n: squares[n] for n in first}, 1e-4)
    for actual, expected in zip(
        mean_and_fisher(model, split([4]), predicted_tokens(MASK)), (mean, squares), strict=True
    ):
        check(actual, expected, 1e-4)
    assert all(p.dtype == dtype and torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", ["jamba", "nemotron_h", "zamba"])
def test_narrow_inputs_are_widened(family: str) -> None:
    """Their norms round to the dtype of what enters them. Families without rotations, which stay rounded."""
    model = zoo(family, dtype=torch.bfloat16)
    found = local(model, split([3, 1])).gradients
    expected = mean_gradients(copy.deepcopy(model).float(), split([3, 1]), predicted_tokens(MASK))
    first = [n for n in expected if within(n, f"{sspruner.trace(model).blocks}.0")]
    check({n: found[n] for n in first}, {n: expected[n] for n in first}, 5e-4)


WAYS: dict[str, Callable[..., Any]] = {
    "mean": lambda model, mask=MASK: mean_gradients(model, split([3, 1], mask=mask), predicted_tokens(mask)),
    "fisher": lambda model, mask=MASK: mean_and_fisher(model, split([3, 1], mask=mask), predicted_tokens(mask)),
    "local": lambda model, mask=MASK: local(model, split([3, 1], mask=mask)),
    "local fisher": lambda model, mask=MASK: local(model, split([3, 1], mask=mask), fisher=True),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def fails_backward(model: nn.Module) -> None:
    """The second block's mixer: finite forward, 0/0 backward in what is before its out_proj."""
    module = model.backbone.layers[1].mixer.out_proj
    forward = module.forward
    module.forward = lambda h: forward(h) + (h.sum(-1, keepdim=True) * 0).sqrt()


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("works", [True, False], ids=["", "after an error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_is_as_it_was(way: Callable[[nn.Module], Any], works: bool, dtype: torch.dtype) -> None:
    """requires_grad, gradients and training mode; frozen parameters have gradients, too, and finding them is seen."""
    model = tiny_model(layers=2, dtype=dtype).train()
    if not works:
        fails_backward(model)
    kept = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        p.requires_grad_(i % 3 > 0)
        kept[name] = p.grad = torch.full_like(p, i) if i % 2 else None
    if works:
        found = way(model)
        found = found[0] if isinstance(found, tuple) else getattr(found, "gradients", found)
        assert all(g.abs().max() > 0 for n, g in found.items() if within(n, "backbone.layers.0"))
    else:
        with pytest.raises(sspruner.ModelError, match=r"layers\.1.*NaN"):
            way(model)
    for i, (name, p) in enumerate(model.named_parameters()):
        assert p.requires_grad == (i % 3 > 0)
        assert p.grad is kept[name]
        assert p.grad is None or (p.grad == i).all()
        assert p.dtype == dtype
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(block) for block in model.backbone.layers)


@each_way
def test_what_is_not_finite_is_named(way: Callable[[nn.Module], Any]) -> None:
    model = tiny_model(layers=3)
    fails_backward(model)
    with pytest.raises(sspruner.ModelError, match=r"^backbone\.layers\.1\S*: \d+ of \d+ .*NaN") as error:
        way(model)
    assert "\n" not in str(error.value)
    assert "--seq-len" in str(error.value)
    assert "--dtype float32" in str(error.value)


@pytest.mark.parametrize("fisher", [False, True])
def test_a_block_whose_own_gradient_or_output_is_not_finite_is_named(fisher: bool) -> None:
    model = tiny_model(layers=3)
    replay = Replay(model, sspruner.trace(model), split([4]), "cpu")
    found = LocalGradients(replay, fisher=fisher)
    fails_backward(model)  # on the way, by the cuts before it
    found.add("backbone.layers.0")
    replay.advance("backbone.layers.0")
    with pytest.raises(sspruner.ModelError, match=r"^backbone\.layers\.1\.\S+: \d+ of \d+ gradients are NaN"):
        found.add("backbone.layers.1")

    model = tiny_model(layers=3)
    forward = model.backbone.layers[1].mixer.forward
    model.backbone.layers[1].mixer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * torch.inf
    with pytest.raises(sspruner.ModelError, match=r"^backbone\.layers\.1: \d+ of \d+ values of its output are NaN"):
        local(model, split([4]), fisher=fisher)


def _int8(model: nn.Module) -> None:
    linear = model.backbone.layers[1].mixer.in_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def _float8(model: nn.Module) -> None:
    linear = model.backbone.layers[1].mixer.in_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def _packed(model: nn.Module) -> None:
    model.backbone.layers[1].mixer.in_proj.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def _inference(model: nn.Module) -> None:
    linear = model.backbone.layers[1].mixer.in_proj
    with torch.inference_mode():
        linear.weight = nn.Parameter(linear.weight.clone())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_int8, r"in_proj\.weight: weights of type int8 have no gradient"),
        (_float8, r"in_proj\.weight: weights of type float8_e4m3fn have no gradient"),
        (_packed, r"in_proj\.qweight: packed weights \(int32\) have no gradient"),
        (_inference, r"in_proj\.weight: made under torch\.inference_mode\(\)"),
    ],
    ids=["int8", "float8", "packed", "inference"],
)
def test_a_model_without_gradients_is_refused_before_any_work(make: Callable[[nn.Module], None], why: str) -> None:
    model = tiny_model()
    replay = Replay(model, sspruner.trace(model), split([3, 1]), "cpu")
    make(model)
    model.forward = lambda *args, **kwargs: pytest.fail("it ran")
    ways = [
        WAYS["mean"],
        WAYS["fisher"],
        lambda _: LocalGradients(replay),
        lambda _: LocalGradients(replay, fisher=True),
    ]
    for way in ways:
        with pytest.raises(sspruner.ModelError, match=why + ".*; use a scorer that needs only weights or activations"):
            way(model)


def test_integer_buffers_are_no_weights() -> None:
    for family in FAMILIES:
        check_differentiable(zoo(family))
    model = tiny_model()
    with torch.inference_mode(), pytest.raises(sspruner.InputError, match="cannot be taken under"):
        WAYS["mean"](model)


@each_way
def test_nothing_to_predict(way: Callable[..., Any]) -> None:
    with pytest.raises(sspruner.InputError, match="nothing is predicted; give longer text"):
        way(tiny_model(), torch.eye(4, 19, dtype=torch.bool))


class Saved:
    """Bytes that graphs hold, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        outer, size = self, tensor.numel() * tensor.element_size()

        class Held:
            def __init__(self) -> None:
                self.tensor = tensor
                outer.now += size
                outer.most = max(outer.most, outer.now)

            def __del__(self) -> None:
                outer.now -= size

        return Held()


@pytest.fixture
def saved() -> Iterator[Saved]:
    counter = Saved()
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda held: held.tensor):
        yield counter


@pytest.mark.slow
def test_one_graph_of_one_block_at_a_time(saved: Saved) -> None:
    model = tiny_model(layers=8)
    WAYS["mean"](model)
    whole, saved.most = saved.most, saved.now
    assert saved.now == 0
    WAYS["local"](model)
    assert 0 < saved.most < whole / 7
    saved.most = 0
    WAYS["local fisher"](model)
    assert 0 < saved.most < whole / 14  # of one sequence of three
    assert saved.now == 0


def test_a_block_is_added_once() -> None:
    """What leads back to a block is freed with it."""
    model = tiny_model()
    replay = Replay(model, sspruner.trace(model), split([4]), "cpu")
    found = LocalGradients(replay)
    found.add(replay.blocks[0])
    with pytest.raises(KeyError):
        found.add(replay.blocks[0])
