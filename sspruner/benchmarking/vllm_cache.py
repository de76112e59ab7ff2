"""vLLM's cache: one pool of blocks, which attention and recurrent layers share in groups. Formulas of vLLM 0.33.

A block holds one page of each layer of a group. Pages of all layers have one size, so the attention block is made long
enough to hold a recurrent layer's state, and the state is padded up to it.

Sources, all vllm-project/vllm @ 0.33: vllm/platforms/interface.py `_align_hybrid_block_size`;
vllm/v1/core/kv_cache_planning.py `_get_kv_cache_groups_uniform_page_size`, `get_max_concurrency_for_kv_cache_config`;
vllm/v1/kv_cache_interface.py `MambaSpec`; vllm/model_executor/layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sspruner.benchmarking.cache_layers import CacheLayers
from sspruner.errors import InputError
from sspruner.recipes.serving import CACHE_DTYPES, DEFAULTS, EngineOptions

#: config's model_type -> the field that names the state's dtype, and the dtype without it. Other models: that of the
#: convolution state. vllm/model_executor/models/config.py.
STATE_DTYPE = {
    "nemotron_h": ("mamba_ssm_cache_dtype", "float32"),
    "qwen3_5_text": ("mamba_ssm_dtype", ""),
    "qwen3_5_moe_text": ("mamba_ssm_dtype", ""),
    "kimi_linear": ("", "float32"),
    "bailing_hybrid": ("", "float32"),
}
REPLAYSSM = ("nemotron_h",)  # classes with `SupportsReplaySSM`; Kimi's variant is another
BLOCK_SIZES = (16, 32, 64, 128, 256)
LATENT_BLOCK = 128  # latent attention: `kernel_block_alignment_size` is at least this
FLASHINFER = (
    "where vllm takes FlashInfer's prefill for gated delta nets (Hopper, Blackwell), blocks are multiples of 64 tokens "
    "and a sequence has one slot more"
)
RING = 16  # --replayssm-buffer-len


@dataclass(frozen=True)
class VllmCache:
    """vLLM's pool of blocks for the layers of one model, on one of `tp` GPUs. Sizes in bytes.

    block_size  tokens that a block is a multiple of: --block-size, or the smallest that the attention kernel takes: 16
                on most GPUs; on a CPU --block-size is 128 by default
    """

    layers: CacheLayers
    options: EngineOptions = DEFAULTS
    tp: int = 1
    block_size: int = 16

    name = "vllm"

    def __post_init__(self) -> None:
        """Raise InputError for options that vLLM does not have for such a model."""
        self.layers.check_tp(self.tp)
        if self.options.replayssm and self.layers.family not in REPLAYSSM:
            raise InputError(f"replayssm: vLLM 0.33 has it for {', '.join(REPLAYSSM)}, not for {self.layers.family}")
        if self.options.replayssm and self.options.spec and self.options.prefix_caching:
            raise InputError("replayssm with spec: vLLM 0.33 takes no prefix caching with them")

    @property
    def state_dtype(self) -> str:
        """Dtype of the recurrent state."""
        field, otherwise = STATE_DTYPE.get(self.layers.family, ("", ""))
        return self.options.state_dtype or self.layers.state_dtype(field) or otherwise or self.layers.dtype

    @property
    def kv_dtype(self) -> str:
        """Dtype of keys and values."""
        return self.options.kv_dtype or self.layers.dtype

    @property
    def page(self) -> int:
        """Bytes that one recurrent layer keeps in a slot: convolution state, recurrent state and ReplaySSM's ring."""
        layer, act = self.layers.layer, CACHE_DTYPES[self.layers.dtype]
        drafts = self.options.spec if layer.groups else 0  # Mamba1's and KDA's convolution states have none for drafts
        conv = (layer.kernel - 1 + drafts) * layer.conv_channels(self.tp) * act
        state = layer.state // self.tp * CACHE_DTYPES[self.state_dtype]
        return conv + state + (self._ring() if self.options.replayssm else 0)

    def _ring(self) -> int:
        """Return the bytes of the last x, dt and B. With drafts it is FlashInfer's, which keeps their inputs, too."""
        layer, act = self.layers.layer, CACHE_DTYPES[self.layers.dtype]
        rows = RING + (1 + self.options.spec if self.options.spec else 0)
        return rows * (layer.channels * act + layer.heads * 4 + layer.bc_channels // 2 * act) // self.tp

    @property
    def kv(self) -> int:
        """Bytes of keys and values of one token in one attention layer."""
        return self.layers.kept(self.tp) * CACHE_DTYPES[self.kv_dtype]

    @property
    def block(self) -> int | None:
        """Tokens of an attention block; None without attention."""
        if not self.layers.attention:
            return None
        align = max(self.block_size, LATENT_BLOCK) if self.layers.latent else self.block_size
        return align * -(-self.page // (align * self.kv))

    @property
    def padded_page(self) -> int:
        """Bytes of a page of every layer."""
        return self.page if self.block is None else self.block * self.kv

    @property
    def padding(self) -> float:
        """Padding of a recurrent layer's page, as a fraction of what it keeps there."""
        return self.padded_page / self.page - 1

    @property
    def group(self) -> int:
        """Layers in a group. The last group of a kind is padded up to it."""
        few, many = sorted((self.layers.attention, self.layers.recurrent))
        return many if many < 1.5 * few or not few else few

    @property
    def attention_groups(self) -> int:
        """Groups of attention layers."""
        return -(-self.layers.attention // self.group)

    @property
    def recurrent_groups(self) -> int:
        """Groups of recurrent layers."""
        return -(-self.layers.recurrent // self.group)

    @property
    def slots(self) -> int:
        """State slots of one sequence in each recurrent group. ReplaySSM needs none for drafts."""
        drafts = 0 if self.options.replayssm else self.options.spec
        if not self.options.prefix_caching:
            return 1 + drafts
        checkpoint = bool(self.layers.layer.groups) and not self.layers.layer.delta  # Mamba2, within a prefill
        return 2 + drafts + int(checkpoint)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one state slot over all recurrent layers, without padding."""
        return self.layers.recurrent * self.page

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: a page of each layer of a group."""
        return self.group * self.padded_page

    def blocks(self, pool: float) -> int:
        """Return the blocks in a pool of so many bytes."""
        return int(pool // self.block_bytes)

    def blocks_per_sequence(self, context: int) -> int:
        """Return the blocks that a sequence of `context` tokens takes."""
        attention = self.attention_groups * -(-context // self.block) if self.block else 0
        return attention + self.recurrent_groups * self.slots

    def concurrency(self, pool: float, context: int) -> float:
        """Return what vLLM prints as "Maximum concurrency"."""
        return self.blocks(pool) / self.blocks_per_sequence(context)

    def tokens(self, pool: float, context: int) -> int:
        """Return what vLLM prints as "KV cache size"; context: its max_model_len."""
        return int(self.concurrency(pool, context) * context)

    def sequences(self, pool: float, context: int) -> int:
        """Return the sequences of `context` tokens that run at once. One block of the pool is the null block."""
        return max(0, self.blocks(pool) - 1) // self.blocks_per_sequence(context)

    def bytes_per_sequence(self, context: int) -> int:
        """Return the bytes of the pool that a sequence takes."""
        return self.blocks_per_sequence(context) * self.block_bytes

    def wasted(self, context: int) -> float:
        """Return the fraction of them that holds nothing: padded pages and groups, and the end of the last block."""
        held = self.layers.attention * context * self.kv + self.slots * self.slot_bytes
        return 1 - held / self.bytes_per_sequence(context)

    def facts(self, pool: float) -> dict[str, Any]:
        """Return the sizes that do not depend on the context, by name."""
        return {
            "state_dtype": self.state_dtype,
            "kv_dtype": self.kv_dtype if self.layers.attention else None,
            "slot_bytes": self.slot_bytes,
            "page_bytes": self.page,
            "block_tokens": self.block,
            "padded_page_bytes": self.padded_page,
            "page_padding": self.padding,
            "layers_per_group": self.group,
            "attention_groups": self.attention_groups,
            "recurrent_groups": self.recurrent_groups,
            "slots_per_sequence": self.slots,
            "block_bytes": self.block_bytes,
            "blocks": self.blocks(pool),
        }

    def at(self, pool: float, context: int) -> dict[str, Any]:
        """Return what depends on the context, by name."""
        return {
            "context": context,
            "bytes_per_sequence": self.bytes_per_sequence(context),
            "wasted": self.wasted(context),
            "blocks_per_sequence": self.blocks_per_sequence(context),
            "concurrency": self.concurrency(pool, context),
            "kv_cache_tokens": self.tokens(pool, context),
            "sequences": self.sequences(pool, context),
        }

    def other_blocks(self) -> list[VllmCache]:
        """Return this cache with other values of --block-size; none without attention."""
        return [replace(self, block_size=size) for size in BLOCK_SIZES] if self.block else []

    def notes(self, pool: float, contexts: tuple[int, ...]) -> list[str]:
        """Describe what else to know."""
        if not self.block:
            return []
        if self.options.prefix_caching:
            gated = self.layers.layer.delta and self.layers.layer.groups
            return [FLASHINFER] if gated else []
        return [
            "vllm turns prefix caching on for hybrids: --prefix-caching counts with it, vLLM's own option "
            "--no-enable-prefix-caching turns it off"
        ]

    def layer_steps(self, context: int) -> list[str]:
        """Describe how many layers a cut must remove before a sequence of `context` tokens takes less memory."""
        lines = []
        for kind in ("recurrent", "attention"):
            count = getattr(self.layers, kind)
            now = self.bytes_per_sequence(context)
            after = {n: self._with(kind, n).bytes_per_sequence(context) for n in range(count - 1, 0, -1)}
            first = next((n for n, size in after.items() if size < now), None)
            more = next((n for n, size in after.items() if size > now), None)
            if first is not None and first < count - 1:
                lines.append(f"of {count} {kind} layers, removing fewer than {count - first} frees nothing")
            if more is not None:
                lines.append(f"{more} of {count} {kind} layers take {after[more] / now - 1:.1%} more than all of them")
        return lines

    def _with(self, kind: str, count: int) -> VllmCache:
        changed: Any = {kind: count}
        return replace(self, layers=replace(self.layers, **changed))
