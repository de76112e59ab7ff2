"""Delta rules in GGUF files, without an engine: values and sizes against the model, and what is refused with advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.formats.fitting import offers
from sspruner.formats.gguf import check_gguf
from sspruner.formats.gguf_attention import _sections
from sspruner.formats.gguf_blocks import Parts
from sspruner.formats.gguf_delta import _tiled
from sspruner.formats.gguf_fields import fields
from sspruner.formats.gguf_tensors import tensors
from sspruner.formats.gguf_weights import Weights
from sspruner.formats.targets import Fit, target
from sspruner.io.skeleton import skeleton
from support.examples import examples
from support.gguf_cases import cut, multimodal, variant
from support.zoo import zoo

DELTA = ("qwen3_5", "qwen3_5, experts", "qwen3_next, experts", "kimi_linear, experts", "bailing_hybrid, experts")


def said(model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields and tensors that a file of this model would have."""
    described, chosen = check_gguf(model)
    return fields(described, chosen.one), dict(tensors(described, chosen, Weights()))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@examples(20)
def test_value_heads_find_their_key_heads(groups: int, heads: int, width: int) -> None:
    """llama.cpp repeats the key heads as a whole: value head h reads key head h % groups, elsewhere h // heads."""
    rows = torch.arange(groups * heads * width)
    ours = _tiled(rows, groups, heads, True).view(-1, width)
    for h in range(groups * heads):
        before = int(ours[h, 0]) // width  # the head that is now number h
        assert before // heads == h % groups
        assert torch.equal(ours[h], rows.view(-1, width)[before])
    assert torch.equal(_tiled(rows, groups, heads, False), rows)


@pytest.mark.parametrize("name", DELTA)
def test_fields_are_the_sizes_of_the_tensors(name: str) -> None:
    """Before a cut and after one of every axis that the class has."""
    model = variant(name)
    for after in (model, cut(model, "head", *(() if "kimi" in name else ("state", "head_dim")), "attn_head", "hidden")):
        found, held = said(after)
        mixer = next(i for i in range(4) if f"blk.{i}.ssm_norm.weight" in held)
        of = {n.removeprefix(f"blk.{mixer}."): t for n, t in held.items() if n.startswith(f"blk.{mixer}.")}
        assert held["token_embd.weight"].shape == (found["vocab_size"], found["embedding_length"])
        if "ssm.inner_size" in found:
            K, G, H = (found[f"ssm.{n}"] for n in ("state_size", "group_count", "time_step_rank"))
            assert of["ssm_norm.weight"].shape == (K,)
            assert of["ssm_conv1d.weight"].shape == (2 * G * K + H * K, found["ssm.conv_kernel"])
            assert of["attn_gate.weight"].shape == (found["ssm.inner_size"], found["embedding_length"])
            assert of["ssm_a"].shape == of["ssm_dt.bias"].shape == (H,)
            assert found["attention.recurrent_layers"] == [1, 1, 0, 1]
        else:
            K, H = found["kda.head_dim"], found["attention.head_count"]
            assert of["ssm_norm.weight"].shape == (K,)
            assert of["ssm_conv1d_k.weight"].shape == (1, H * K, 1, found["ssm.conv_kernel"])
            assert of["ssm_a"].shape == (H, 1)
            assert bool((of["ssm_a"] > 0).all()) == ("bailing" in name)  # there the sign is in the lower bound
            assert found["attention.head_count_kv"] == [0, 0, 1, 0]
            assert found["leading_dense_block_count"] == 1
            made = held["blk.2.attn_k_b.weight"]
            assert made.shape == (H, found["attention.kv_lora_rank"], 4)
            assert held["blk.2.attn_v_b.weight"].shape == (H, found["attention.value_length_mla"], made.shape[1])


def test_values_of_a_gated_delta_net() -> None:
    """Norms outside the mixers are zero-centred; the two ways to store the rows of one model give one file."""
    model = variant("qwen3_5")
    _, held = said(model)
    layer, attention = model.model.layers[0], model.model.layers[2].self_attn
    assert torch.equal(held["blk.0.attn_norm.weight"], 1 + layer.input_layernorm.weight)
    assert torch.equal(held["blk.0.ssm_norm.weight"], layer.linear_attn.norm.weight)
    assert torch.equal(held["blk.2.attn_k_norm.weight"], 1 + attention.k_norm.weight)
    assert torch.equal(held["blk.2.attn_q.weight"], attention.q_proj.weight)
    other = variant("qwen3_next, experts")
    mixer = other.model.layers[0].linear_attn
    G, K, V = mixer.num_k_heads, mixer.head_k_dim, mixer.num_v_heads * mixer.head_v_dim // mixer.num_k_heads
    rows = mixer.in_proj_qkvz.weight.view(G, 2 * K + 2 * V, -1)
    _, held = said(other)
    assert torch.equal(held["blk.0.attn_qkv.weight"][:K], rows[0, :K])
    assert torch.equal(held["blk.0.attn_qkv.weight"][G * K : G * K + K], rows[0, K : 2 * K])
    assert torch.equal(held["blk.0.attn_gate.weight"][-V:], rows[-1, 2 * K + V :])


@given(st.integers(1, 40), st.lists(st.integers(0, 20), min_size=3, max_size=3))
@examples(20)
def test_every_rotated_pair_takes_a_position_of_the_text(pairs: int, sections: list[int]) -> None:
    """llama.cpp gives pair i, modulo all sections, the position 0 if it lies beyond three times its own section."""
    rotary = type("Rotary", (), {"inv_freq": torch.ones(pairs), "mrope_section": sections})()
    made = _sections(Parts("qwen3_5_text", None, None, (), None, None, rotary=rotary))
    total = sum(made)
    assert total == pairs
    assert all(i % total < 3 * made[i % total % 3] for i in range(pairs))


REFUSED: dict[str, tuple[Any, str]] = {
    "key channels alone": (
        lambda: cut(variant("qwen3_5"), "state"),
        r"size for the key and value channels of a head; here are 3 and 6. Cut both to 3 \(--axis head_dim --keep 3\)",
    ),
    "value channels alone": (
        lambda: cut(variant("qwen3_next, experts"), "head_dim"),
        r"here are 6 and 3. Cut both to 3 \(--axis state --keep 3\), or --to gguf-padded",
    ),
    "heads of kda alone": (
        lambda: cut(variant("bailing_hybrid, experts"), "head"),
        r"one number of heads for KDA and attention of bailing_hybrid; here are 2, 4. Cut both to 2",
    ),
    "channels of kimi": (
        lambda: cut(variant("kimi_linear, experts"), "state", "head_dim"),
        "Kimi's gates with as many inner channels as a head has, 3; they have 6",
    ),
    "narrow queries of kimi": (
        lambda: zoo("kimi_linear", bias=False, heads=4),
        r"queries from a narrow vector \(q_lora_rank\)",
    ),
    "bias of attention": (
        lambda: zoo("qwen3_5_text", channels=6),
        "no place for model.layers.2.self_attn.q_proj.bias",
    ),
    "no experts": (lambda: zoo("qwen3_next", bias=False, channels=6), "builds qwen3_next with experts alone"),
    "shared experts": (
        lambda: cut(variant("kimi_linear, experts"), "mlp"),
        "shared experts as wide as a whole number of experts; they are 8 wide, and one expert 16",
    ),
    "another sum of weights": (
        lambda: zoo("qwen3_next", bias=False, channels=6, experts=3, norm_topk_prob=False),
        "add up to 1; norm_topk_prob is false",
    ),
    "a decay without a bound": (
        lambda: zoo("bailing_hybrid", bias=False, heads=4, kda_safe_gate=False),
        "kda_safe_gate is false here",
    ),
    "a multimodal model": (
        multimodal,
        "the file holds a language model alone; Qwen3_5ForConditionalGeneration has other parts. Load it as one",
    ),
    "olmo": (lambda: zoo("olmo_hybrid", bias=False), "llama.cpp has no models of type olmo_hybrid; it has mamba"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_can_be(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    with pytest.raises(sspruner.ModelError, match=f"^gguf: .*{why}"):
        sspruner.export(make(), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_padding_ties_what_a_cut_has_untied(tmp_path: Path) -> None:
    """To the sizes before the cut; the logits are proved before anything is written."""
    model = cut(variant("qwen3_5"), "state")
    assert sspruner.export(model, tmp_path / "out", to="gguf-padded") / "model.gguf"


def test_a_target_cuts_both_channels_alike() -> None:
    """Alone neither axis has a size that the target takes; together they are rounded to one."""
    graph = sspruner.trace(variant("qwen3_5"))
    fit = Fit(target("llama.cpp"), graph)
    assert fit.takes("state") == fit.takes("head_dim") == []
    assert fit.takes("group") == [1]
    asked = dict.fromkeys(graph.on_axis("state"), 2) | dict.fromkeys(graph.on_axis("head_dim"), 4)
    made = fit.counts(asked, {name: range(1, 7) for name in asked})
    assert len(set(made.values())) == 1
    with pytest.raises(sspruner.InputError, match="cut both to one number: --axis state"):
        fit.counts(dict.fromkeys(graph.on_axis("state"), 3), dict.fromkeys(graph.on_axis("state"), range(1, 6)))


def test_what_llama_cpp_takes_of_the_reference_model() -> None:
    (offer,) = offers(skeleton("gdn-books"), target("llama.cpp"))
    assert not offer.reason
    assert {"group", "head", "mlp", "attn_head", "hidden", "block"} == set(offer.axes)
    assert {"state", "head_dim"} == set(offer.refused)
    assert offer.refused["state"].startswith("key channels of a head 63: llama.cpp has one size")
    (offer,) = offers(skeleton("gdn-books"), target("llama.cpp:cuda"))
    assert not offer.reason, "64 channels have a kernel"
