"""The one place that computes losses over windows: against a loop in fp64, and every caller finds the same."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

import sspruner
from sspruner.evaluation.damage import damages, mean_loss
from sspruner.evaluation.measures import Asked, measure
from sspruner.evaluation.windows import alone, logits_of, losses, losses_by_batch, watched, windows
from sspruner.testing.models import zoo
from sspruner.training.loop import perplexity

IDS = torch.randint(31, (5, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["mamba2", "jamba"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    model = zoo(request.param)
    graph = sspruner.trace(model)
    return model, graph, sspruner.plan(graph, sspruner.score(model, "magnitude"), sparsity=0.5)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[1, :6] = False
    return IDS, mask


@torch.no_grad()
def test_sums_are_those_of_a_loop_over_tokens(models: tuple[Any, Any, Any]) -> None:
    """nll, KL and agreement of a masked model, window by window and token by token, in fp64."""
    model, graph, plan = models
    tokens, mask = padded()

    def masked(batch: Any) -> torch.Tensor:
        with sspruner.masked(model, plan, graph):
            return logits_of(model)(batch)

    ((dense, (own,)),) = losses_by_batch([alone(tokens, mask)], [masked], logits_of(model))
    assert dense is not None
    assert own.each is not None
    with sspruner.masked(model, plan, graph):
        q = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits.double().log_softmax(-1)
    p = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits.double().log_softmax(-1)
    for b in range(len(tokens)):
        row = [0.0, 0.0, 0.0, 0.0, 0]
        for t in range(tokens.shape[1] - 1):
            counts = bool(mask[b, t] and mask[b, t + 1])
            nll = -float(q[b, t, tokens[b, t + 1]])
            assert float(own.each[b, t]) == (pytest.approx(nll, rel=1e-5) if counts else 0)
            if counts:
                row[0] += nll
                row[1] -= float(p[b, t, tokens[b, t + 1]])
                row[2] += float((p[b, t].exp() * (p[b, t] - q[b, t])).sum())
                row[3] += float(p[b, t].argmax() == q[b, t].argmax())
                row[4] += 1
        assert own.kl is not None
        assert own.agreement is not None
        found = [own.nll[b], dense.nll[b], own.kl[b], own.agreement[b], own.tokens[b]]
        assert [float(x) for x in found] == pytest.approx(row, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_every_caller_finds_the_same_to_the_bit(models: tuple[Any, Any, Any]) -> None:
    model, graph, plan = models
    batches = list(zip(*(part.split(2) for part in padded()), strict=True))
    (cost,) = damages(model, [plan], graph, batches)
    versions = [lambda: nullcontext(model), partial(sspruner.masked, model, plan, graph)]
    dense, cut = (values.text for values in measure(model, versions, Asked(batches, (), None)))
    assert dense is not None
    assert cut is not None
    nll = sum(float(part.sum()) for part in dense.nll.split(2)) / int(dense.tokens.sum())
    assert cost.tokens == int(dense.tokens.sum()) == int(cut.tokens.sum())
    assert torch.tensor(nll, dtype=torch.float64).exp().item() == pytest.approx(cost.dense_perplexity, rel=1e-14)
    assert cut.kl is not None
    assert float(cut.kl.sum()) / cost.tokens == pytest.approx(cost.kl, rel=1e-12)
    assert mean_loss(model, batches) == pytest.approx(nll, rel=1e-14)
    whole = [(part, torch.ones_like(part, dtype=torch.bool)) for part in IDS.split(2)]
    assert perplexity(model, IDS, 2) == damages(model, [plan], graph, whole)[0].dense_perplexity


@torch.no_grad()
def test_the_dense_model_runs_once_and_its_losses_only_if_asked(models: tuple[Any, Any, Any]) -> None:
    model, _, _ = models
    runs: list[int] = []

    def count(batch: Any) -> torch.Tensor:
        runs.append(len(batch.tokens))
        return logits_of(model)(batch)

    batches = [alone(part, torch.ones_like(part, dtype=torch.bool)) for part in IDS.split(2)]
    found = list(losses_by_batch(batches, [logits_of(model)] * 3, count, of_dense=False))
    assert runs == [2, 2, 1]
    assert all(dense is None and len(own) == 3 for dense, own in found)
    assert all(float(s.kl.abs().max()) == 0 for _, own in found for s in own if s.kl is not None)
    assert all(dense is None and own[0].kl is None for dense, own in losses_by_batch(batches, [logits_of(model)]))


def test_progress_is_told_before_each_batch(models: tuple[Any, Any, Any]) -> None:
    told: list[tuple[Any, ...]] = []
    batches = [alone(part, torch.ones_like(part, dtype=torch.bool)) for part in IDS.split(2)]
    for number, _ in enumerate(watched(batches, lambda *what: told.append(what), "x", 5, 2)):
        assert len(told) == number + 1
    assert told == [("x", 0, 5), ("x", 2, 5), ("x", 4, 5)]
    assert losses(models[0], windows(list(IDS), 8), 4).shape == (15, 8)
