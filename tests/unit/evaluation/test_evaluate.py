"""Damage: perplexity and KL against plain loops, and what padding must not change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.evaluation.continuation import continuation
from sspruner.evaluation.damage import damage
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.tiny import everything, models, plans, tiny_model, tokens
from support.zoo import FAMILIES, zoo

FP32 = (torch.float32,)


def by_hand(model: torch.nn.Module, plan: Plan, rows: list[torch.Tensor]) -> tuple[float, float, float, int]:
    """Perplexities and KL, one unpadded sequence and one token at a time, in fp64."""
    nll, pruned_nll, kl, count = 0.0, 0.0, 0.0, 0
    for row in rows:
        with torch.no_grad():
            dense = model(input_ids=row[None]).logits[0].double().softmax(-1)
            with sspruner.masked(model, plan):
                pruned = model(input_ids=row[None]).logits[0].double().softmax(-1)
        for t in range(len(row) - 1):
            nll -= math.log(dense[t, row[t + 1]])
            pruned_nll -= math.log(pruned[t, row[t + 1]])
            kl += float((dense[t] * (dense[t] / pruned[t]).log()).sum())
            count += 1
    return math.exp(nll / count), math.exp(pruned_nll / count), kl / count, count


@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_damage_in_every_family_is_that_of_the_sliced_model(family: str) -> None:
    """Several axes at once, on unpadded rows: dense and sliced models, each asked by itself."""
    model, ids = zoo(family), tokens(3, 12)
    graph = sspruner.trace(model)
    axes = [axis for axis in ("state", "head", "channel", "attn_head", "mlp") if axis in graph.axes]
    plan = sspruner.plan(graph, sspruner.score(model, "random", axis=axes), sparsity=dict.fromkeys(axes, 0.5))
    before = {n: p.clone() for n, p in model.named_parameters()}
    cost = damage(model, plan, graph, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        dense, pruned = (
            m(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            for m in (model, sspruner.apply(copy.deepcopy(model), plan))
        )
    target = ids[:, 1:, None]
    assert cost.tokens == 33
    assert cost.dense_perplexity == pytest.approx(math.exp(-dense.gather(-1, target).mean()), rel=1e-4)
    assert cost.pruned_perplexity == pytest.approx(math.exp(-pruned.gather(-1, target).mean()), rel=1e-3)
    assert cost.kl == pytest.approx(float((dense.exp() * (dense - pruned)).sum(-1).mean()), rel=1e-2)
    assert cost.kl > 1e-4


@given(models(dtypes=FP32), st.data())
def test_damage_is_what_plain_loops_say(model: torch.nn.Module, data: st.DataObject) -> None:
    """Rows of any length, padded on the right, in batches of any size."""
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=4))
    ids, mask = tokens(len(lengths), 12), torch.arange(12) < torch.tensor(lengths)[:, None]
    size = data.draw(st.integers(1, 4))
    cost = damage(model, plan, graph, zip(ids.split(size), mask.split(size), strict=True))
    dense, pruned, kl, count = by_hand(model, plan, [row[:n] for row, n in zip(ids, lengths, strict=True)])
    assert cost.tokens == count
    assert cost.dense_perplexity == pytest.approx(dense, rel=1e-3)
    assert cost.pruned_perplexity == pytest.approx(pruned, rel=1e-3)
    assert cost.kl == pytest.approx(kl, rel=1e-2, abs=1e-5)


def test_perplexity_is_transformers_own_loss() -> None:
    model, ids = tiny_model(), tokens(3, 12)
    graph = sspruner.trace(model)
    cost = damage(model, everything(graph), graph, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert cost.dense_perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert cost.pruned_perplexity == cost.dense_perplexity
    assert cost.kl == 0


def test_padding_on_the_left_is_not_context() -> None:
    """The first real token is context, not a prediction from padding."""
    model, ids = tiny_model(), tokens(2, 12)
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    plan, graph = Plan({"backbone.layers.0.mixer:state": Selection(6, ((1, 4),))}), sspruner.trace(model)
    plain = damage(model, plan, graph, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    left = damage(model, plan, graph, [(padded, torch.arange(15).expand(2, -1) >= 3)])
    assert left.tokens == plain.tokens == 22
    assert left.pruned_perplexity == pytest.approx(plain.pruned_perplexity, rel=1e-4)
    assert left.kl == pytest.approx(plain.kl, rel=1e-3)


def test_continuation_is_greedy(reference: tuple) -> None:
    model, tokenizer = reference
    prompt = torch.tensor(tokenizer("It was a dark and")["input_ids"])
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
    assert continuation(model, tokenizer, prompt, 6) == tokenizer.decode(ids[len(prompt) :])


@pytest.mark.slow
def test_the_report_measures_the_model_that_is_returned(reference: tuple) -> None:
    """Perplexity and KL come from the mask; those of the sliced model in hand are the same numbers."""
    model, tokenizer = copy.deepcopy(reference[0]), reference[1]
    dense = copy.deepcopy(model)
    result = sspruner.prune(model, "magnitude", sparsity=0.9, samples=4, seq_len=40, tokenizer=tokenizer)
    data = sspruner.calibration("self", dense, samples=4, seq_len=40)
    with torch.no_grad():
        target = data.held_out[:, 1:, None]
        before, after = (
            m(input_ids=data.held_out).logits[:, :-1].double().log_softmax(-1) for m in (dense, result.model)
        )
    perplexity = math.exp(-after.gather(-1, target).mean())
    assert result.report.pruned["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert result.report.pruned["kl_to_dense"] == pytest.approx(
        float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3
    )
    assert result.report.pruned["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert result.report.dense["parameters"] == sum(p.numel() for p in dense.parameters())
