"""REAP and its companions: exact against a loop over tokens in fp64, in nine families and in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.routing import ExpertSums, by_expert, expert_sums, routed, up_name
from sspruner.testing.plans import permute
from support.examples import examples
from support.moe import FAMILIES, block
from support.scoring import batches_of, calibrated, importance
from support.tiny import tokens
from support.zoo import zoo

HIDDEN = 16
SCORERS = ("reap", "ean", "router-weight", "expert-frequency")
MODELS = ("granitemoehybrid", "jamba", "nemotron_h")


def batch(seed: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (b, T, H), and a mask that leaves out the end of the sequences."""
    hidden = torch.randn(len(lengths), max(lengths), HIDDEN, generator=torch.Generator().manual_seed(seed))
    return hidden, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@torch.no_grad()
def captured(moe: Any, run: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What `experts` is called with while something runs, padding included."""
    seen: list[Any] = []
    handle = moe.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    run()
    handle.remove()
    return seen


@torch.no_grad()
def by_hand(moe: Any, args: tuple[torch.Tensor, ...], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every token and slot by itself, in fp64: name of a scorer -> (E,)."""
    hidden, chosen, weights = (part.reshape(mask.numel(), -1) for part in args)
    experts = moe.experts
    up, down = getattr(experts, up_name(experts)).double(), experts.down_proj.double()
    found = {scorer: torch.zeros(len(down), dtype=torch.float64) for scorer in SCORERS}
    for t in mask.flatten().nonzero().flatten().tolist():
        for slot, e in enumerate(chosen[t].tolist()):
            rows = up[e] @ hidden[t].double()
            inner = experts._apply_gate(rows[None])[0] if up_name(experts) == "gate_up_proj" else experts.act_fn(rows)
            norm, g = (down[e] @ inner).norm(), weights[t, slot].double()
            for scorer, more in zip(SCORERS, (g * norm, norm, g, torch.tensor(1.0)), strict=True):
                found[scorer][e] += more
    found["reap"] /= found["expert-frequency"].clamp_min(1)
    return found


def scores_of(sums: ExpertSums) -> dict[str, torch.Tensor]:
    means = sums.weighted_norms / sums.tokens.clamp_min(1)
    return dict(zip(SCORERS, (means, sums.norms, sums.weights, sums.tokens), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_every_token_by_itself(family: str) -> None:
    """And of no padding: a sequence of 9 tokens and one of 4."""
    moe = block(family)
    hidden, mask = batch(0, (9, 4))
    (args,) = captured(moe, lambda: moe(hidden))
    expected = by_hand(moe, args, mask)
    for scorer, found in scores_of(expert_sums(moe.experts, routed(moe, hidden, mask))).items():
        torch.testing.assert_close(found, expected[scorer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_outputs_add_up_to_the_modules_own(family: str) -> None:
    """The sum of g f over the experts of a token is what the module `experts` puts out: f and g are the model's."""
    moe = block(family)
    hidden, mask = batch(1, (7,))
    given = routed(moe, hidden, mask)
    out = torch.zeros(given.hidden.shape, dtype=torch.float64)
    with torch.no_grad():
        for e, _, inner, g in by_expert(moe.experts, given):
            token, slot = (given.experts == e).nonzero(as_tuple=True)
            assert torch.equal(given.weights[token, slot].double(), g)
            out[token] += g[:, None] * (inner.double() @ moe.experts.down_proj[e].double().T)
        own = moe.experts(given.hidden, given.experts, given.weights)
    torch.testing.assert_close(out.float(), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_of_a_whole_model(family: str, scorer: str) -> None:
    """Against the calls of the model's own forward, padding left out, in whatever batches."""
    model, ids = zoo(family), tokens(3)
    mask = torch.arange(ids.shape[1]) < torch.tensor([19, 11, 5])[:, None]
    group = next(iter(sspruner.trace(model).on_axis("expert").values()))
    moe = model.get_submodule(group.layer)
    (args,) = captured(moe, lambda: model(ids, attention_mask=mask.long(), use_cache=False))
    expected = by_hand(moe, args, mask)[scorer].view(group.groups, group.units)
    for size in (10**4, 19):
        with batches_of(size):
            found = importance(model, ids, scorer, axis="expert", mask=mask)[group.name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@examples(5)
@given(st.sampled_from(MODELS), st.integers(0, 99))
def test_permuting_experts_permutes_their_scores(family: str, seed: int) -> None:
    model, ids = zoo(family), tokens(2, seed=seed)
    before = {scorer: importance(model, ids, scorer, axis="expert") for scorer in SCORERS}
    orders = {}
    for group in sspruner.trace(model).on_axis("expert").values():
        orders[group.name] = torch.stack([torch.randperm(group.units) for _ in range(group.groups)])
        permute(model, group, orders[group.name])
    for scorer in SCORERS:
        after = importance(model, ids, scorer, axis="expert")
        for group_name, order in orders.items():
            expected = before[scorer][group_name].gather(1, order)
            torch.testing.assert_close(after[group_name], expected, rtol=1e-4, atol=1e-6)


def test_mean_is_the_sum_over_the_tokens() -> None:
    model, ids = zoo("granitemoehybrid"), tokens()
    counts = importance(model, ids, "expert-frequency", axis="expert")
    for scorer in ("ean", "router-weight"):
        total = importance(model, ids, scorer, axis="expert")
        mean = importance(model, ids, scorer, axis="expert", options={"reduction": "mean"})
        for group_name, count in counts.items():
            torch.testing.assert_close(mean[group_name] * count, total[group_name])
    with pytest.raises(sspruner.InputError, match="reduction='max'; known: sum, mean"):
        importance(model, ids, "ean", axis="expert", options={"reduction": "max"})


def test_experts_without_a_token_are_counted_and_said() -> None:
    """One token of text reaches 2 of 3 experts in each of four layers, and the report says which were not reached."""
    model = zoo("granitemoehybrid")
    data = calibrated(tokens(1, 2)[:, :1].repeat(1, 4))
    scores = sspruner.score(model, "reap", axis="expert", calibration=data)
    zeros = {name: int((s == 0).sum()) for name, s in scores.importance.items()}
    assert sum(zeros.values()) > 0
    result = sspruner.prune(model, "reap", axis="expert", keep=2, calibration=data, one_shot=True)
    found = result.report.zero_scores["expert"]
    assert found["what"] == "experts that no calibration token reached"
    assert found["groups"] == {name: count for name, count in zeros.items() if count}
    assert (found["zero"], found["units"]) == (sum(zeros.values()), sum(s.numel() for s in scores.importance.values()))
    assert f"{found['zero']} of {found['units']} are experts that no calibration token reached" in str(result)
    assert type(result.report).from_json(result.report.to_json()) == result.report


def test_what_has_no_experts_has_no_routing() -> None:
    class Nosy(sspruner.Scorer):
        name, axes = "nosy", {"mlp"}

        def observe(self, view: sspruner.SSMView) -> None:
            view.routing  # noqa: B018

        def importance(self) -> torch.Tensor:
            return torch.zeros(1, 1)

    with pytest.raises(sspruner.PluginError, match="has no experts"):
        importance(zoo("bamba"), tokens(), Nosy, axis="mlp")


def test_reap_is_for_experts_alone() -> None:
    with pytest.raises(sspruner.InputError, match="expert_mlp"):
        importance(zoo("jamba"), tokens(), "reap", axis="expert_mlp")
