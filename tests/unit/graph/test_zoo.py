"""Facts about stock transformers, family by family, that the engine relies on. Where stock is wrong, a strict xfail
says how: the day it passes, the engine may rely on more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from transformers import PreTrainedModel

from support.family_plans import DELTA, KDA, is_mixer
from support.tiny import tokens
from support.zoo import FAMILIES, rounding, zoo, zoo_models
from support.zoo_variants import PURE, VARIANTS, cache_name, cached, sharing

pytestmark = pytest.mark.slow  # facts about transformers

MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
MAMBA2 = tuple(family for family in FAMILIES if family not in (*MAMBA1, *KDA, *DELTA))


def _name(value: Any) -> str | None:
    return "-".join([value[0], *(f"{k}={v}" for k, v in value[1].items())]) if isinstance(value, tuple) else None


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=_name)
each_family = pytest.mark.parametrize("family", FAMILIES)


def wrong_in(families: tuple[str, ...], reason: str) -> pytest.MarkDecorator:
    """Every family, those that stock gets wrong as strict xfails."""
    xfail = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
    return pytest.mark.parametrize("family", [pytest.param(f, marks=[xfail] * (f in families)) for f in FAMILIES])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def uncached(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@each_variant
def test_the_future_does_not_change_the_past(variant):
    family, overrides = variant
    model, ids = zoo(family, **overrides), tokens()
    other = ids.clone()
    other[:, 12] = (ids[:, 12] + 7) % 31
    change = (uncached(model, other) - uncached(model, ids)).abs().amax((0, 2))  # (T,)
    assert change[:12].max() < 1e-5
    assert change[12] > 1e-3
    assert change[13:].max() > 1e-3  # across the chunk's end at 16, too


@pytest.mark.cover(most=4)
@each_variant
@pytest.mark.parametrize("prefill", [1, 9])
def test_decoding_token_by_token_equals_one_forward(variant, prefill):
    family, overrides = variant
    model, ids = zoo(family, **overrides), tokens()
    assert_close(cached(model, ids, [prefill] + [1] * (19 - prefill)), uncached(model, ids))


@wrong_in(("bamba",), "bamba counts positions from 0 at every call, cache or not; generate() tells it better")
def test_decoding_without_position_ids(family):
    model, ids = zoo(family), tokens()
    assert_close(cached(model, ids, [9] + [1] * 10, positions=False), uncached(model, ids))


@wrong_in(MAMBA1, "the Mamba1 scan starts from 0 whenever it sees more than one token")
def test_continuing_with_more_than_one_token(family):
    model, ids = zoo(family), tokens()
    assert_close(cached(model, ids, [8, 5, 6]), uncached(model, ids))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="dt is clamped in prefill, not in the one-token step")
@pytest.mark.parametrize("family", MAMBA2)
def test_a_limit_on_dt_holds_while_decoding(family):
    """Zamba2 and nemotron_h always have one, time_step_min, which their models hardly ever touch at 0.001."""
    limit = {"time_step_min": 0.5} if family in ("zamba2", "nemotron_h") else {"time_step_limit": (0.5, 9.0)}
    model, ids = zoo(family, **limit), tokens()
    assert_close(cached(model, ids, [9] + [1] * 10), uncached(model, ids))


@pytest.mark.cover(most=3)
@each_variant
def test_greedy_generation_with_a_cache_equals_without(variant):
    family, overrides = variant
    model, ids = zoo(family, **overrides), tokens(length=6)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(ids, **how, use_cache=use_cache) for use_cache in (True, False))
    assert with_cache.shape == (2, 14)
    assert torch.equal(with_cache, without)


@pytest.mark.cover(most=4)
@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_changes_nothing(variant, dtype, tmp_path):
    family, overrides = variant
    model, ids = zoo(family, dtype=dtype, **overrides), tokens()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert torch.equal(uncached(loaded, ids), uncached(model, ids))
    assert sharing(loaded) == sharing(model)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_recurrent_state_is_fp32_and_as_large_as_the_formula(variant, dtype):
    """H·P·N floats per Mamba2, D·N per Mamba1, H·K·V per KDA, in .layers[i].recurrent_states[0], in any dtype."""
    family, overrides = variant
    model = zoo(family, dtype=dtype, **overrides)
    cache = model(input_ids=tokens(batch=3), use_cache=True)[cache_name(model)]
    states = {
        i: layer.recurrent_states[0] for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")
    }
    mixers = {m.layer_idx: m for m in model.modules() if is_mixer(m)}
    assert states.keys() == mixers.keys()
    for i, mixer in mixers.items():
        assert states[i].dtype == torch.float32
        assert len(cache.layers[i].recurrent_states) == 1
        if family in DELTA:
            assert states[i].nbytes == 3 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim * 4
            continue
        channels = mixer.intermediate_size if family in MAMBA1 else mixer.num_heads * mixer.head_dim
        assert channels == getattr(mixer, "intermediate_size", mixer.qkv_dim if family in KDA else None)
        assert states[i].nbytes == 3 * channels * (mixer.head_dim if family in KDA else mixer.ssm_state_size) * 4


@each_family
def test_left_padding_is_exact_without_a_bias_in_in_proj(family):
    model, ids = zoo(family, bias=False), tokens()
    assert_close(left_padded(model, ids), uncached(model, ids))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="padding is zeroed before in_proj: conv1d sees the bias")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*KDA, *DELTA)])  # no bias before conv1d there
def test_left_padding_is_exact_with_a_bias_in_in_proj(family):
    model, ids = zoo(family), tokens()
    assert_close(left_padded(model, ids), uncached(model, ids))


def left_padded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(2, 3 + 19, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([ids.new_zeros(2, 3), ids], 1)
    told = {} if model.config.model_type in PURE else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return model(input_ids=padded, attention_mask=mask, use_cache=False, **told).logits[:, 3:]


@wrong_in(("falcon_h1",), "embedding_multiplier applies to input_ids, not to inputs_embeds (in granite, to both)")
def test_inputs_embeds_are_the_embeddings_of_input_ids(family):
    model, ids = zoo(family), tokens()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
    assert_close(embedded, uncached(model, ids))


@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h", "jamba"])
def test_expert_widths_must_be_multiples_of_16_bytes(family):
    """As long as experts run through grouped_mm, which is the default; "eager" and "batched_mm" take any width."""
    name = "moe_intermediate_size" if family == "nemotron_h" else "intermediate_size"
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        uncached(zoo(family, **{name: 6}), tokens())
    assert uncached(zoo(family, **{name: 6}, experts_implementation="eager"), tokens()).isfinite().all()


@pytest.mark.parametrize(("family", "block"), [("zamba2", "shared_transformer"), ("zamba", "shared_transf")])
def test_the_blocks_are_shared_only_if_the_embeddings_are_tied(family, block):
    """Distinct modules, the same Parameters. zamba2 MAMAA with two blocks: layers 1 and 4; zamba MAMA: 1 and 3."""
    model = zoo(family)
    first, last = (getattr(model.model.layers[i], block) for i in (1, 4 if family == "zamba2" else 3))
    assert first is not last
    ours = dict(first.named_parameters())
    assert ours
    assert all(ours[name] is parameter for name, parameter in last.named_parameters())
    assert len(sharing(model)) == len(ours) + 1  # and the embedding
    assert not sharing(zoo(family, tie_word_embeddings=False))


def test_zamba_with_one_hybrid_layer_cannot_be_built():
    with pytest.raises(ValueError, match="tie into"):
        zoo("zamba", layers="MAM")


@each_family
def test_tying_is_one_parameter_except_where_stock_ignores_it(family):
    model = zoo(family, tie_word_embeddings=True)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family not in ("nemotron_h", "kimi_linear", "bailing_hybrid"))


@each_variant
def test_no_parameter_of_the_zoo_hides_in_a_0_or_a_1(variant):
    family, overrides = variant
    model = zoo(family, **overrides)
    for name, parameter in model.named_parameters():
        assert not ((parameter == 0) | (parameter == 1)).any(), name
        assert parameter.unique().numel() == parameter.numel() or parameter.numel() > 1000, name
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again, another = zoo(family, **overrides), zoo(family, seed=1, **overrides)
    assert torch.equal(uncached(again, tokens()), uncached(model, tokens()))
    assert not torch.equal(uncached(another, tokens()), uncached(model, tokens()))


@pytest.mark.slow
@given(zoo_models())
def test_any_model_of_the_zoo_is_causal_decodes_and_has_logits_of_a_sane_scale(model):
    ids = tokens()
    logits = uncached(model, ids)
    assert 0.1 < logits.std() < 5
    tolerance = max(1e-4, 8 * rounding(model, ids))
    assert tolerance < 0.1
    assert_close(uncached(model, ids[:, :11]), logits[:, :11], tolerance)
    assert_close(cached(model, ids, [9] + [1] * 10), logits, tolerance)
    assert sum(is_mixer(m) for m in model.modules()) >= 2
