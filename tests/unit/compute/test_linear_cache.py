"""Models whose layers are all linear: transformers refuses them every cache, and they are pruned and sampled here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sspruner
from sspruner.benchmarking.run import run_once
from sspruner.compute.forward import cache_in, forward
from sspruner.compute.linear_cache import LinearCache, linear_cache
from support.scoring import calibrated
from support.tiny import tokens
from support.zoo import zoo

# olmo_hybrid's config wants an attention layer.
ALONE = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear", "bailing_hybrid", "bamba")


def alone(family: str) -> Any:
    return zoo(family, layers="MM")


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ALONE)
def test_a_cache_decodes_what_one_forward_computes(family: str) -> None:
    """A prefill of 9 tokens, then steps; the cache has counted all of them."""
    model, ids = alone(family), tokens(2, 14)
    expected, cache, logits = forward(model, ids, use_cache=False).logits, {}, []
    for positions in torch.split(torch.arange(14), [9] + [1] * 5):
        out = forward(model, ids[:, positions], use_cache=True, position_ids=positions.expand(2, -1), **cache)
        cache = cache_in(out)
        logits.append(out.logits)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-4 * expected.abs().max()
    (held,) = cache.values()
    assert isinstance(held, LinearCache)
    assert held.get_seq_length() == 14


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "mamba2", "zamba2"])
def test_models_with_attention_or_without_such_a_refusal_keep_their_own_cache(family: str) -> None:
    out = forward(zoo(family), tokens(1, 5), use_cache=True)
    (held,) = cache_in(out).values()
    assert not isinstance(held, LinearCache)


def test_what_is_no_transformer_has_no_cache_of_ours() -> None:
    assert linear_cache(torch.nn.Linear(2, 2)) == {}


def test_another_error_of_a_model_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one with attention, and of one without that was given a cache; it is not called again."""
    calls = []

    def fails(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise ValueError("something else")

    for model, cache in ((zoo("qwen3_5_text"), {}), (alone("qwen3_5_text"), {"past_key_values": object()})):
        monkeypatch.setattr(type(model.model), "forward", fails)
        with pytest.raises(ValueError, match="something else"):
            forward(model, tokens(1, 3), use_cache=True, **cache)
    assert len(calls) == 2


@pytest.mark.cover(most=2)
@pytest.mark.parametrize("family", ALONE)
@pytest.mark.parametrize("refit", ["none", "output", "reconstruct"])
def test_it_is_pruned_on_text_of_its_own_with_a_proof(family: str, refit: str) -> None:
    """Sampled, scored, refitted, cut and proved, whose bytes of state are those of its cache."""
    model = alone(family)
    small = {"refit_steps": 4, "refit_windows": 8} if refit == "reconstruct" else {}
    recipe = {"axis": "state", "keep": 3, "samples": 8, "seq_len": 16, "device": "cpu", **small}
    result = sspruner.prune(model, "magnitude", calibration="self", refit=refit, **recipe)
    assert result.report.proof.state_bytes_removed > 0
    assert bool(result.plan.updates) == (refit != "none")


def test_it_is_refitted_with_text_of_its_own_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone("qwen3_5_text")
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "magnitude", axis="state"), keep=3)
    found = sspruner.refit(model, plan, "output", calibration=calibrated(tokens(8, 16)))
    assert all(after <= before for before, after in found.errors.values())


def test_it_is_benched() -> None:
    times = run_once(alone("qwen3_5_text"), tokens(2, 6), 3)
    assert times.step > 0


def test_it_continues_a_text() -> None:
    from sspruner.evaluation.continuation import continuation

    model, (_, tokenizer) = zoo("qwen3_5_text", layers="MM", vocab_size=4096), sspruner.load()
    prompt = torch.arange(5)
    said = continuation(model, tokenizer, prompt, new_tokens=3)
    ids = prompt[None]
    for _ in range(3):
        ids = torch.cat([ids, forward(model, ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert said == tokenizer.decode(ids[0, 5:], skip_special_tokens=True)
