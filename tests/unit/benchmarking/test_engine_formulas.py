"""The formulas of engines against their published logs, and against allocators that serve one token after another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sspruner.benchmarking.cache_layers import CacheLayers
from sspruner.benchmarking.engine_memory import CACHES, engine_cache
from sspruner.benchmarking.llama_cache import LlamaCache
from sspruner.benchmarking.sglang_cache import SglangCache
from sspruner.benchmarking.vllm_cache import VllmCache
from sspruner.errors import InputError, ModelError
from sspruner.recipes.serving import EngineOptions
from support.engine_layers import (
    CONTEXTS,
    FALCON_H1,
    GIB,
    KIMI,
    NANO,
    QWEN_4B,
    QWEN_27B,
    SUPER,
    SUPER_64,
    delta_net,
    layers,
    mamba2,
)  # fmt: skip

FP8 = EngineOptions(kv_dtype="fp8")
CACHED = EngineOptions(kv_dtype="fp8", prefix_caching=True)


def test_log_of_qwen_27b() -> None:
    """mitchross/talos-argocd-proxmox pull 1995: TP 2, fp8 KV, 4.99 GiB, 131,072 tokens."""
    cache, pool = VllmCache(QWEN_27B, CACHED, tp=2), int(4.99 * GIB)
    assert (cache.block, cache.blocks(pool), cache.blocks_per_sequence(131072)) == (1568, 208, 90)
    assert f"{cache.concurrency(pool, 131072):.2f}x" == "2.31x"
    assert f"{cache.tokens(pool, 131072):,}" == "302,921"


def test_log_of_nemotron_nano() -> None:
    """vllm-project/vllm issue 41037: fp8 KV, --block-size 32."""
    cache = VllmCache(NANO, FP8, block_size=32)
    assert (cache.page, cache.block) == (2_134_016, 4192)


#: 40 GiB: without prefix caching at 4k, 32k and 128k tokens, and with it. 40.6 is 1260 blocks / 31.
TABLE = {
    "dense": (SUPER, 8320, (210.0, 140.0, 60.0), (78.8, 66.3, 40.6)),
    "state 128 -> 64": (SUPER_64, 4208, (415.2, 191.6, 67.3), (155.7, 108.3, 53.0)),
    "heads 128 -> 96": (
        replace(SUPER, layer=mamba2(96, 64, 128, 8)), 6240, (280.0, 152.7, 62.2), (105.0, 80.0, 45.4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("cut", TABLE)
def test_table_of_nemotron_super(cut: str) -> None:
    model, block, alone, cached = TABLE[cut]
    for options, concurrency in ((FP8, alone), (CACHED, cached)):
        cache = VllmCache(model, options)
        assert cache.block == block
        assert tuple(round(cache.concurrency(40 * GIB, context), 1) for context in CONTEXTS) == concurrency


def test_pages_of_nemotron_super() -> None:
    cache = VllmCache(SUPER, CACHED)
    assert (cache.kv, cache.page, cache.padded_page, cache.block_bytes) == (512, 4_255_744, 4_259_840, 34_078_720)
    assert (cache.group, cache.attention_groups, cache.recurrent_groups, cache.slots) == (8, 1, 5, 3)
    assert (cache.blocks(40 * GIB), cache.blocks_per_sequence(32768)) == (1260, 19)


def test_qwen_4b() -> None:
    cache = VllmCache(QWEN_4B, EngineOptions(prefix_caching=True))
    assert (cache.page, cache.block, cache.blocks(8 * GIB)) == (49_152 + 2_097_152, 528, 496)
    assert VllmCache(QWEN_4B, block_size=64).block == 576  # FlashInfer's prefill wants multiples of 64
    half = replace(QWEN_4B, layer=delta_net(16, 32, 64, 128))
    cut = VllmCache(half, EngineOptions(prefix_caching=True))
    assert (cut.block, cut.blocks(8 * GIB)) == (272, 963)
    found = [round(one.concurrency(8 * GIB, context), 1) for context in CONTEXTS[:2] for one in (cache, cut)]
    assert found == [35.4, 43.8, 7.2, 7.6]
    plain = [round(VllmCache(one).concurrency(8 * GIB, 4096), 1) for one in (QWEN_4B, half)]
    assert plain == [45.1, 50.7]
    bf16 = EngineOptions(prefix_caching=True, state_dtype="bfloat16")
    assert VllmCache(QWEN_4B, bf16).block == cut.block  # half the bytes of a state, however they are saved
    assert round(100 * VllmCache(QWEN_4B).padding, 2) == 0.76  # vllm-project/vllm pull 37467: "Padding ... by 0.76%"
    drafts = VllmCache(QWEN_4B, EngineOptions(spec=2))  # more columns of the convolution's state, and more slots
    assert (drafts.page - cache.page, drafts.slots) == (2 * 8192 * 2, 3)


def test_log_of_kimi_linear() -> None:
    """vllm-project/vllm issue 30092: "Setting attention block size to 1920 tokens", in bf16 with an fp32 state."""
    cache = VllmCache(KIMI)
    assert (cache.state_dtype, cache.kv, cache.page) == ("float32", 576 * 2, 3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4)
    assert (cache.block, cache.group, cache.recurrent_groups, cache.slots) == (1920, 7, 3, 1)
    assert VllmCache(KIMI, EngineOptions(prefix_caching=True)).slots == 2
    assert VllmCache(KIMI, tp=2).kv == cache.kv, "every GPU keeps the whole vector"
    assert (SglangCache(KIMI).kv, LlamaCache(KIMI).kv) == (7 * 576 * 2, 7 * 576 * 2)
    assert SglangCache(KIMI).slot_bytes == 20 * (3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4)
    assert LlamaCache(KIMI).slot_bytes == 20 * 4 * (3 * 3 * 4096 + 32 * 128 * 128)


def test_blocks_of_latent_attention_are_of_at_least_128_tokens() -> None:
    small = replace(KIMI, layer=replace(KIMI.layer, state=1, channels=96))
    assert VllmCache(small).block == 128
    assert VllmCache(small, block_size=256).block == 256


def test_replayssm() -> None:
    """The ring is in the page, and drafts need no state of their own."""
    for model, ring in ((SUPER, 303_104), (SUPER_64, 286_720)):
        plain, replay = VllmCache(model, FP8), VllmCache(model, replace(FP8, replayssm=True))
        assert replay.page - plain.page == ring
    drafts = replace(FP8, spec=3)
    native, ring = VllmCache(SUPER, drafts), VllmCache(SUPER, replace(drafts, replayssm=True))
    cut = VllmCache(SUPER_64, replace(drafts, replayssm=True))
    assert [round(one.concurrency(40 * GIB, 32768), 1) for one in (native, ring, cut)] == [51.8, 126.8, 173.9]


@pytest.mark.parametrize(
    ("changes", "concurrency"),
    [({}, 66.3), ({"recurrent": 33}, 66.3), ({"recurrent": 32}, 78.8), ({"attention": 7}, 65.5)],
)
def test_layers_count_in_groups(changes: dict[str, int], concurrency: float) -> None:
    assert round(VllmCache(replace(SUPER, **changes), CACHED).concurrency(40 * GIB, 32768), 1) == concurrency


def test_what_is_said_of_groups() -> None:
    assert VllmCache(SUPER, CACHED).layer_steps(32768) == [
        "of 40 recurrent layers, removing fewer than 8 frees nothing",
        "of 8 attention layers, removing fewer than 2 frees nothing",
        "7 of 8 attention layers take 1.3% more than all of them",
    ]
    assert VllmCache(replace(SUPER, attention=0)).layer_steps(32768) == []  # one group: each layer counts


def test_logs_of_sglang() -> None:
    """sgl-project/sglang issue 40706: 153.9 MB of fp32 a slot, "capped to 7 (36 slots, 5 per request)"."""
    cache = SglangCache(QWEN_27B, EngineOptions(prefix_caching=True))
    assert (cache.slot_bytes, cache.requests(36)) == (153_944_064, 7)
    dense, cut = (SglangCache(model, CACHED) for model in (SUPER, SUPER_64))
    assert (dense.slots(40 * GIB), cut.slots(40 * GIB)) == (118, 235)
    assert [one.requests(one.slots(40 * GIB)) for one in (dense, cut)] == [23, 47]
    assert [cut.sequences(40 * GIB, context) for context in CONTEXTS] == [47, 47, 42]  # at last keys and values decide


def test_logs_of_llama_cpp() -> None:
    """Super: 172.7 MB, N 64: 88.3 MB; BurnySc2/genie-claw issue 410, Falcon-H1-1.5B: "R 0.98 + S 72.00 MiB"."""
    assert [f"{LlamaCache(model).slot_bytes / 1e6:.1f}" for model in (SUPER, SUPER_64)] == ["172.7", "88.3"]
    qwen = LlamaCache(QWEN_4B)  # JamePeng/llama-cpp-python issue 78: "R (f32): 2.25 MiB, S (f32): 48.00 MiB"
    assert (qwen.conv_bytes / 2**20, qwen.state_bytes / 2**20) == (2.25, 48.0)
    falcon = LlamaCache(FALCON_H1)
    assert f"R {falcon.conv_bytes / 2**20:.2f} + S {falcon.state_bytes / 2**20:.2f}" == "R 0.98 + S 72.00"


def test_dtypes_are_the_engines_own() -> None:
    """bf16 in vLLM, but fp32 for Nemotron-H unless its config says otherwise; fp32 in the two others."""
    mamba = CacheLayers(6, mamba2(8, 64, 128, 1), family="mamba2")
    said = replace(SUPER, state_dtypes=(("mamba_ssm_cache_dtype", "bfloat16"),))
    assert [VllmCache(one).state_dtype for one in (mamba, SUPER, said, QWEN_4B)] == [
        "bfloat16", "float32", "bfloat16", "float32",
    ]  # fmt: skip
    assert VllmCache(mamba).page == 3 * 768 * 2 + 8 * 64 * 128 * 2
    assert [SglangCache(one).state_dtype for one in (mamba, said)] == ["float32", "float32"]
    assert LlamaCache(mamba).slot_bytes == 6 * 4 * (3 * 768 + 8 * 64 * 128)
    half = EngineOptions(state_dtype="float16")
    assert VllmCache(SUPER, half).page == 61_440 + 2_097_152
    assert SglangCache(SUPER, half).slot_bytes == 40 * (61_440 + 2_097_152)


def test_heads_and_groups_are_split_over_gpus() -> None:
    """B/C groups that TP does not divide are replicated on each GPU (`extra_groups_for_head_shards`)."""
    layer = mamba2(128, 64, 128, 8)
    assert [layer.conv_channels(tp) for tp in (1, 2, 8, 16)] == [
        8192 + 2048, 4096 + 1024, 1024 + 256, 512 + 256,
    ]  # fmt: skip
    assert VllmCache(SUPER, FP8, tp=8).page == 3 * 1280 * 2 + 4_194_304 // 8
    assert [VllmCache(SUPER, FP8, tp=tp).kv for tp in (1, 2, 8)] == [512, 256, 256]
    with pytest.raises(ModelError, match="tp 3: the 128 heads of a layer cannot be split evenly"):
        VllmCache(SUPER, tp=3)
    with pytest.raises(ModelError, match="tp 32: the 16 key heads of a layer cannot be split evenly"):
        VllmCache(QWEN_4B, tp=32)


# ------------------------------------------------------------------------------------------------ brute force


def served_by_vllm(cache: VllmCache, pool: int, context: int) -> int:
    """Serve sequences from a pool until one does not fit: a token, a group and a block at a time."""
    model, page = cache.layers, cache.page
    kinds = [["attention"] * model.attention, ["recurrent"] * model.recurrent]
    counts = sorted(len(kind) for kind in kinds if kind)
    size = counts[-1] if counts[-1] < 1.5 * counts[0] else counts[0]
    groups = [kind[i : i + size] for kind in kinds for i in range(0, len(kind), size)]  # the last one is padded
    if model.attention:
        block = next(t for t in itertools.count(cache.block_size, cache.block_size) if t * cache.kv >= page)
        page = block * cache.kv
    free = list(range(pool // (size * page)))[1:]  # block 0 is the null block
    for served in itertools.count():
        for group in groups:
            table: list[int] = []
            wanted = range(0, context, block) if group[0] == "attention" else range(cache.slots)
            for _ in wanted:
                if not free:
                    return served
                table.append(free.pop())
    raise AssertionError


@given(layers(), st.integers(1, 200), st.integers(0, 60), st.integers(1, 4), st.booleans(), st.integers(0, 2))
@example(replace(SUPER, attention=4, recurrent=5), 100, 50, 4, False, 0)  # padded to five and five
@example(replace(SUPER, attention=4, recurrent=6), 100, 50, 4, False, 0)  # four, three and three
def test_vllm_serves_what_a_simulation_serves(
    model: CacheLayers, context: int, blocks: int, size: int, prefix: bool, spec: int
) -> None:
    """blocks: the pool, in blocks of as many layers as the model has of the rarer kind."""
    cache = VllmCache(model, EngineOptions(prefix_caching=prefix, spec=spec), block_size=size)
    pool = blocks * (min(model.attention, model.recurrent) or model.recurrent) * cache.padded_page + blocks % 7
    assert cache.sequences(pool, context) == served_by_vllm(cache, pool, context)


@given(layers(), st.integers(1, 500), st.integers(0, 10**7), st.booleans())
def test_vllm_never_gives_away_more_than_the_pool(model: CacheLayers, context: int, pool: int, prefix: bool) -> None:
    cache = VllmCache(model, EngineOptions(prefix_caching=prefix))
    assert cache.sequences(pool, context) * cache.bytes_per_sequence(context) <= pool
    assert cache.padded_page >= cache.page
    assert 0 <= cache.wasted(context) < 1
    held = model.attention * context * cache.kv + cache.slots * model.recurrent * cache.page
    assert cache.bytes_per_sequence(context) * (1 - cache.wasted(context)) == pytest.approx(held)


@given(layers(), st.integers(0, 10**6), st.booleans(), st.integers(0, 3))
def test_sglang_fills_both_pools(model: CacheLayers, pool: int, prefix: bool, drafts: int) -> None:
    """Slots, their padding slot and drafts stay within their share, one slot more would not; tokens fill the rest."""
    cache = SglangCache(model, EngineOptions(prefix_caching=prefix, spec=drafts))
    slots, tokens = cache.slots(pool), cache.tokens(pool)
    share = pool * 0.9 / 1.9

    def taken(slots: int) -> float:
        running = slots / cache.slots_per_sequence
        return cache.slot_bytes * ((1 + drafts) + slots + drafts * running)

    assert slots == 0 or taken(slots) <= share
    assert taken(slots + 1) > share - 1
    if tokens is not None:
        rest = pool - (slots + 1) * cache.slot_bytes
        assert tokens == max(0, rest // cache.kv)


@given(layers(), st.integers(1, 2000), st.integers(1, 10**6))
def test_llama_cpp_fills_the_pool(model: CacheLayers, context: int, pool: int) -> None:
    cache = LlamaCache(model)
    many = cache.sequences(pool, context)
    assert many * cache.bytes_per_sequence(context) <= pool < (many + 1) * cache.bytes_per_sequence(context)


@given(st.sampled_from(sorted(CACHES)), layers(), st.integers(1, 400), st.integers(1, 10**6), st.integers(1, 400))
def test_more_context_is_never_more_sequences(engine: str, model: CacheLayers, less: int, pool: int, more: int) -> None:
    cache = engine_cache(engine, model)
    assert cache.sequences(pool, less + more) <= cache.sequences(pool, less)
    if engine != "sglang":  # there a slot more may take the memory of keys and values
        assert cache.sequences(pool, less) <= cache.sequences(pool + more, less)


@given(layers(attention=False), st.integers(1, 10**6))
def test_without_attention_a_smaller_state_is_never_worse(model: CacheLayers, pool: int) -> None:
    smaller = replace(model, layer=replace(model.layer, state=max(1, model.layer.state // 2)))
    for engine in CACHES:
        assert engine_cache(engine, smaller).sequences(pool, 64) >= engine_cache(engine, model).sequences(pool, 64)


@pytest.mark.parametrize(
    ("engine", "options", "says"),
    [
        ("vllm", {"replayssm": True}, "replayssm: vLLM 0.33 has it for nemotron_h, not for falcon_h1"),
        ("sglang", {"replayssm": True}, "gated delta nets and KDA alone"),
        ("llama.cpp", {"state_dtype": "bfloat16"}, "llama.cpp keeps states in float32 alone"),
        ("llama.cpp", {"kv_dtype": "fp8"}, "kv-dtype fp8"),
        ("llama.cpp", {"prefix_caching": True}, "prefix-caching: llama.cpp"),
        ("llama.cpp", {"spec": 2}, "nemotron_h, qwen3_5_text, qwen3_5_moe_text, bailing_hybrid alone"),
        ("exllama", {}, "its memory is counted for vllm, sglang, llama.cpp"),
    ],
)
def test_what_an_engine_does_not_have(engine: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        engine_cache(engine, FALCON_H1, EngineOptions(**options))  # type: ignore[arg-type]


def test_replayssm_with_drafts_takes_no_prefix_caching() -> None:
    with pytest.raises(InputError, match="takes no prefix caching"):
        VllmCache(SUPER, EngineOptions(replayssm=True, spec=2, prefix_caching=True))
    assert LlamaCache(SUPER, EngineOptions(spec=2)).slot_bytes == 3 * LlamaCache(SUPER).slot_bytes


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"state_dtype": "fp8"}, {"kv_dtype": "q4"}, {"spec": -1}])
def test_options_that_no_engine_has(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"must be"):
        EngineOptions(**options)  # type: ignore[arg-type]
