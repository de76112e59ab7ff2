"""torch-pruning's importances as scorers, value by value against torch-pruning; and where its graph can be believed."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

import sspruner
from sspruner_plugins.torch_pruning import NORMALIZERS, REDUCTIONS, SCORERS
from support.tp_graph import EndlessWalk, tp_graph, tp_group
from support.tp_modules import DISTINCT, modules
from support.zoo import zoo

BY_NAME = {cls.name: cls for cls in SCORERS}
EVERY_NORMALIZER = [n for n in (*NORMALIZERS, "sentinel_0.3") if n != "lamp"] + ["lamp"]


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, units: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, units, bias=bias)
        self.up_proj = nn.Linear(hidden, units, bias=bias)
        self.down_proj = nn.Linear(units, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Normed(nn.Module):
    """Linear, LayerNorm, Linear: the one norm that torch-pruning counts."""

    def __init__(self, hidden: int, units: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, units, bias=bias)
        self.norm = nn.LayerNorm(units, bias=bias)
        self.down = nn.Linear(units, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


class Packed(nn.Module):
    """Zamba2's MLP: gate and up in one Linear."""

    def __init__(self, hidden: int, units: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * units, bias=bias)
        self.down = nn.Linear(units, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


#: (parameter, dimension, rows' name) of the members, as our own groups list them
MEMBERS = {
    SwiGLU: [
        ("gate_proj.weight", 0, "gate"),
        ("gate_proj.bias", 0, "gate"),
        ("up_proj.weight", 0, "up"),
        ("up_proj.bias", 0, "up"),
        ("down_proj.weight", 1, "down"),
    ],
    Normed: [
        ("up.weight", 0, "up"),
        ("up.bias", 0, "up"),
        ("norm.weight", 0, "norm"),
        ("norm.bias", 0, "norm"),
        ("down.weight", 1, "down"),
    ],
}
CASES = list(product(MEMBERS, (False, True)))


def trained(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Random parameters, and the gradients of a loss. Returns the batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 4, 5, generator=generator)
    model.zero_grad()
    model(x).square().mean().backward()
    return x


def theirs(importance: str, module: nn.Module, root: nn.Linear, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch-pruning on its own group of the output channels of `root`."""
    units = root.out_features // (2 if isinstance(module, Packed) else 1)
    graph = tp.DependencyGraph().build_dependency(module, x, verbose=False)
    group = graph.get_pruning_group(root, tp.prune_linear_out_channels, list(range(units)))
    scorer = getattr(tp.importance, importance)(**options)
    if importance == "HessianImportance":
        gradients = {p: p.grad.clone() for p in module.parameters()}
        scorer.accumulate_grad(module)
    score = scorer(group)
    if importance == "HessianImportance":  # it leaves their squares in .grad
        for p, gradient in gradients.items():
            p.grad = gradient
    return score


def view(weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor] | None = None) -> Any:
    groups, units = next(iter(weights.values())).shape[:2]
    return SimpleNamespace(weights=weights, gradients=gradients, group=SimpleNamespace(groups=groups, units=units))


def view_of(module: nn.Module) -> Any:
    parameters = dict(module.named_parameters())
    members = [m for m in MEMBERS[type(module)] if m[0] in parameters]

    def unit_by_unit(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.detach().movedim(dim, 0).reshape(1, tensor.shape[dim], -1)

    return view(
        {f"{name}:{rows}": unit_by_unit(parameters[name], dim) for name, dim, rows in members},
        {f"{name}:{rows}": unit_by_unit(parameters[name].grad, dim) for name, dim, rows in members},
    )


def ours(name: str, view: Any, **options: Any) -> torch.Tensor:
    scorer = BY_NAME[name](**options)
    scorer.observe(view)
    return scorer.importance()


def choices(cls: type) -> list[dict[str, Any]]:
    """Every combination of a scorer's options, without `unwrapped`, which is ours."""
    values = {
        "p": (1, 2, 3),
        "group_reduction": REDUCTIONS,
        "normalizer": EVERY_NORMALIZER,
        "bias": (False, True),
        "multivariable": (False, True),
    }
    names = [n for n in signature(cls).parameters if n != "unwrapped"]
    return [dict(zip(names, chosen, strict=True)) for chosen in product(*(values[n] for n in names))]


@pytest.mark.slow
@pytest.mark.ci_cover(most=9)
@pytest.mark.cover
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_every_option_gives_what_torch_pruning_gives(name: str, kind: type, bias: bool) -> None:
    cls = BY_NAME[name]
    if kind is Normed and name == "tp:fpgm":
        return  # torch-pruning's FPGM passes over LayerNorms; ours counts every member
    module = kind(5, 7, bias)
    x = trained(module)
    root, seen = next(module.children()), view_of(module)
    for options in choices(cls):
        value = theirs(cls.importance_class, module, root, x, **options)
        torch.testing.assert_close(ours(name, seen, **options)[0], value, rtol=1e-6, atol=1e-6, msg=str(options))


@pytest.mark.parametrize("name", BY_NAME)
def test_our_defaults_are_torch_prunings(name: str) -> None:
    cls = BY_NAME[name]
    defaults = {n: p.default for n, p in signature(cls).parameters.items()}
    assert defaults.pop("unwrapped") is False
    known = signature(getattr(tp.importance, cls.importance_class)).parameters
    assert {n: known[n].default for n in defaults} == defaults
    passed_over = {"target_types"} | ({"normalizer"} if name == "tp:lamp" else set())
    assert set(known) - set(defaults) - passed_over <= ({"bias"} if name == "tp:fpgm" else set())  # it ignores it


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"tp:fpgm"}))  # which takes distances between the halves, too
def test_a_packed_tensor_counts_as_its_two_halves(name: str) -> None:
    """torch-pruning adds up both rows of one tensor; we list two members. Their sums agree."""
    module = Packed(5, 7, True)
    x = trained(module)

    def halves(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        gate, up = parameter.detach().reshape(2, 1, 7, -1)
        kind = "bias" if parameter.ndim == 1 else "weight"
        return {f"gate_up.{kind}:gate": gate, f"gate_up.{kind}:up": up}

    def members(of: Any) -> dict[str, torch.Tensor]:
        down = {"down.weight:down": of(module.down.weight).detach().T[None]}
        return halves(of(module.gate_up.weight)) | halves(of(module.gate_up.bias)) | down

    seen = view(members(lambda p: p), members(lambda p: p.grad))
    importance = BY_NAME[name].importance_class
    for bias in (False, True):
        options = {"group_reduction": "sum", "bias": bias} | ({} if name == "tp:lamp" else {"normalizer": None})
        group = theirs(importance, module, module.gate_up, x, **options)
        assert len(group) == 14  # and the last seven are no units: a mean over them is half of what it should be
        torch.testing.assert_close(ours(name, seen, **options)[0], group[:7], rtol=1e-6, atol=1e-6, msg=str(options))


def random_view(sets: int = 3, units: int = 5, seed: int = 0) -> Any:
    """Members of several sizes, among them a bias, several rows per unit (flattened) and the bare A_log."""
    sizes = {"in_proj.weight:B": 6, "in_proj.weight:C": 6, "conv1d.bias:B": 1, "x_proj.weight:x": 12, "A_log:A": 4}
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        return {n: torch.randn(sets, units, size, generator=generator) for n, size in sizes.items()}

    return view(draw(), draw())


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("more", [{}, {"unwrapped": True}])
def test_sets_are_scored_apart(name: str, more: dict) -> None:
    whole, order = random_view(), torch.tensor([2, 0, 1])
    scores = ours(name, whole, **more)
    assert scores.shape == (3, 5)
    assert scores.isfinite().all()
    assert (scores >= 0).all()

    def pick(sets: torch.Tensor) -> Any:
        return view({n: w[sets] for n, w in whole.weights.items()}, {n: g[sets] for n, g in whole.gradients.items()})

    torch.testing.assert_close(ours(name, pick(order), **more), scores[order])
    torch.testing.assert_close(ours(name, pick(torch.tensor([1])), **more), scores[1:2])


@pytest.mark.parametrize("name", BY_NAME)
def test_permuting_units_permutes_scores(name: str) -> None:
    whole, order = random_view(), torch.tensor([3, 1, 4, 0, 2])
    moved = view(
        {n: w[:, order] for n, w in whole.weights.items()}, {n: g[:, order] for n, g in whole.gradients.items()}
    )
    torch.testing.assert_close(ours(name, moved), ours(name, whole)[:, order])


def test_several_rows_of_a_unit_are_one_slice() -> None:
    """A head's rows of q_proj, flattened: |sum w dw| is taken over all of them."""
    whole = random_view()
    options = {"multivariable": True, "normalizer": None, "group_reduction": "sum", "bias": True}
    change = {n: (w * whole.gradients[n]).sum(-1).abs() for n, w in whole.weights.items() if n != "A_log:A"}
    torch.testing.assert_close(ours("tp:taylor", whole, **options), sum(change.values()))


def test_what_counts_is_asked_for() -> None:
    whole = random_view()

    def magnitude(*members: str) -> torch.Tensor:
        return sum(whole.weights[m].square().sum(-1) for m in members)

    def score(**options: bool) -> torch.Tensor:
        return ours("tp:magnitude", whole, group_reduction="sum", normalizer=None, **options)

    weights = ("in_proj.weight:B", "in_proj.weight:C", "x_proj.weight:x")
    torch.testing.assert_close(score(), magnitude(*weights))
    torch.testing.assert_close(score(bias=True), magnitude(*weights, "conv1d.bias:B"))
    torch.testing.assert_close(score(unwrapped=True), magnitude(*weights, "A_log:A"))


def test_first_is_never_a_bias() -> None:
    weights = {"b.bias:x": torch.ones(1, 2, 1), "b.weight:x": torch.tensor([[[1.0], [2.0]]])}
    score = ours("tp:magnitude", view(weights), group_reduction="first", normalizer=None, bias=True)
    assert score.tolist() == [[1, 4]]


def test_lamp_by_hand() -> None:
    """Squares 4, 1, 9: each over the sum of those that are not smaller."""
    weights = {"w.weight:x": torch.tensor([[[2.0], [-1.0], [3.0]]])}
    torch.testing.assert_close(ours("tp:lamp", view(weights)), torch.tensor([[4 / 13, 1 / 14, 1.0]]))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("normalizer", EVERY_NORMALIZER)
def test_a_set_without_a_signal_scores_zero(name: str, normalizer: str | None) -> None:
    """Zero gradients, as in an expert that no token reached, beside a set that has some: never 0/0."""
    whole = random_view()
    for tensor in (*whole.gradients.values(), *(whole.weights.values() if name != "tp:taylor" else ())):
        tensor[1] = 0
    options = {} if name == "tp:lamp" else {"normalizer": normalizer}
    scores = ours(name, whole, **options)
    assert (scores[1] == 0).all()
    torch.testing.assert_close(scores[0], ours(name, random_view(), **options)[0])


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("normalizer", EVERY_NORMALIZER)
def test_a_set_of_one_unit_has_a_score(name: str, normalizer: str | None) -> None:
    options = {} if name == "tp:lamp" else {"normalizer": normalizer}
    assert ours(name, random_view(units=1), **options).isfinite().all()


@pytest.mark.parametrize("name", BY_NAME)
def test_broken_weights_are_not_hidden(name: str) -> None:
    whole = random_view()
    whole.weights["in_proj.weight:B"][0, 0, 0] = float("nan")
    assert not ours(name, whole).isfinite().all()


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_changed_and_no_random_number_drawn(name: str) -> None:
    whole, again, state = random_view(), random_view(), torch.get_rng_state()
    ours(name, whole)
    assert all(torch.equal(whole.weights[n], w) for n, w in again.weights.items())
    assert all(torch.equal(whole.gradients[n], g) for n, g in again.gradients.items())
    assert not any(w.requires_grad or w.grad is not None for w in whole.weights.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_alone_need_no_gradients() -> None:
    for name, cls in BY_NAME.items():
        if cls.needs == "weights":
            ours(name, view(random_view().weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, r"scorer 'tp:magnitude': p=0; known: any number above 0"),
        ({"p": "two"}, r"p='two'"),
        ({"p": True}, r"p=True"),
        ({"group_reduction": "gate"}, r"group_reduction='gate'; known: mean, sum, max, prod, first"),
        (
            {"normalizer": "standardization"},
            r"known: .*standarization, gaussian, lamp, sentinel_0.5 \(any fraction\), null",
        ),
        ({"normalizer": "sentinel_1"}, r"normalizer='sentinel_1'"),
        ({"normalizer": "sentinel"}, r"normalizer='sentinel'"),
        ({"normalizer": []}, r"normalizer=\[\]"),
        ({"bias": "no"}, r"bias='no'; known: true, false"),
        ({"unwrapped": 1}, r"unwrapped=1; known: true, false"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        BY_NAME["tp:magnitude"](**options)


def test_options_are_visible_to_the_engine() -> None:
    assert set(signature(BY_NAME["tp:lamp"]).parameters) == {"p", "group_reduction", "bias", "unwrapped"}
    assert set(signature(BY_NAME["tp:taylor"]).parameters) == {
        *("group_reduction", "normalizer", "multivariable", "bias", "unwrapped")
    }
    with pytest.raises(TypeError):
        BY_NAME["tp:taylor"](p=1)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_torch_pruning_is_imported_only_to_score() -> None:
    code = "import sys, sspruner_plugins.torch_pruning as p; p.SCORERS[0](); assert 'torch_pruning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- torch-pruning's dependency graph -------------------------------------------------------------------------------

HYBRIDS = ("zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "zamba")


def second_halves(sharing: list[Any], adapters: str) -> list[nn.Parameter]:
    """What zamba2's adapters of a Linear add to its output: one of each layer that uses the block."""
    slots = [slot for slot in getattr(sharing[0], adapters, []) if isinstance(slot, nn.Sequential)]
    return [slot[1].weight for slot in slots]


def expected(model: nn.Module, *slices: tuple[nn.Parameter | None, int, Any]) -> dict:
    """What tp_group should return: (parameter, dim, rows) with the parameter's first name; None is no bias."""
    names = {p: n for n, p in model.named_parameters()}
    return {(names[p], dim): rows for p, dim, rows in slices if p is not None}


def each(units: int, *offsets: int, rows: int = 1) -> tuple[tuple[int, ...], ...]:
    """Unit u owns `rows` rows from u * rows on, at every offset."""
    return tuple(tuple(o + u * rows + r for o in offsets or (0,) for r in range(rows)) for u in range(units))


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", sorted(DISTINCT))
def test_hidden_groups_are_right(family: str) -> None:
    """Everything that is as wide as the hidden size, norms too; behind Zamba's concatenation, what is twice as wide."""
    model = zoo(family, **DISTINCT[family])
    size = model.config.hidden_size
    # What a shared block of zamba and zamba2 computes has widths of its own: nothing ties them to the hidden size.
    shared = family.startswith("zamba")
    inner = [getattr(m, n) for n in ("o_proj", "down_proj") for same in modules(model, n) for m in same]
    roots = [model.get_input_embeddings(), *(inner if shared else [])]
    everything = [
        (p, dim, each(size) if width == size else each(size, 0, size))
        for name, p in model.named_parameters()
        for dim, width in enumerate(p.shape)
        if width == size
        or (shared and width == 2 * size and dim == p.ndim - 1 and "mamba." not in name and "o_proj" not in name)
    ]
    assert tp_group(tp_graph(model), *roots) == expected(model, *everything)


@pytest.mark.cover
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize(("kv", "ratio"), [(2, 1), (2, 2), (1, 3)])
def test_attention_groups_are_right_from_the_queries(family: str, kv: int, ratio: int) -> None:
    """A head of keys and values with the query heads that share it, and zamba2's adapters."""
    model = zoo(family, kv=kv, ratio=ratio)
    graph = tp_graph(model)
    for sharing in modules(model, "q_proj", "k_proj", "v_proj", "o_proj"):
        width = sharing[0].head_dim
        heads = sharing[0].k_proj.out_features // width
        queries = sharing[0].q_proj.out_features // heads
        slices = [(sharing[0].o_proj.weight, 1, each(heads, rows=queries))]
        for letter, rows in zip("qkv", (queries, width, width), strict=True):
            projection = getattr(sharing[0], f"{letter}_proj")
            adapters = second_halves(sharing, f"linear_{letter}_adapter_list")
            slices += [(p, 0, each(heads, rows=rows)) for p in (projection.weight, projection.bias, *adapters)]
        group = expected(model, *slices)
        assert tp_group(graph, *(m.q_proj for m in sharing), rows=queries) == group
        if queries > width:  # grouped queries: from keys or values it finds less
            assert len(tp_group(graph, *(m.v_proj for m in sharing), rows=width)) < len(group)


@pytest.mark.cover
@pytest.mark.parametrize("family", HYBRIDS)
def test_mlp_groups_are_right(family: str) -> None:
    model = zoo(family)
    graph = tp_graph(model)
    seen = 0
    for up, down in (("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        for sharing in modules(model, up, down):
            first, reads = getattr(sharing[0], up), getattr(sharing[0], down).weight
            units = reads.shape[1]
            rows = each(units, 0, units) if first.out_features > units else each(units)  # [gate | up] in one
            gate = getattr(sharing[0], "gate_proj", None)  # none in nemotron_h
            writes = [p for linear in (first, gate) if linear is not None for p in (linear.weight, linear.bias)]
            writes += second_halves(sharing, f"{up}_adapter_list")
            group = expected(model, (reads, 1, each(units)), *((p, 0, rows) for p in writes))
            assert tp_group(graph, *(getattr(m, up) for m in sharing), units=units) == group
            seen += 1
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DISTINCT))
def test_limit_nothing_inside_a_mixer(family: str) -> None:
    """Why the axes of a mixer are specified by hand: there is no group to compare with."""
    model = zoo(family)
    graph = tp_graph(model)
    [mixer] = modules(model, "in_proj", "out_proj")[0]
    with pytest.raises(ValueError, match="not in the dependency graph"):
        tp_group(graph, mixer.conv1d, units=1)
    if family == "zamba":  # stubbed: it cannot even be traced
        return
    for name in ("in_proj", "x_proj"):
        if hasattr(mixer, name):
            with pytest.raises((ZeroDivisionError, IndexError)):
                tp_group(graph, getattr(mixer, name), units=1)


def test_limit_a_latent_size_is_taken_for_the_hidden_size() -> None:
    """nemotron_h's experts work in a narrower space; torch-pruning takes the product for element by element."""
    model = zoo("nemotron_h", moe_latent_size=16)
    found = tp_group(tp_graph(model), model.get_input_embeddings())
    name = next(n for n, _ in model.named_parameters() if n.endswith("fc1_latent_proj.weight"))
    assert found[name, 0][20] == (20,)
    assert model.get_parameter(name).shape[0] == 16  # there is no row 20


@pytest.mark.slow
def test_limit_rotary_embeddings_are_walked_for_ever() -> None:
    model = zoo("bamba")
    graph = tp.DependencyGraph().build_dependency(
        model, torch.arange(9)[None], forward_fn=lambda m, x: m(x, use_cache=False).logits, verbose=False
    )
    [attention] = modules(model, "q_proj", "k_proj", "v_proj")[0]
    with pytest.raises(EndlessWalk):
        tp_group(graph, attention.q_proj, units=1)


def test_limit_it_needs_a_trace_without_a_cache() -> None:
    with pytest.raises(AttributeError):
        tp.DependencyGraph().build_dependency(zoo("mamba2"), torch.arange(9)[None], verbose=False)


def test_limit_pruning_unties_and_leaves_the_config() -> None:
    model = zoo("mamba2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    size = model.config.hidden_size
    tp_graph(model).get_pruning_group(model.get_input_embeddings(), tp.prune_embedding_out_channels, [0]).prune()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.lm_head.weight.shape[1] == size - 1
    assert model.config.hidden_size == size
