"""Models that decode with stored states: against a loop over tokens, in every family, cut, masked and projected."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sspruner
from sspruner.compute.forward import cache_in
from sspruner.errors import InputError, ModelError
from sspruner.evaluation.decoded import Decoded
from sspruner.evaluation.result import Evaluation
from sspruner.evaluation.stored_state import state_shapes
from sspruner.recipes.measure import StoredState
from sspruner.reporting.evaluation import evaluation_table
from support.tiny import tiny_model, tokens
from support.zoo import FAMILIES, zoo

INT8 = StoredState("int8")


def by_hand(model: Any, ids: torch.Tensor, bits: bool, every: int = 1) -> torch.Tensor:
    """Logits of one sequence, token by token; int8 states by a formula of their own, in fp64."""
    cache: dict[str, Any] = {}
    logits = []
    with torch.no_grad():
        for t, token in enumerate(ids):
            out = model(input_ids=token.view(1, 1), use_cache=True, position_ids=torch.tensor([[t]]), **cache)
            cache = cache_in(out)
            logits.append(out.logits[0, 0])
            if bits and (t + 1) % every == 0:
                for layer in next(iter(cache.values())).layers:
                    for state in [
                        s for s in (getattr(layer, "recurrent_states", None) or {}).values() if s is not None
                    ]:
                        scale = state.double().abs().amax(-1, keepdim=True).clamp_min(1e-300) / 127
                        state.copy_(((state.double() / scale).round() * scale).float())
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_states_give_the_logits_of_one_forward(family: str) -> None:
    """In blocks of 1 and 3, rows padded on the right: also where a block would begin from an empty state."""
    model, ids = zoo(family), tokens(2, 7)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for every in (1, 3):
            found = Decoded(model, every)(ids, mask).logits
            assert torch.allclose(found[mask], whole[mask], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_states_give_the_logits_of_a_plain_loop(family: str) -> None:
    model, ids = zoo(family), tokens(1, 6)
    assert len(state_shapes(model)) == len(sspruner.trace(model).layers)
    with torch.no_grad():
        found, plain = Decoded(model, 1, INT8)(ids).logits, Decoded(model, 1)(ids).logits
    expected = by_hand(model, ids[0], bits=True)
    assert float((found[0] - expected).abs().mean()) < 0.05 * float((plain - found).abs().mean())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "feedback"])
@pytest.mark.parametrize("form", ["masked", "sliced", "projected"])
def test_cut_models_decode_with_stored_states(form: str, rounding: str) -> None:
    """A mask and its slice have equal states where they are kept: the same damage, up to decisions of rounding."""
    model, ids = tiny_model(groups=2), tokens(4, 12)
    scores = sspruner.score(model, "random" if form != "projected" else "balanced", calibration=ids)
    plan = sspruner.plan(sspruner.trace(model), scores, keep=3)
    stored = StoredState("int8", rounding)
    with torch.no_grad():
        if form == "masked":
            with sspruner.masked(model, plan):
                found, whole = Decoded(model, 1, stored)(ids).logits, model(input_ids=ids, use_cache=False).logits
        else:
            cut = sspruner.apply(copy.deepcopy(model), plan)
            found, whole = Decoded(cut, 1, stored)(ids).logits, cut(input_ids=ids, use_cache=False).logits
            assert state_shapes(cut)[0][-1] == 3
    assert 0 < float((found - whole).abs().mean()) < 0.1 * float(whole.std())


@pytest.mark.parametrize("rounding", ["stochastic", "feedback"])
@given(order=st.permutations(range(4)), size=st.integers(1, 4))
def test_neither_order_nor_batch_decides(rounding: str, order: list[int], size: int) -> None:
    """Each sequence has random numbers of its own, from the seed and its tokens."""
    model, ids = tiny_model(layers=1), tokens(4, 10)
    decoded = Decoded(model, 1, StoredState("int8", rounding), seed=3)
    with torch.no_grad():
        whole = decoded(ids).logits
        parts = torch.cat([decoded(part).logits for part in ids[list(order)].split(size)])
        other = Decoded(model, 1, StoredState("int8", rounding), seed=4)(ids).logits
    assert torch.allclose(parts, whole[list(order)], atol=1e-4)
    assert torch.equal(other, whole) == (rounding == "feedback")


def test_every_n_stores_after_each_nth_token() -> None:
    model, ids = tiny_model(layers=1), tokens(1, 10)
    with torch.no_grad():
        found, plain = Decoded(model, 4, INT8)(ids).logits[0], Decoded(model, 4)(ids).logits[0]
    assert torch.equal(found[:4], plain[:4])
    assert not torch.equal(found[4], plain[4])
    assert torch.allclose(found, by_hand(model, ids[0], bits=True, every=4), atol=1e-4)


def test_evaluation_with_a_dense_model(pair: tuple) -> None:
    """KL to the dense model of both kinds of states, the paired change, and the way to JSON and back."""
    cut, dense, _ = pair
    ids = torch.randint(4096, (3, 20), generator=torch.Generator().manual_seed(0))
    found = sspruner.evaluate(cut, against=dense, text=ids, max_length=19, stride=19, state_dtype="int8")
    assert found.rows == ()
    assert [*found.by_state] == ["kl_to_dense", "top1_agreement", "perplexity"]
    row = found.by_state["kl_to_dense"]
    with torch.no_grad():
        p, q = (m(input_ids=ids[:, :-1], use_cache=False).logits.double().log_softmax(-1) for m in (dense, cut))
        stored = torch.stack([by_hand(cut, ids[i, :-1], bits=True) for i in range(3)]).double().log_softmax(-1)
    expected = [float((p.exp() * (p - other)).sum(-1).mean()) for other in (stored, q)]
    assert row.against
    assert row.change
    assert [row.value.value, row.against.value] == pytest.approx(expected, rel=1e-3)
    assert row.change.value == pytest.approx(row.value.value - row.against.value)
    target = ids[:, 1:, None]
    assert found.by_state["perplexity"].value.value == pytest.approx(
        math.exp(-stored.gather(-1, target).mean()), rel=1e-4
    )
    state = found.protocol["state"]
    assert (state["fp32_bytes"], state["bytes"]) == (8 * 2 * 4, 8 * (2 + 4))  # 2 heads x 4, 2 states kept
    assert Evaluation.from_json(found.to_json()) == found
    shown = "".join(str(segment.text) for segment in Console(width=160).render(evaluation_table(found)))
    assert "int8, rounded to the nearest after every token: 48 bytes a sequence instead of 64" in " ".join(
        shown.split()
    )
    assert re.search(r"metric +┃ +stored +┃ +fp32 state +┃ +change", shown)
    assert shown.index("kl_to_dense") < shown.index("perplexity")


def test_evaluation_of_one_model_compares_it_with_itself(pair: tuple) -> None:
    _, dense, _ = pair
    ids = torch.randint(4096, (3, 20), generator=torch.Generator().manual_seed(0))
    found = sspruner.evaluate(dense, text=ids, max_length=19, state_dtype="fp8", metrics=["perplexity"])
    row = found.by_state["kl_to_fp32_state"]
    assert (row.against, row.change) == (None, None)
    assert row.value.value > 0
    plain = found.by_state["perplexity"].against
    assert plain
    assert plain.value == pytest.approx(found["perplexity"].value.value, rel=1e-5)


def test_neither_model_is_changed_or_left_in_another_mode(pair: tuple) -> None:
    cut, dense, _ = copy.deepcopy(pair)
    cut.train()
    before = {name: p.clone() for name, p in cut.named_parameters()}
    ids = torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    sspruner.evaluate(cut, against=dense, text=ids, max_length=11, state_dtype="bf16", every=2,
                      progress=lambda _, done, total: seen.append((done, total)))  # fmt: skip
    assert seen[-1] == (3 * 2 * 11, 3 * 2 * 11)  # models, windows, tokens
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(torch.equal(p, before[name]) for name, p in cut.named_parameters())
    assert all(module.training for module in cut.modules())
    assert not any("forward" in vars(module) for module in cut.modules())


def refused(**options: Any) -> str:
    model = options.pop("model", tiny_model(layers=1))
    with pytest.raises((InputError, ModelError)) as error:
        sspruner.evaluate(model, text=tokens(2, 12), max_length=11, **options)
    return str(error.value)


def test_what_has_no_meaning_is_refused() -> None:
    assert "give --state-dtype" in refused(rounding="feedback")
    assert "give --state-dtype" in refused(every=4)
    assert "must be one of int8, fp8, bf16, fp16" in refused(state_dtype="int4")
    assert "must be one of nearest, stochastic, feedback" in refused(state_dtype="int8", rounding="up")
    for every in ("0", 0, "often", 1.5):
        assert "expected a number of tokens, at least 1, or chunk" in refused(state_dtype="int8", every=every)
    assert "the longest window has 11 tokens" in refused(state_dtype="int8", every=11)
    assert "has no chunks" in refused(state_dtype="int8", every="chunk", model=zoo("mamba"))


def test_chunk_is_that_of_the_models_scan() -> None:
    found = sspruner.evaluate(
        tiny_model(layers=1), text=tokens(2, 12), max_length=11, state_dtype="int8", every="chunk"
    )
    assert found.protocol["state"]["every"] == 8


def test_a_model_without_a_state_in_the_cache_is_refused() -> None:
    """Another architecture, and mixers that keep their states to themselves, as mamba_ssm's do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, pad_token_id=0))  # fmt: skip
    assert "LlamaForCausalLM has 0 state-space mixers" in refused(state_dtype="int8", model=llama)
    hidden = tiny_model(layers=2)
    stock = hidden.forward
    hidden.forward = lambda input_ids, **_: stock(input_ids=input_ids, use_cache=False)
    assert "has 2 state-space mixers of a known family, and 0 recurrent states" in refused(
        state_dtype="int8", model=hidden
    )


def test_a_state_beyond_fp16_is_refused() -> None:
    model = tiny_model(layers=1)
    with torch.no_grad():
        model.backbone.layers[0].mixer.conv1d.weight.mul_(1e4)
    assert "layer 0 reaches" in refused(state_dtype="fp16", model=model)


def test_padding_on_the_left_is_refused() -> None:
    ids, mask = tokens(1, 6), torch.tensor([[False, False, True, True, True, True]])
    with pytest.raises(InputError, match="pad on the right"):
        Decoded(tiny_model(layers=1), 1)(ids, mask)
