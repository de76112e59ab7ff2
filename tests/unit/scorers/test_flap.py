"""FLAP against plain loops, and what its bias is worth: in closed form, masked and sliced."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.graph.group import DependencyGroup, Member
from sspruner.scoring.known import find_scorer
from support.examples import examples
from support.scoring import batches_of, calibrated, importance, loose
from support.tiny import tokens
from support.zoo import zoo, zoo_models

Flap = find_scorer("flap")[0]
AXES = {
    "head": ("mamba2", "zamba2", "falcon_h1", "zamba"),
    "head_dim": ("mamba2", "zamba2", "falcon_h1", "zamba"),
    "channel": ("mamba", "falcon_mamba", "jamba"),
    "mlp": ("zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "zamba"),
}
FAMILIES_AND_AXES = [(family, axis) for axis, families in AXES.items() for family in families]


def into(model: torch.nn.Module, path: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """fp64 (tokens, features): what one Linear is given when the model runs; several calls one after another."""
    seen: list[torch.Tensor] = []
    weight = model.get_submodule(path).weight
    sharing = {m for m in model.modules() if getattr(m, "weight", None) is weight}
    hooks = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0][mask])) for m in sharing]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen).double()


def reader(group: DependencyGroup) -> Member:
    (found,) = (m for m in group.members if m.dims == (1,) and "x_proj" not in m.tensor)
    return found


def slow_scores(y: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Loops over sets, units and channels. y (tokens, features), weight (out, features), columns (groups, units, n)."""
    metric = {}
    for j in columns.flatten().tolist():
        mean = sum(y[:, j].tolist()) / len(y)
        variance = sum((v - mean) ** 2 for v in y[:, j].tolist()) / len(y)
        metric[j] = variance * sum(v**2 for v in weight[:, j].tolist())
    mean = sum(metric.values()) / len(metric)
    std = (sum((m - mean) ** 2 for m in metric.values()) / len(metric)) ** 0.5
    scored = [[sum((metric[j] - mean) / std for j in unit) / len(unit) for unit in row] for row in columns.tolist()]
    return torch.tensor(scored, dtype=torch.float64)


@pytest.mark.cover
@pytest.mark.parametrize(("family", "axis"), FAMILIES_AND_AXES)
def test_scores_are_the_formula(family: str, axis: str) -> None:
    """A block that several layers share is seen wherever it is called."""
    model, ids, mask = zoo(family), tokens(3, 19), torch.ones(3, 19, dtype=torch.bool)
    mask[0, -5:] = False
    groups = sspruner.trace(model).groups
    for name, found in importance(model, ids, "flap", axis=axis, mask=mask).items():
        member = reader(groups[name])
        y = into(model, member.tensor.removesuffix(".weight"), ids, mask)
        expected = slow_scores(y, model.get_parameter(member.tensor).detach().double(), member.index)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def view_of(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: torch.Tensor) -> Any:
    """A stub of what flap looks at: one Linear `out_proj`."""
    groups, units, _ = columns.shape
    group = DependencyGroup("m", "head", groups, units, (Member("m.out_proj.weight", (1,), "y", columns, len(weight)),))
    tensors = {"out_proj.weight": weight} | ({} if bias is None else {"out_proj.bias": bias})
    return SimpleNamespace(
        group=group, inputs={"out_proj.weight": y}, tensor=lambda key: tensors[key].clone(), has=tensors.__contains__
    )


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, int]:
    """(y, weight, bias or None, columns, units to keep): channels in any order, means far from 0."""
    groups, units, width = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    features = groups * units * width
    y = torch.randn(draw(st.integers(2, 40)), features, generator=generator)
    y = y * torch.rand(features, generator=generator) * 3 + torch.randn(features, generator=generator) * 5
    weight = torch.randn(draw(st.integers(1, 5)), features, generator=generator)
    bias = torch.randn(len(weight), generator=generator) if draw(st.booleans()) else None
    columns = torch.randperm(features, generator=generator).view(groups, units, width)
    return y, weight, bias, columns, draw(st.integers(1, units))


def best(count: int) -> Any:
    """The `count` highest of every set."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count).indices, True)

    return choose


@given(layers(), st.integers(1, 5))
def test_the_error_falls_by_the_squared_mean_of_what_is_dropped(drawn: tuple, pieces: int) -> None:
    """E|W_d y_d - E W_d y_d|^2 = E|W_d y_d|^2 - |E W_d y_d|^2; scores as in loops; however y is split into batches."""
    y, weight, bias, columns, count = drawn
    scorer = Flap()
    for piece in y.chunk(pieces):
        scorer.observe(view_of(piece, weight, bias, columns))
    y, W = y.double(), weight.double()
    expected = slow_scores(y, W, columns)
    torch.testing.assert_close(scorer.importance(), expected, rtol=1e-6, atol=1e-6)
    keep, updates = scorer.reduce(best(count))
    assert torch.equal(keep, best(count)(expected))
    assert list(updates) == ["out_proj.bias"]
    dropped = columns[~keep].flatten()
    gone = y[:, dropped] @ W[:, dropped].T  # (tokens, out)
    given = 0 if bias is None else bias.double()  # an existing bias stays
    left = gone - (updates["out_proj.bias"].double() - given)
    before, after = gone.square().sum(-1).mean(), left.square().sum(-1).mean()
    torch.testing.assert_close(before - after, gone.mean(0).square().sum(), rtol=1e-4, atol=1e-4)


def test_what_never_varies_scores_lowest_and_its_bias_is_exact() -> None:
    y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    y[:, 2:4] = torch.tensor([1.1, -7.3])  # the second unit
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    scorer = Flap()
    scorer.observe(view_of(y, weight, None, torch.arange(6).view(1, 3, 2)))
    assert int(scorer.importance().argmin()) == 1
    _, updates = scorer.reduce(best(2))
    torch.testing.assert_close(updates["out_proj.bias"], weight[:, 2:4] @ y[0, 2:4])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_layer_scores_zero(value: float) -> None:
    """No variance, or the same one everywhere: zeros, and nothing is NaN. Over several batches, too."""
    scorer, same = Flap(), Flap()
    columns = torch.arange(6).view(1, 3, 2)
    for _ in range(3):
        still = value * torch.randn(
            6, generator=torch.Generator().manual_seed(0)
        )  # its squares round, in any precision
        scorer.observe(view_of(still.expand(37, 6), torch.randn(4, 6), None, columns))
        same.observe(view_of(value + torch.arange(7.0)[:, None].expand(7, 6), torch.ones(4, 6), None, columns))
    assert torch.equal(scorer.importance(), torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(same.importance(), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.exhaustive
@pytest.mark.slow
@examples(15)
@given(
    zoo_models(("mamba2", "zamba2", "falcon_h1", "zamba")),
    st.lists(st.integers(2, 19), min_size=2, max_size=4),
)
def test_padding_and_batches_change_nothing(model: torch.nn.Module, lengths: list[int]) -> None:
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    for axis in ("head_dim", "mlp"):
        if axis not in sspruner.trace(model).axes:
            continue
        padded = importance(model, ids, "flap", axis=axis, mask=mask)
        garbage = importance(model, torch.where(mask, ids, 7), "flap", axis=axis, mask=mask)
        with batches_of(19):
            apart = importance(model, ids, "flap", axis=axis, mask=mask)
        for group, scores in padded.items():
            for found in (garbage, apart):
                torch.testing.assert_close(found[group], scores, rtol=0, atol=100 * loose(model))


def output_of(model: torch.nn.Module, path: str, ids: torch.Tensor) -> torch.Tensor:
    """fp64 (b, T, hidden size): what one module returns when the model runs."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0].double()


@pytest.mark.slow
@pytest.mark.cover(most=3)
@pytest.mark.parametrize("mode", ["mask", "slice"])
@pytest.mark.parametrize(
    ("axis", "options", "path"),
    [
        ("head", {"mamba_rms_norm": False}, "mamba.out_proj"),
        ("head", {"mamba_rms_norm": False, "bias": False}, "mamba.out_proj"),
        ("head_dim", {"mamba_rms_norm": False}, "mamba.out_proj"),
        ("mlp", {}, "feed_forward.down_proj"),
    ],
    ids=str,
)
def test_a_pruned_layer_errs_less_with_the_bias(mode: str, axis: str, options: dict, path: str) -> None:
    """The first layer's own output, on the calibration text, dense and pruned: with the bias the mean squared error is
    lower by the square of the mean, exactly."""
    model, ids = zoo("falcon_h1", **options), tokens(4, 19)
    path = f"model.layers.0.{path}"
    dense, bias = output_of(model, path, ids), model.get_submodule(path).bias
    bias = torch.zeros(dense.shape[-1]) if bias is None else bias.detach().clone()
    pruned = copy.deepcopy(model)
    result = sspruner.prune(pruned, "flap", axis=axis, sparsity=0.5, mode=mode, calibration=calibrated(ids))
    assert f"{path}.bias" in result.plan.updates
    assert (mode == "slice") == (result.report.proof is not None)
    compensation = (pruned.get_submodule(path).bias.detach() - bias).double()
    error = output_of(pruned, path, ids) - dense
    without = error - compensation  # as if the bias had stayed as it was
    fall = without.square().sum(-1).mean() - error.square().sum(-1).mean()
    assert float(fall) > 0
    torch.testing.assert_close(fall, compensation.square().sum(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(error.mean((0, 1)), torch.zeros_like(compensation), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis"), [("zamba2", "mlp"), ("mamba", "channel"), ("zamba", "head")])
def test_it_prunes_other_families(family: str, axis: str) -> None:
    result = sspruner.prune(zoo(family), "flap", axis=axis, sparsity=0.5, calibration=calibrated(tokens(4, 19)))
    assert result.report.proof is not None
    assert all(name.endswith(("out_proj.bias", "down_proj.bias")) for name in result.plan.updates)


def test_one_token_is_not_enough() -> None:
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(sspruner.InputError, match=r"a variance needs at least 2 calibration tokens, not 1"):
        importance(zoo("mamba2"), tokens(2, 19), "flap", axis="head", mask=mask)


def test_states_are_not_its_business() -> None:
    with pytest.raises(sspruner.InputError, match=r"'flap' does not score axis 'state'"):
        importance(zoo("mamba2"), tokens(), "flap")
