"""What the shipped scorers compute: formulas against the model itself, symmetries, invariances, and their ranking."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.decide import select
from sspruner.calibrate.sources import Calibration
from sspruner.graph.family import Projected, SelectiveProjected
from sspruner.graph.group import DependencyGroup
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.scoring.known import find_scorer
from sspruner.surgery.mask import mask_group, unmask
from support import oracle
from support.examples import examples
from support.mamba1_state import slow_output
from support.scoring import batches_of, calibrated, importance, loose, permute_states, shown, units, without
from support.tiny import models, tiny_model, tokens
from support.zoo import rounding, zoo, zoo_models

FP32 = (torch.float32,)
SCORERS = [("ghost", {}), ("ghost", {"variant": "means"}), ("magnitude", {}), ("random", {})]

MAMBA1, MAMBA2 = ("mamba", "falcon_mamba", "zamba"), ("mamba2", "zamba2")
GHOST_AXES = {  # and the families that have them
    "state": MAMBA2 + MAMBA1,
    "head": (*MAMBA2, "zamba"),
    "head_dim": (*MAMBA2, "zamba"),
    "group": MAMBA2,
    "channel": MAMBA1[:2],
}


@given(models(dtypes=FP32), st.sampled_from([s for s in SCORERS if s[0] != "random"]), st.integers(0, 99))
def test_permuting_states_permutes_scores(model: torch.nn.Module, scorer: tuple, seed: int) -> None:
    name, options = scorer
    before = importance(model, tokens(), name, options=options)
    permuted = copy.deepcopy(model)
    orders = permute_states(permuted, torch.Generator().manual_seed(seed))
    for group, scores in importance(permuted, tokens(), name, options=options).items():
        expected = before[group].gather(1, orders[group])
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@given(models(dtypes=FP32), st.floats(0.01, 100), st.sampled_from(["joint", "means"]), st.data())
def test_scaling_what_reads_a_state_scales_its_score(
    model: torch.nn.Module, c: float, variant: str, data: st.DataObject
) -> None:
    """C[n] * c on the view gives S[n] * c and leaves every other score alone."""
    cls, _ = find_scorer("ghost")
    for view in shown(model, tokens(), "state"):
        G, N = view.B.shape[2:]
        g, n = data.draw(st.integers(0, G - 1)), data.draw(st.integers(0, N - 1))
        plain, scaled = cls(variant=variant), cls(variant=variant)
        plain.axis = scaled.axis = "state"
        plain.observe(view)
        factor = torch.ones(G, N)
        factor[g, n] = c
        view.observation.__dict__["projected"] = replace(view.projected, C=view.projected.C * factor)
        view.observation.__dict__.pop("ghost_sum", None)
        scaled.observe(view)
        torch.testing.assert_close(scaled.importance(), plain.importance() * factor.double(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("axis", ["state", "head", "head_dim", "group"])
@examples(12)
@given(model=models(dtypes=FP32), data=st.data())
def test_ghost_is_the_mean_squared_change_of_y(model: torch.nn.Module, axis: str, data: st.DataObject) -> None:
    """S^2 = what the mixer's scan output really changes by, per token, when only that unit is masked."""
    ids = tokens(2, 19)
    graph = sspruner.trace(model)
    assume(axis in graph.axes)
    scores = importance(model, ids, axis=axis)
    name = data.draw(st.sampled_from(list(graph.on_axis(axis))))
    group = graph.groups[name]
    g, n = data.draw(st.sampled_from(units(group)))
    if group.units == 1:
        return  # a layer without a state is not a cut
    y = [_scan_output(model, group.layer, ids)]
    mask_group(model, group, without(group, g, n))
    y.append(_scan_output(model, group.layer, ids))
    unmask(model)
    measured = (y[1] - y[0]).double().square().sum() / ids.numel()
    exact = scores[name][g, n].double().square()
    # y carries fp32 rounding of all other states; only what is above it can be compared
    rounded = float(y[0].double().square().sum() / ids.numel()) * 1e-11
    torch.testing.assert_close(measured, exact, rtol=2e-3, atol=rounded)


def _scan_output(model: torch.nn.Module, layer: str, ids: torch.Tensor) -> torch.Tensor:
    """What the model's own code hands to the gated norm: (b, T, H*P)."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(f"{layer}.norm").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis"), [("mamba", "state"), ("zamba", "state"), ("zamba", "head")])
def test_ghost_is_what_mamba1s_own_scan_loses(family: str, axis: str) -> None:
    """With a gate that is the same constant everywhere, what enters out_proj is y times that constant."""
    model, ids, gate = zoo(family), tokens(2, 19), 3.0
    graph = sspruner.trace(model)
    for name in graph.on_axis("state"):
        mixer = model.get_submodule(name.rpartition(":")[0])
        z = slice(1, None, 2) if family == "zamba" else slice(mixer.intermediate_size, None)
        with torch.no_grad():
            mixer.in_proj.weight[z] = 0
            mixer.in_proj.bias[z] = gate
    for name, scores in importance(model, ids, axis=axis).items():
        group = graph.groups[name]
        dense = _into(model, f"{group.layer}.out_proj", ids)
        for g, u in units(group):
            mask_group(model, group, without(group, g, u))
            change = (_into(model, f"{group.layer}.out_proj", ids) - dense).double() / F.silu(torch.tensor(gate))
            unmask(model)
            if axis == "head":  # a masked head has no gate either: what is left of it is nothing
                assert (change != 0).any(-1).all()
            measured = change.square().sum() / ids.numel()
            rounded = float(dense.double().square().sum() / ids.numel()) * 1e-11
            torch.testing.assert_close(measured, scores[g, u].double().square(), rtol=2e-3, atol=rounded)


def _into(model: torch.nn.Module, path: str, ids: torch.Tensor) -> torch.Tensor:
    """The input of one module when the model runs."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    (found,) = seen
    return found


def zeroed(view: sspruner.SSMView, g: int, u: int) -> Projected | SelectiveProjected:
    """What the scan is fed with one unit at zero: C of a state; x of all channels that a head, group, ... owns."""
    p = view.projected
    if view.group.axis == "state":
        C = p.C.clone()
        C[..., g, u] = 0
        return replace(p, C=C)
    (channels,) = (m.index[g, u] for m in view.group.members if m.tensor.endswith("conv1d.weight") and m.rows == "x")
    x = p.x.flatten(2).clone()
    x[..., channels] = 0
    return replace(p, x=x.view_as(p.x))


def y_of(p: Projected | SelectiveProjected) -> torch.Tensor:
    """fp64 (b, T, heads, channels), by the plain recurrence."""
    return (oracle.output(p) if isinstance(p, Projected) else slow_output(p)).detach()


def on_axis(axis: str) -> st.SearchStrategy:
    """(model of a family that has the axis, the axis)."""
    return st.tuples(zoo_models(GHOST_AXES[axis]).filter(lambda m: axis in sspruner.trace(m).axes), st.just(axis))


EVERY_AXIS = st.sampled_from(list(GHOST_AXES)).flatmap(on_axis)


@pytest.mark.slow
@examples(15)
@given(EVERY_AXIS, st.integers(1, 19))
def test_ghost_is_exact_on_every_axis(drawn: tuple[torch.nn.Module, str], length: int) -> None:
    """S^2 = the mean squared change of y per token that counts, in fp64, with one unit of the view at zero."""
    model, axis = drawn
    mask = torch.arange(19) < torch.tensor([19, length])[:, None]
    scores = importance(model, tokens(2, 19), axis=axis, mask=mask)
    seen = shown(model, tokens(2, 19), axis, mask=mask)
    assert [view.group.name for view in seen] == list(scores)
    for view in seen:
        assert view.tokens == 19 + length
        y = y_of(view.projected)
        change = [y - y_of(zeroed(view, g, u)) for g, u in units(view.group)]
        measured = [(c * view.mask[..., None, None]).square().sum() / view.tokens for c in change]
        exact = scores[view.group.name].double().square()
        assert exact.shape == (view.group.groups, view.group.units)
        largest = float(y.square().amax())
        torch.testing.assert_close(exact.flatten(), torch.stack(measured), rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.slow
def test_every_axis_that_ghost_offers_is_tested() -> None:
    cls, _ = find_scorer("ghost")
    assert cls.axes == set(GHOST_AXES)
    for axis, families in GHOST_AXES.items():
        for family in families:
            assert importance(zoo(family), tokens(), axis=axis)


@pytest.mark.slow
@examples(15)
@given(EVERY_AXIS)
def test_ghost_in_batches_is_ghost_at_once(drawn: tuple[torch.nn.Module, str]) -> None:
    model, axis = drawn
    ids = tokens(5, 19)
    mask = torch.arange(19) < torch.tensor([19, 3, 11, 19, 1])[:, None]
    together = importance(model, ids, axis=axis, mask=mask)
    for size in (19, 38):
        with batches_of(size):
            apart = importance(model, ids, axis=axis, mask=mask)
        for group, scores in together.items():
            largest = float(scores.max())
            torch.testing.assert_close(apart[group], scores, rtol=loose(model), atol=loose(model) * largest)


@pytest.mark.slow
@examples(15)
@given(EVERY_AXIS, st.lists(st.integers(2, 19), min_size=2, max_size=4))
def test_ghost_does_not_see_padding(drawn: tuple[torch.nn.Module, str], lengths: list[int]) -> None:
    """Rows padded right with any token score as the same rows given one by one."""
    model, axis = drawn
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    padded = importance(model, ids, axis=axis, mask=mask)
    garbage = importance(model, torch.where(mask, ids, 7), axis=axis, mask=mask)
    rows = [importance(model, ids[i : i + 1, :n], axis=axis) for i, n in enumerate(lengths)]
    for group, scores in padded.items():
        squares = torch.stack([row[group].double().square() * n for row, n in zip(rows, lengths, strict=True)])
        expected = (squares.sum(0) / sum(lengths)).sqrt().float()
        for found in (scores, garbage[group]):
            torch.testing.assert_close(found, expected, rtol=loose(model), atol=loose(model) * float(expected.max()))


@given(models(dtypes=FP32))
def test_means_is_the_product_of_means(model: torch.nn.Module) -> None:
    scores = importance(model, tokens(), options={"variant": "means"})
    for view in shown(model, tokens(), "state"):
        p = view.projected
        b, T, G, N = p.B.shape
        h2 = oracle.states(p).square().sum(3).view(b, T, G, -1, N).sum(3).mean((0, 1))  # (G, N)
        c2 = p.C.double().square().mean((0, 1))
        torch.testing.assert_close(
            scores[f"{view.layer}:state"].double(),
            (h2 * c2).sqrt(),
            rtol=1e-3,
            atol=1e-5 * float((h2 * c2).sqrt().max()),
        )


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize(("name", "options"), SCORERS)
@given(model=models())
def test_a_batch_split_changes_nothing(name: str, options: dict, model: torch.nn.Module) -> None:
    ids = tokens(6, 19)
    together = importance(model, ids, name, options=options)
    with batches_of(19):  # one sequence at a time
        apart = importance(model, ids, name, options=options)
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    for group, scores in together.items():
        torch.testing.assert_close(apart[group], scores, rtol=tolerance, atol=tolerance * float(scores.max()))


@pytest.mark.slow
@given(models(dtypes=FP32), st.sampled_from([s for s in SCORERS if s[0] == "ghost"]), st.data())
def test_padding_changes_nothing(model: torch.nn.Module, scorer: tuple, data: st.DataObject) -> None:
    """Rows of different lengths, padded right with any token, score as the same rows given one by one."""
    lengths = data.draw(st.lists(st.integers(2, 19), min_size=2, max_size=4))
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    padded = importance(model, ids, scorer[0], options=scorer[1], mask=mask)
    garbage = torch.where(mask, ids, 7)
    again = importance(model, garbage, scorer[0], options=scorer[1], mask=mask)
    for group, scores in padded.items():
        torch.testing.assert_close(again[group], scores)
    if scorer[1]:
        return  # the product of means is not a sum over rows
    squares = dict.fromkeys(padded, 0.0)
    for row, n in enumerate(lengths):
        for group, scores in importance(model, ids[row : row + 1, :n]).items():
            squares[group] = squares[group] + scores.double().square() * n
    for group, total in squares.items():
        expected = (total / sum(lengths)).sqrt().float()
        torch.testing.assert_close(padded[group], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@given(models(dtypes=FP32), st.integers(1, 9))
def test_left_padding_changes_nothing_without_biases(model: torch.nn.Module, pad: int) -> None:
    """in_proj's bias reaches padded positions in transformers itself, so this law holds for models without it."""
    assume(not model.config.use_bias)
    ids = tokens(2, 12)
    padded = torch.cat([torch.full((2, pad), 3), ids], 1)
    mask = torch.arange(12 + pad).expand(2, -1) >= pad
    plain = importance(model, ids)
    for group, scores in importance(model, padded, mask=mask).items():
        torch.testing.assert_close(scores, plain[group], rtol=1e-3, atol=1e-5 * float(plain[group].max()))


def test_magnitude_is_the_product_of_row_norms() -> None:
    model = tiny_model(groups=2, state=3)
    mixer = model.backbone.layers[1].mixer
    D, weight = mixer.intermediate_size, mixer.in_proj.weight.detach().double()
    scores = sspruner.score(model, "magnitude").importance["backbone.layers.1.mixer:state"]
    for g in range(2):
        for n in range(3):
            B, C = weight[2 * D + 3 * g + n], weight[2 * D + 6 + 3 * g + n]
            expected = (B**2).sum().sqrt() * (C**2).sum().sqrt()
            assert float(scores[g, n]) == pytest.approx(float(expected), rel=1e-6)


def test_magnitude_of_mamba1_states_is_the_product_of_row_norms_of_x_proj() -> None:
    mamba, zamba = zoo("mamba"), zoo("zamba")
    mixer = mamba.backbone.layers[1].mixer
    rows = mixer.x_proj.weight.detach().double()  # (R + 2 N, D)
    B, C = rows[3:9].norm(dim=1), rows[9:].norm(dim=1)
    scores = sspruner.score(mamba, "magnitude").importance["backbone.layers.1.mixer:state"]
    torch.testing.assert_close(scores, (B * C)[None].float())

    mixer = zamba.model.layers[3].mamba_decoder.mamba
    rows = mixer.x_proj_weight.detach().double()  # (heads, R + 2 N, P)
    B, C = rows[:, 3:9].norm(dim=2), rows[:, 9:].norm(dim=2)
    scores = sspruner.score(zamba, "magnitude").importance["model.layers.3.mamba_decoder.mamba:state"]
    torch.testing.assert_close(scores, (B * C).float())


FAMILIES_AND_AXES = [
    (family, axis)
    for family, axes in {
        "mamba2": "head head_dim group hidden block",
        "mamba": "channel dt_rank hidden block",
        "falcon_mamba": "channel dt_rank hidden block",
        "zamba2": "head head_dim group attn_head mlp hidden block",
        "zamba": "head head_dim dt_rank attn_head mlp hidden",
        "bamba": "head attn_head mlp hidden mixer",
    }.items()
    for axis in axes.split()
]


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize(("family", "axis"), FAMILIES_AND_AXES)
def test_magnitude_is_the_norm_of_the_removed_weights(family: str, axis: str) -> None:
    """Independent of the view: the energy that the model's parameters lose when one unit goes."""
    model = zoo(family)
    graph = sspruner.trace(model)
    full = energy(model)
    for name, scores in sspruner.score(model, "magnitude", axis=axis).importance.items():
        group = graph.groups[name]
        for g, u in units(group)[:: max(1, group.groups * group.units // 12)]:
            if group.blocks:  # a mask zeroes only what writes; a dropped module goes as a whole
                left = energy(sspruner.apply(copy.deepcopy(model), Plan({name: without(group, g, u)})))
            else:
                mask_group(model, group, without(group, g, u))
                left = energy(model)
                unmask(model)
            assert float(scores[g, u]) == pytest.approx((full - left) ** 0.5, rel=1e-5)


def energy(model: torch.nn.Module) -> float:
    """Sum of the squares of all parameters, shared ones once, in fp64."""
    return sum(float(p.detach().double().square().sum()) for p in model.parameters())


@pytest.mark.cover
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", [None, "sum", "mean", "max"])
@pytest.mark.parametrize("axis", ["state", "head", "hidden", "weight"])
def test_magnitude_by_norm_and_reduction(p: int, reduction: str | None, axis: str) -> None:
    """Against loops over the rows that each unit owns; an element that a unit owns twice counts twice but in L2."""
    model = zoo("bamba")
    options = {"p": p, "reduction": reduction}
    graph = sspruner.trace(model)
    scores = sspruner.score(model, "magnitude", axis=axis, options=options).importance
    for name, group in list(graph.on_axis(axis).items())[:2]:
        for g, u in [(0, 0), (group.groups - 1, group.units - 1)]:
            if group.tensor:
                expected = abs(float(model.get_parameter(group.tensor).data[g, u]))
            else:
                expected = by_hand(model, group, g, u, p, reduction)
            assert float(scores[name][g, u]) == pytest.approx(expected, rel=1e-4), (name, g, u)


def by_hand(model: torch.nn.Module, group: DependencyGroup, g: int, u: int, p: int, reduction: str | None) -> float:
    owned = {}
    for m in group.members:
        if m.counted:
            rows = model.get_parameter(m.tensor).data.double().movedim(m.dims[0], 0)[m.index[g, u]]
            owned[f"{m.tensor}:{m.rows}"] = rows.flatten().tolist()
    norms = {key: sum(abs(v) ** p for v in values) ** (1 / p) for key, values in owned.items()}
    if reduction:
        return {"sum": sum(norms.values()), "max": max(norms.values()), "mean": sum(norms.values()) / len(norms)}[
            reduction
        ]
    if group.axis == "state":
        made = {r: [n for key, n in norms.items() if "in_proj" in key and key.endswith(r)] for r in (":B", ":C")}
        assert all(len(parts) == 2 for parts in made.values())  # weight and bias
        return math.prod(sum(n**p for n in parts) ** (1 / p) for parts in made.values())
    return sum(norm**p for norm in norms.values()) ** (1 / p)


@pytest.mark.parametrize("options", [{"p": 3}, {"reduction": "prod"}])
def test_magnitude_refuses_unknown_options(options: dict) -> None:
    with pytest.raises(sspruner.InputError, match=r"scorer 'magnitude': .*; known: "):
        sspruner.score(tiny_model(), "magnitude", options=options)


def test_whole_blocks_have_one_norm() -> None:
    with pytest.raises(sspruner.InputError, match=r"whole modules have their L2 norm only"):
        sspruner.score(tiny_model(), "magnitude", axis="block", options={"p": 1})


def test_magnitude_on_parameters_named_by_hand() -> None:
    model = zoo("zamba2")
    scores = sspruner.score(model, "magnitude", axis=["head", "mlp"]).importance
    mixer, forward = model.model.layers[2].mamba, model.model.layers[1].shared_transformer.feed_forward
    D, K, P, GN = 16, 2, 4, 12  # channels, heads per group, channels per head, B rows
    for g, k in ((0, 1), (1, 0)):
        h = g * K + k
        c = torch.arange(h * P, h * P + P)
        rows = torch.cat([c, D + c, torch.tensor([2 * D + 2 * GN + h])])
        parts = [mixer.in_proj.weight[rows], mixer.conv1d.weight[c], mixer.conv1d.bias[c], mixer.norm.weight[c]]
        parts += [mixer.in_proj.bias[rows]] if mixer.in_proj.bias is not None else []
        parts += [mixer.A_log[h], mixer.D[h], mixer.dt_bias[h], mixer.out_proj.weight[:, c]]
        expected = torch.cat([part.detach().double().flatten() for part in parts]).norm()
        assert float(scores["model.layers.2.mamba:head"][g, k]) == pytest.approx(float(expected), rel=1e-6)
    adapters = [a[1].weight for a in forward.gate_up_proj_adapter_list if not isinstance(a, torch.nn.Identity)]
    assert adapters
    for u in (0, 9):
        parts = [weight[[u, 10 + u]] for weight in (forward.gate_up_proj.weight, *adapters)]
        biases = [forward.gate_up_proj.bias[[u, 10 + u]]] if forward.gate_up_proj.bias is not None else []
        parts += [*biases, forward.down_proj.weight[:, u]]
        expected = torch.cat([part.detach().double().flatten() for part in parts]).norm()
        name = "model.layers.1.shared_transformer.feed_forward:mlp"
        assert float(scores[name][0, u]) == pytest.approx(float(expected), rel=1e-6)


@examples(15)
@given(
    zoo_models(("mamba2", "mamba", "zamba2", "zamba", "falcon_h1")),
    st.lists(st.integers(2, 19), min_size=3, max_size=3),
)
def test_influence_is_one_minus_the_mean_cosine(model: torch.nn.Module, lengths: list[int]) -> None:
    """Against hooks on the blocks of one plain forward; padding does not count; batches change nothing."""
    ids, mask = tokens(3, 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    (group,) = sspruner.trace(model).on_axis("block").values()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(path: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            seen[path] = before, out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [model.get_submodule(b.path).register_forward_hook(note(b.path), with_kwargs=True) for b in group.blocks]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = []
    for block in group.blocks:
        h, out = (x.double()[mask] for x in seen[block.path])
        expected.append(1 - ((h * out).sum(-1) / (h.norm(dim=-1) * out.norm(dim=-1))).mean())
    for size in (4096, 19):
        with batches_of(size):
            found = importance(model, ids, "block-influence", axis="block", mask=mask)
        assert list(found) == [group.name]
        torch.testing.assert_close(found[group.name], torch.stack(expected)[None].float(), rtol=1e-4, atol=loose(model))


GRADIENT_AXES = [
    ("mamba2", "state"),
    ("mamba2", "hidden"),
    ("mamba", "channel"),
    ("falcon_mamba", "state"),
    ("zamba", "head_dim"),
    ("zamba", "hidden"),
    ("zamba2", "mlp"),
    ("zamba2", "hidden"),
    ("bamba", "attn_head"),
]


def plain_gradients(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean next-token loss, by autograd alone, on a copy in fp32, one row at a time without its padding."""
    model = copy.deepcopy(model).float()
    losses = []
    for row, keep in zip(ids, mask, strict=True):
        n = int(keep.sum())
        logits = model(input_ids=row[None, :n], use_cache=False).logits[0]
        losses += [F.cross_entropy(logits[t], row[t + 1]) for t in range(n - 1)]
    torch.stack(losses).mean().backward()
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.slow
@pytest.mark.ci_cover(families=10)
@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "axis"), GRADIENT_AXES)
def test_gradients_are_those_of_plain_autograd(family: str, axis: str, dtype: torch.dtype) -> None:
    model = zoo(family, dtype=dtype)
    ids, mask = tokens(3, 19), torch.arange(19) < torch.tensor([19, 7, 12])[:, None]
    plain = plain_gradients(model, ids, mask)
    tolerance = max(1e-4, 30 * rounding(copy.deepcopy(model).float(), ids))
    for size in (4096, 19):
        with batches_of(size):
            seen = shown(model, ids, axis, "gradients", mask)
        assert {view.group.name for view in seen} == set(sspruner.trace(model).on_axis(axis))
        for view in seen:
            counted = [m for m in view.group.members if m.counted]
            assert len(view.gradients) == len(counted)
            for member, gradient in zip(counted, view.gradients.values(), strict=True):
                expected = member.gather(plain[member.tensor])
                assert gradient.dtype == torch.float32
                assert expected.any()
                torch.testing.assert_close(
                    gradient, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
                )


def test_gradients_of_one_tensor_row_by_row() -> None:
    model, ids = tiny_model(groups=2, state=3), tokens()
    plain = plain_gradients(model, ids, torch.ones_like(ids, dtype=torch.bool))
    view = shown(model, ids, "state", "gradients")[1]
    D = model.backbone.layers[1].mixer.intermediate_size
    rows = plain["backbone.layers.1.mixer.in_proj.weight"][2 * D :]  # B (2 x 3), C (2 x 3), dt
    expected = {"in_proj.weight:B": rows[:6].view(2, 3, -1), "in_proj.weight:C": rows[6:12].view(2, 3, -1)}
    for name, gradient in expected.items():
        torch.testing.assert_close(view.gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "mamba"])
def test_a_gradient_scorer_leaves_the_model_as_it_was(family: str, dtype: torch.dtype) -> None:
    """Parameters to the bit and by identity, their gradients and requires_grad, buffers and training mode."""
    model = zoo(family, dtype=dtype).train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    before = {n: (p, p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    shown(model, tokens(), "state", "gradients")
    for name, parameter in model.named_parameters():
        same, _, bits, required = before[name]
        assert parameter is same
        assert parameter.dtype == dtype
        assert torch.equal(parameter, bits)
        assert parameter.requires_grad == required
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: b[3] for n, b in before.items()}
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert model.training
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(grads)
    assert all(torch.equal(found[n], grads[n]) for n in grads)


def test_each_need_gives_its_own_part_of_the_view() -> None:
    model = tiny_model()
    (weights, *_), (gradients, *_) = (shown(model, tokens(), "state", needs) for needs in ("weights", "gradients"))
    with pytest.raises(sspruner.PluginError, match="set needs='activations'"):
        gradients.C  # noqa: B018
    with pytest.raises(sspruner.PluginError, match="set needs='gradients'"):
        weights.gradients  # noqa: B018
    block = shown(zoo("zamba2"), tokens(), "block")[3]
    assert (block.unit, block.layer) == (3, "model.layers.3")
    assert block.hidden.shape == block.output.shape == (2, 19, 8)
    with pytest.raises(sspruner.PluginError, match="is not a mixer"):
        block.C  # noqa: B018
    mixer = shown(zoo("zamba2"), tokens(), "hidden")[0]
    with pytest.raises(sspruner.PluginError, match="only whole blocks have an output"):
        mixer.output  # noqa: B018


class HiddenEnergy(sspruner.Scorer):
    """Mean square of each hidden unit, over all mixers' inputs."""

    name, axes = "hidden energy", {"hidden"}

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def observe(self, view: sspruner.SSMView) -> None:
        if view.layer.endswith("mamba"):  # attention and MLPs are shown, too
            self.total = self.total + view.hidden.double().square()[view.mask].sum(0)

    def importance(self) -> torch.Tensor:
        return self.total[None]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zamba2", "bamba"])
def test_a_hidden_scorer_through_prune_on_a_hybrid(family: str) -> None:
    model, ids = zoo(family), tokens(3, 19)
    graph = sspruner.trace(model)
    (name,) = graph.on_axis("hidden")
    energies = torch.zeros(8, dtype=torch.float64)
    for layer in graph.layers:
        energies += _into(model, f"{layer.path}.in_proj", ids).double().square().sum((0, 1))
    result = sspruner.prune(model, HiddenEnergy, axis="hidden", keep=5, calibration=calibrated(ids))
    kept = tuple(sorted(energies.argsort(descending=True)[:5].tolist()))
    assert result.plan.groups == {name: Selection(8, (kept,))}
    torch.testing.assert_close(result.scores.importance[name][0], energies.float(), rtol=1e-4, atol=1e-4)
    assert model.get_input_embeddings().weight.shape[1] == 5
    assert result.report.proof.parameters_removed > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "keep"), [("zamba2", 3), ("bamba", 3)])
def test_a_block_scorer_through_prune_on_a_hybrid(family: str, keep: int) -> None:
    model, ids = zoo(family), tokens(3, 19)
    (name,) = sspruner.trace(model).on_axis("block")
    scores = importance(model, ids, "block-influence", axis="block")[name]
    blocks = list(model.model.layers)
    result = sspruner.prune(model, "block-influence", axis="block", keep=keep, calibration=calibrated(ids))
    assert torch.equal(result.scores.importance[name], scores)  # whole blocks are never cut on the way
    assert result.plan.groups == {name: select(scores, keep)}
    assert [blocks.index(block) for block in model.model.layers] == list(result.plan.groups[name].keep[0])
    assert model.config.num_hidden_layers == keep
    assert result.report.layers == {name: {"before": len(blocks), "after": keep}}


@pytest.mark.slow
def test_two_axes_with_two_scorers_in_one_plan() -> None:
    model, data = zoo("zamba2"), calibrated(tokens(3, 19))
    dense = copy.deepcopy(model)
    scorers, fractions = {"head": "ghost", "mlp": "magnitude"}, {"head": 0.5, "mlp": 0.2}
    result = sspruner.prune(model, scorers, axis=fractions, one_shot=True, calibration=data)
    both = sspruner.score(dense, scorers, axis=["head", "mlp"], calibration=data).importance
    expected = {}
    for axis, after in (("head", 1), ("mlp", 8)):
        alone = sspruner.score(dense, scorers[axis], axis=axis, calibration=data).importance
        for name, scores in alone.items():
            assert torch.equal(both[name], scores)
            assert torch.equal(result.scores.importance[name], scores)
            expected[name] = select(scores, after)
    assert result.plan.groups == expected
    assert (result.report.scorer, result.report.axis) == ("ghost, magnitude", "head, mlp")
    assert result.report.budget["sparsity"] == fractions
    by_hand = sspruner.apply(dense, sspruner.Plan(expected))
    assert all(torch.equal(p, by_hand.get_parameter(n)) for n, p in model.named_parameters())


def test_every_axis_needs_a_scorer_that_can_score_it() -> None:
    model = zoo("zamba2")
    with pytest.raises(sspruner.InputError, match=r"no scorer for axis 'mlp': head have one; add mlp=NAME"):
        sspruner.prune(model, {"head": "ghost"}, axis={"head": 0.5, "mlp": 0.2}, calibration=tokens())
    says = r"'ghost' does not score axis 'mlp'; it scores .*; these score mlp: flap, magnitude, random"
    with pytest.raises(sspruner.InputError, match=says):
        sspruner.prune(model, "ghost", axis={"head": 0.5, "mlp": 0.2}, calibration=tokens())


def test_random_depends_on_seed_and_layer_only() -> None:
    one, two = tiny_model(seed=1, state=64), tiny_model(seed=2, state=64)
    scores = sspruner.score(one, "random", seed=5).importance
    same = sspruner.score(two, "random", seed=5).importance
    other = sspruner.score(one, "random", seed=6).importance
    first, second = scores.values()
    assert all(torch.equal(scores[g], same[g]) for g in scores)
    assert not torch.equal(first, second)
    assert not any(torch.equal(scores[g], other[g]) for g in scores)
    assert sorted(first[0].tolist()) == list(range(64))  # a permutation


def test_a_scorer_leaves_the_model_alone() -> None:
    for name, options in SCORERS:
        model = tiny_model().train()
        before = {n: p.clone() for n, p in model.named_parameters()}
        importance(model, tokens(), name, options=options)
        assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
        assert model.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_broken_weights_is_refused_by_name(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[0] = bad
    for job in (sspruner.score, sspruner.prune):
        with pytest.raises(sspruner.ModelError, match=r"backbone\.layers\.1\.mixer\.D: 1 of 2 weights are NaN or inf"):
            job(model, "magnitude", calibration=tokens())


def follows_the_cut_layers(model: torch.nn.Module, scorer: Any, axes: dict[str, float], tolerance: float) -> None:
    """Every group's scores are those on the model in which the layers before it, and no part of its own, are cut."""
    dense, data = copy.deepcopy(model), calibrated(tokens(3, 19))
    result = sspruner.prune(model, scorer, axis=axes, calibration=data)
    blocks = f"{sspruner.trace(dense).blocks}."
    layer = {name: int(name.removeprefix(blocks).partition(".")[0]) for name in result.scores.importance}
    for name, scores in result.scores.importance.items():
        cut = {n: selection for n, selection in result.plan.groups.items() if layer[n] < layer[name]}
        so_far = copy.deepcopy(dense)  # the model whose inputs this layer should have seen
        if cut:
            so_far.load_state_dict(sspruner.apply(copy.deepcopy(dense), Plan(cut), mode="mask").state_dict())
        expected = sspruner.score(so_far, scorer, axis=list(axes), calibration=data).importance[name]
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=tolerance * float(expected.max()))
        assert result.plan.groups[name] == select(scores, result.plan.groups[name].after)


@pytest.mark.slow
@given(models(dtypes=FP32), st.data())
def test_sequential_scores_each_layer_on_the_cut_ones_before_it(model: torch.nn.Module, data: st.DataObject) -> None:
    state = model.config.state_size
    assume(state > 1)
    follows_the_cut_layers(model, "ghost", {"state": data.draw(st.integers(1, state - 1)) / state}, 1e-5)


SEVERAL_AXES = {
    "mamba2": {"state": 0.5, "head": 0.5},
    "mamba": {"channel": 0.5, "state": 0.5},
    "falcon_mamba": {"state": 0.5, "channel": 0.25},
    "zamba2": {"head_dim": 0.5, "state": 0.5, "group": 0.5},
    "zamba": {"head": 0.5, "state": 0.5},
}


@pytest.mark.slow
@pytest.mark.cover(families=1)
@pytest.mark.parametrize("family", SEVERAL_AXES)
def test_one_axis_is_not_scored_on_the_other_ones_cut_in_its_own_layer(family: str) -> None:
    follows_the_cut_layers(zoo(family), "ghost", SEVERAL_AXES[family], 1e-4)


@pytest.mark.slow
def test_what_weights_have_scored_is_cut_too_before_the_next_layer() -> None:
    """Whichever scorer chose the units: a layer's inputs are made by the cut ones before it."""
    follows_the_cut_layers(zoo("mamba2"), {"state": "ghost", "head": "magnitude"}, {"state": 0.5, "head": 0.5}, 1e-4)


@pytest.mark.slow
@given(models(dtypes=FP32))
def test_one_shot_is_score_plan_apply(model: torch.nn.Module) -> None:
    assume(model.config.state_size > 1)
    by_hand, data = copy.deepcopy(model), calibrated(tokens(3, 19))
    result = sspruner.prune(model, "ghost", sparsity=0.5, one_shot=True, calibration=data)
    plan = sspruner.plan(sspruner.trace(by_hand), sspruner.score(by_hand, "ghost", calibration=data), sparsity=0.5)
    assert result.plan.groups == plan.groups
    sspruner.apply(by_hand, plan)
    assert all(torch.equal(p, by_hand.get_parameter(n)) for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def self_text(reference: tuple) -> Calibration:
    model, _ = reference
    return sspruner.calibration("self", model, samples=16, seq_len=128, held_out=16, seed=0)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
def test_ghost_hurts_less_than_magnitude_and_that_less_than_random(
    sparsity: float, reference: tuple, self_text: Calibration
) -> None:
    model, _ = reference

    def kl(scorer: str, seed: int = 0) -> float:
        result = sspruner.prune(model, scorer, sparsity=sparsity, calibration=self_text, mode="mask", seed=seed)
        sspruner.unmask(model)
        assert result.report.pruned["perplexity"] > result.report.dense["perplexity"]
        return result.report.pruned["kl_to_dense"]

    random = sum(kl("random", seed) for seed in range(2)) / 2
    assert kl("ghost") < 0.7 * kl("magnitude")
    assert kl("magnitude") < 0.9 * random
