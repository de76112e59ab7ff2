"""Taylor against finite differences of the loss, and against autograd over what a mask zeroes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.surgery.mask import mask_group, unmask
from support import family_plans
from support.examples import examples
from support.scoring import batches_of, calibrated, importance, permute_states, units, without
from support.tiny import models, tiny_model, tokens
from support.zoo import FAMILIES, zoo

ORDERS = ("first", "second", "fisher")
AXES = ("state", "head", "head_dim", "group", "channel", "dt_rank", "attn_head", "mlp", "hidden")
MASK = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]


def losses(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Summed next-token loss of each sequence, in nats, each run alone and without its padding."""
    found = []
    for row, counted in zip(ids, mask, strict=True):
        row = row[counted][None]
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        found.append(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
    return found


def owned(model: torch.nn.Module, group: Any, g: int, u: int) -> dict[str, torch.Tensor]:
    """Which elements of each parameter a unit owns: those that its mask makes zero. A shared one has one name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask_group(model, group, without(group, g, u))
    found = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    unmask(model)
    return found


# Experts run in fp32 and below only; here everything runs in fp64.
PLAIN = {"jamba": {"experts": 1}, "granitemoehybrid": {"experts": 0}, "nemotron_h": {"layers": "M-AM"}}
PLAIN |= {family: {"experts": 0} for family in family_plans.KDA}
FAMILIES_AND_AXES = [(f, a) for f in FAMILIES for a in AXES if a in family_plans.AXES[f]]


@pytest.fixture
def fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' norms and scans ask for fp32: they get what they have, if that is fp64."""
    to, up = torch.Tensor.to, torch.Tensor.float

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        down = self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return self if down else to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else up(self))


@pytest.mark.ci_cover(most=5)
@pytest.mark.slow
@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("family", "axis"), FAMILIES_AND_AXES)
def test_first_order_is_the_slope_of_the_loss(family: str, axis: str) -> None:
    """|dL/de| of weights (1 + e) w on what the unit owns, by central differences of the mean loss."""
    ids, model = tokens(3, 12), zoo(family, **PLAIN.get(family, {}))
    scores = importance(model, ids, "taylor", axis=axis, mask=MASK)
    exact, count, step = model.double(), int(MASK.sum()) - len(MASK), 1e-4
    name = list(scores)[-1]
    group = sspruner.trace(exact).groups[name]
    for g, u in units(group)[:: max(1, group.groups * group.units // 4)]:
        mine, slope = owned(exact, group, g, u), 0.0
        for sign in (1, -1):
            moved = copy.deepcopy(exact)
            with torch.no_grad():
                for key, parameter in moved.named_parameters():
                    parameter[mine[key]] *= 1 + sign * step
                slope += sign * float(sum(losses(moved, ids, MASK)) / count) / (2 * step)
        assert float(scores[name][g, u]) == pytest.approx(abs(slope), rel=1e-2, abs=1e-3 * float(scores[name].max()))


@pytest.mark.cover(families=4, least=6)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("family", "axis"),
    [("mamba2", "state"), ("mamba2", "hidden"), ("zamba", "hidden"), ("zamba2", "head"), ("jamba", "channel")],
)
def test_every_order_is_its_formula(family: str, axis: str, order: str) -> None:
    """g and F by autograd in fp64, one sequence at a time; what a unit owns by what its mask zeroes."""
    ids, options = tokens(3, 12), PLAIN.get(family, {})
    model = zoo(family, **options).double()
    scores = importance(zoo(family, **options), ids, "taylor", axis=axis, mask=MASK, options={"order": order})
    found = losses(model, ids, MASK)
    names = [name for name, _ in model.named_parameters()]

    def gradient(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, model.parameters(), grads, strict=True)
        }

    mean = gradient(torch.stack(found).sum() / (int(MASK.sum()) - len(MASK)))
    single = [gradient(loss / (int(row.sum()) - 1)) for loss, row in zip(found, MASK, strict=True)]
    w = {name: p.detach() for name, p in model.named_parameters()}
    for name, actual in scores.items():
        group = sspruner.trace(model).groups[name]
        expected = torch.zeros(group.groups, group.units, dtype=torch.float64)
        for g, u in units(group):
            mine = owned(model, group, g, u)
            slope = sum((w[n] * mean[n])[mine[n]].sum() for n in names)
            curvature = sum(
                (w[n] ** 2 * torch.stack([s[n] ** 2 for s in single]).mean(0))[mine[n]].sum() for n in names
            )
            expected[g, u] = {"first": abs(slope), "second": abs(-slope + curvature / 2), "fisher": curvature}[order]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize(("family", "axis"), [("mamba2", "weight"), ("jamba", "weight"), ("mamba", "decay")])
@pytest.mark.parametrize("order", ORDERS)
def test_of_single_elements_it_is_the_same(family: str, axis: str, order: str) -> None:
    model, ids = zoo(family), tokens(1, 12)
    scores = importance(model, ids, "taylor", axis=axis, options={"order": order})
    loss = losses(model, ids, torch.ones_like(ids, dtype=torch.bool))[0] / 11
    loss.backward()  # of one sequence F is g^2
    for name, found in scores.items():
        path = name.rpartition(":")[0]
        w = model.get_parameter(f"{path}.{'weight' if axis == 'weight' else 'A_log'}")
        g = torch.zeros_like(w) if w.grad is None else w.grad
        wg = (w * g).detach()
        expected = {"first": wg.abs(), "second": (-wg + wg**2 / 2).abs(), "fisher": wg**2}[order]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max() + 1e-30))


@pytest.mark.parametrize("order", ORDERS)
@examples(8)
@given(models(dtypes=(torch.float32,)), st.integers(0, 99))
def test_permuting_states_permutes_scores(order: str, model: torch.nn.Module, seed: int) -> None:
    options, ids = {"order": order}, tokens(2, 12)
    before = importance(model, ids, "taylor", options=options)
    permuted = copy.deepcopy(model)
    orders = permute_states(permuted, torch.Generator().manual_seed(seed))
    for group, scores in importance(permuted, ids, "taylor", options=options).items():
        expected = before[group].gather(1, orders[group])
        torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


@pytest.mark.parametrize("order", ORDERS)
def test_batches_and_padding_change_nothing(order: str) -> None:
    model, ids, options = tiny_model(groups=2), tokens(3, 12), {"order": order}
    together = importance(model, ids, "taylor", options=options, mask=MASK)
    other = importance(model, torch.where(MASK, ids, 7), "taylor", options=options, mask=MASK)
    with batches_of(12):
        apart = importance(model, ids, "taylor", options=options, mask=MASK)
    for group, scores in together.items():
        for found in (apart, other):
            torch.testing.assert_close(found[group], scores, rtol=1e-4, atol=1e-5 * float(scores.max()))


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_zero_already_costs_nothing(order: str) -> None:
    model = tiny_model()
    group = sspruner.trace(model).groups["backbone.layers.1.mixer:state"]
    for member in group.members:
        with torch.no_grad():
            model.get_parameter(member.tensor)[member.index[0, 2]] = 0
    scores = importance(model, tokens(), "taylor", options={"order": order})["backbone.layers.1.mixer:state"]
    assert scores[0, 2] == 0
    assert scores[0, 3] > 0


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("one_shot", [False, True])
def test_it_prunes_end_to_end(order: str, one_shot: bool) -> None:
    """The first layer is scored alike either way: on the dense model. Behind it the inputs differ."""
    results = []
    for shot in (one_shot, True):
        results.append(
            sspruner.prune(zoo("bamba"), "taylor", axis={"state": 0.5, "mlp": 0.5}, options={"order": order},
                           one_shot=shot, calibration=calibrated(tokens(3, 12)))
        )  # fmt: skip
    cut, dense = results
    assert cut.report.proof is not None
    same = {name: torch.allclose(cut.scores.importance[name], found, rtol=1e-3, atol=1e-6)
            for name, found in dense.scores.importance.items()}  # fmt: skip
    assert same["model.layers.0.mamba:state"]
    assert all(same.values()) == one_shot


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(sspruner.InputError, match=r"order='third'; known: first, second, fisher"):
        sspruner.score(zoo("mamba2"), "taylor", options={"order": "third"}, calibration=tokens())
