"""GHOST's variant "output": exact weighted sums, the weights of every family, and what they say about the output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import selective, state
from sspruner.graph.family import Projected, SelectiveProjected
from sspruner.scoring.known import find_scorer
from sspruner.surgery.mask import mask_group, unmask
from support import mamba1_state, mamba2_state, oracle
from support.examples import examples
from support.ghost_weights import weights
from support.scoring import batches_of, calibrated, importance, loose, permute_states, shown, units, without
from support.tiny import models, tokens
from support.zoo import zoo, zoo_models

OUTPUT = {"variant": "output"}
MAMBA2 = ("mamba2", "zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h")
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
VARIANTS = [
    *((family, {}) for family in MAMBA2 + MAMBA1),
    ("falcon_h1", {"mamba_rms_norm": False}),
    ("falcon_h1", {"mamba_norm_before_gate": False}),
]
SIZES = st.sampled_from([1, 3, 4, 64])


def states_of(p: Projected | SelectiveProjected) -> torch.Tensor:
    """fp64 (b, T, heads, channels, N), one step at a time."""
    return oracle.states(p) if isinstance(p, Projected) else mamba1_state.states(p)


def slow_sum(p: Projected | SelectiveProjected, w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum w h^2 C^2, every term written down: fp64 (G, N)."""
    b, T, G, N = p.B.shape
    h = states_of(p)
    observed = h.view(b, T, G, -1, h.shape[3], N) * p.C.double()[:, :, :, None, None]
    terms = observed.square() * w.double().view(b, T, G, -1, h.shape[3], 1)
    return (terms * mask[:, :, None, None, None, None]).sum((0, 1, 3, 4))


@given(mamba2_state.projections(), SIZES, st.integers(0, 99))
def test_weighted_sum_of_mamba2_equals_the_recurrence(drawn: tuple, size: int, seed: int) -> None:
    p, mask = drawn
    w = weights(p.x, seed)
    mamba2_state.close(state.weighted_ghost_sum(p, w, mask, size), slow_sum(p, w, mask), 1e-5)


@given(mamba1_state.projections(), SIZES, st.integers(0, 99))
def test_weighted_sum_of_mamba1_equals_the_recurrence(drawn: tuple, size: int, seed: int) -> None:
    p, mask = drawn
    w = weights(p.x, seed)
    mamba1_state.close(selective.weighted_ghost_sum(p, w, mask, size), slow_sum(p, w, mask))


@given(mamba2_state.projections(torch.float64), mamba1_state.projections(torch.float64), SIZES, st.integers(0, 99))
def test_the_weighted_sums_themselves_are_exact(two: tuple, one: tuple, size: int, seed: int) -> None:
    """In fp64 only rounding is left. Without weights they are ghost_sum."""
    for module, (p, mask) in ((state, two), (selective, one)):
        w = weights(p.x, seed)
        mamba2_state.close(module.weighted_ghost_sum(p, w, mask, size), slow_sum(p, w, mask), 1e-10)
        even = module.weighted_ghost_sum(p, torch.ones_like(w), mask, size)
        mamba2_state.close(even, module.ghost_sum(p, mask), 1e-10)


@pytest.mark.parametrize("T", [16, 160])
def test_memory_is_four_steps_of_states(T: int) -> None:
    b, H, P, N = 2, 2, 8, 16
    p = Projected(
        x=torch.randn(b, T, H, P), z=torch.zeros(b, T, H * P), dt=torch.rand(b, T, H), A=-torch.ones(H),
        B=torch.randn(b, T, 1, N), C=torch.randn(b, T, 1, N), D=torch.ones(H),
    )  # fmt: skip
    w = torch.ones_like(p.x)
    with mamba1_state.Storage(p) as storage:
        storage.inputs.add(w.untyped_storage().data_ptr())
        state.weighted_ghost_sum(p, w)
    assert storage.largest == b * 4 * H * P * N * 4  # bytes


def captured(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """What the model's own code hands to each mixer's gated norm (y, gate) and to its out_proj."""
    seen: dict[str, Any] = {}
    handles = []
    for layer in sspruner.trace(model).layers:
        for path in (layer.path, *layer.aliases):
            for name in ("norm", "out_proj"):
                module = getattr(model.get_submodule(path), name, None)
                if module is not None:
                    hook = lambda module, args, key=f"{path}.{name}": seen.__setitem__(key, args)  # noqa: E731
                    handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        attention = {} if mask is None else {"attention_mask": mask.long()}
        model(input_ids=ids, use_cache=False, **attention)
    for handle in handles:
        handle.remove()
    return seen


def slow_weights(mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """w from the module's own attributes, in the order in which this family gates and norms: fp64 (b, T, D)."""
    y, gate = y.double(), F.silu(z.double())
    norm, gain = getattr(mixer, "norm", None), F.silu(z.double())
    if hasattr(norm, "weight"):
        normed = (y if getattr(norm, "norm_before_gate", False) else y * gate).unflatten(-1, (mixer.n_groups, -1))
        rms = (normed.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        gain = (gain.unflatten(-1, (mixer.n_groups, -1)) / rms).flatten(2) * norm.weight.detach().double()
    return gain.square() * mixer.out_proj.weight.detach().double().square().sum(0)


@pytest.mark.cover(most=5)
@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=str)
def test_scores_are_the_formula_in_every_family(family: str, options: dict) -> None:
    """On states: the recurrence in fp64, weights from y and z that the model's own code computes, every term summed."""
    model, ids, mask = zoo(family, **options), tokens(3, 19), torch.ones(3, 19, dtype=torch.bool)
    mask[0, -5:] = False
    for view in shown(model, ids, "state", mask=mask):
        mixer = model.get_submodule(view.layer)
        w = slow_weights(mixer, view.y.detach().flatten(2), view.z)
        expected = (slow_sum(view.projected, w, mask) / mask.sum()).sqrt()
        found = importance(model, ids, axis="state", mask=mask, options=OUTPUT)[view.group.name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.ci_cover(families=10)
@pytest.mark.cover(most=10)
@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("axis", ["head", "head_dim", "group", "channel"])
def test_other_axes_are_the_energy_that_reaches_the_output(family: str, options: dict, axis: str) -> None:
    """sum over a unit's columns j of |W_j|^2 sum_t u_tj^2; u as the model's own code hands it to out_proj."""
    model, ids = zoo(family, **options), tokens(3, 19)
    if axis not in sspruner.trace(model).axes:
        pytest.skip("no such axis")
    scores, inputs = importance(model, ids, axis=axis, options=OUTPUT), captured(model, ids)
    for name, found in scores.items():
        group = sspruner.trace(model).groups[name]
        (u,), weight = inputs[f"{group.layer}.out_proj"], model.get_parameter(f"{group.layer}.out_proj.weight").detach()
        energy = u.double().square().sum((0, 1)) * weight.double().square().sum(0)  # (D,)
        (columns,) = (m.index for m in group.members if m.tensor.endswith("out_proj.weight") and m.dims == (1,))
        expected = (energy[columns].sum(-1) / ids.numel()).sqrt()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def orthogonal(model: torch.nn.Module) -> None:
    """out_proj's columns orthogonal, of different lengths: changes of channels do not interfere."""
    for layer in sspruner.trace(model).layers:
        weight = model.get_submodule(layer.path).out_proj.weight
        lengths = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        with torch.no_grad():
            weight.copy_(torch.linalg.qr(weight.double())[0] * lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "epsilon"),
    [
        ({"mamba_rms_norm": False}, None),
        ({}, 1e7),
        ({"mamba_norm_before_gate": False}, 1e7),
    ],
    ids=str,
)
def test_on_a_norm_that_stands_still_the_score_is_the_change_of_the_output(
    options: dict, epsilon: float | None
) -> None:
    """S^2 = the measured mean squared change of the mixer's output, for every state: real gates, padding, real mask."""
    model, ids = zoo("falcon_h1", hidden_size=24, **options), tokens(2, 19)
    orthogonal(model)
    layers = sspruner.trace(model).layers
    for layer in layers:
        mixer = model.get_submodule(layer.path)
        if epsilon is not None:  # the mean square does not matter; the weight makes up for it
            mixer.norm.variance_epsilon = epsilon
            mixer.norm.weight.data *= epsilon**0.5
    for name, scores in importance(model, ids, axis="state", options=OUTPUT).items():
        group = sspruner.trace(model).groups[name]
        mixer = model.get_submodule(group.layer)
        dense = mixed(model, mixer, ids)
        for g, n in units(group):
            mask_group(model, group, without(group, g, n))
            change = mixed(model, mixer, ids) - dense
            unmask(model)
            measured = (change.square().sum() / ids.numel()).sqrt()
            torch.testing.assert_close(measured, scores[g, n].double(), rtol=1e-3, atol=1e-5)


def mixed(model: torch.nn.Module, mixer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What one mixer returns when the model runs: fp64 (b, T, hidden size), before a multiplier behind it."""
    seen: list[torch.Tensor] = []
    hook = mixer.out_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    (found,) = seen
    return found.double()


@pytest.mark.slow
@examples(15)
@given(
    zoo_models(("mamba2", "zamba2", "falcon_h1", "mamba", "zamba")),
    st.lists(st.integers(2, 19), min_size=2, max_size=4),
)
def test_padding_and_batches_change_nothing(model: torch.nn.Module, lengths: list[int]) -> None:
    """Rows padded right with any token, at once or one by one, score as the same rows given one by one."""
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    for axis in ("state", "head"):
        if axis not in sspruner.trace(model).axes:
            continue
        padded = importance(model, torch.where(mask, ids, 7), axis=axis, mask=mask, options=OUTPUT)
        with batches_of(19):
            apart = importance(model, ids, axis=axis, mask=mask, options=OUTPUT)
        rows = [importance(model, ids[i : i + 1, :n], axis=axis, options=OUTPUT) for i, n in enumerate(lengths)]
        for group, scores in padded.items():
            squares = torch.stack([row[group].double().square() * n for row, n in zip(rows, lengths, strict=True)])
            expected = (squares.sum(0) / sum(lengths)).sqrt().float()
            slack = {"rtol": 10 * loose(model), "atol": 10 * loose(model) * float(expected.max())}
            torch.testing.assert_close(scores, expected, **slack)
            torch.testing.assert_close(apart[group], expected, **slack)


@pytest.mark.parametrize("family", ["falcon_h1", "zamba"])
@pytest.mark.parametrize("axis", ["state", "head"])
def test_the_mask_alone_keeps_padding_out(family: str, axis: str) -> None:
    """Where the values at padded positions are not zero, as in mamba_ssm's own modules, which know no padding."""
    model, mask = zoo(family, mamba_rms_norm=False) if family == "falcon_h1" else zoo(family), torch.rand(3, 19) < 0.6
    for view in shown(model, tokens(3, 19), axis):
        w = slow_weights(model.get_submodule(view.layer), view.y.detach().flatten(2), view.z)
        view.mask = mask
        scorer = find_scorer("ghost")[0](**OUTPUT)
        scorer.axis = axis
        scorer.observe(view)
        expected = slow_sum(view.projected, w, mask)
        if axis == "head":
            energy = (w.view_as(view.y) * view.y.double().square() * mask[..., None, None]).sum((0, 1, 3)).detach()
            expected = energy.view(view.group.groups, view.group.units)  # heads in runs, by group
        torch.testing.assert_close(scorer.change.detach(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@examples(10)
@given(models(dtypes=(torch.float32,)), st.integers(0, 99))
def test_permuting_states_permutes_scores(model: torch.nn.Module, seed: int) -> None:
    before = importance(model, tokens(), options=OUTPUT)
    permuted = copy.deepcopy(model)
    orders = permute_states(permuted, torch.Generator().manual_seed(seed))
    for group, scores in importance(permuted, tokens(), options=OUTPUT).items():
        expected = before[group].gather(1, orders[group])
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_closed_gate_scores_nothing_and_nothing_is_nan() -> None:
    """z = 0 everywhere: the mixer puts out nothing but its bias. The older variants do not see that."""
    model = zoo("mamba2")
    for layer in sspruner.trace(model).layers:
        mixer = model.get_submodule(layer.path)
        with torch.no_grad():
            mixer.in_proj.weight[: mixer.intermediate_size] = 0
            mixer.in_proj.bias[: mixer.intermediate_size] = 0
    assert all(not scores.any() for scores in importance(model, tokens(), options=OUTPUT).values())
    assert all((scores > 0).all() for scores in importance(model, tokens()).values())


def test_it_prunes_end_to_end() -> None:
    model, ids = zoo("zamba2"), tokens(4, 19)
    result = sspruner.prune(
        model, "ghost", axis={"state": 0.5, "head": 0.5}, options=OUTPUT, calibration=calibrated(ids)
    )
    assert result.report.proof is not None
    assert result.report.options == OUTPUT


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(sspruner.InputError, match=r"variant='outputs'; known: joint, means, output"):
        sspruner.score(zoo("mamba2"), "ghost", options={"variant": "outputs"}, calibration=tokens())
