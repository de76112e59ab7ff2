"""Models that GGUF can say, uniform cuts of them, and tokenizers of every kind that llama.cpp has."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sspruner
from sspruner.formats import gguf_pre
from sspruner.graph.group import DependencyGroup
from sspruner.plans.plan import Plan
from sspruner.testing.plans import selection
from support.zoo import zoo

# Without biases of in_proj, for which GGUF has no place; the last field names the variant. Delta rules with as many key
# as value channels, and KDA with as many heads as attention.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba, no convolution bias": ("mamba", {"conv_bias": False}),
    "falcon_mamba": ("falcon_mamba", {}),
    "mamba2": ("mamba2", {}),
    "mamba2, tied": ("mamba2", {"tie_word_embeddings": True, "groups": 1}),
    "jamba, experts": ("jamba", {"kv": 1}),
    "jamba, tied": ("jamba", {"kv": 1, "experts": 1, "tie_word_embeddings": True}),
    "bamba, partial rotary": ("bamba", {"attention_bias": True, "mlp_bias": True}),
    "granite, rope and experts": ("granitemoehybrid", {"tie_word_embeddings": True}),
    "granite, no rope": ("granitemoehybrid", {"experts": 0, "position_embedding_type": None}),
    "falcon_h1, norm": ("falcon_h1", {"mamba_norm_before_gate": False, "attention_bias": False}),
    "falcon_h1, tied": ("falcon_h1", {"mamba_rms_norm": False, "tie_word_embeddings": True, "attention_bias": False}),
    "nemotron_h": ("nemotron_h", {"layers": "M-AM"}),
    "nemotron_h, groups of experts": ("nemotron_h", {"layers": "MEAME"}),
    "nemotron_h, experts": ("nemotron_h", {"layers": "MEAM", "moe_latent_size": None, "n_group": 1, "topk_group": 1}),
    "qwen3_5": ("qwen3_5_text", {"channels": 6, "heads": 3}),
    "qwen3_5, tied": ("qwen3_5_text", {"channels": 6, "heads": 1, "kv": 1, "tie_word_embeddings": True}),
    "qwen3_5, experts": ("qwen3_5_moe_text", {"channels": 6}),
    "qwen3_next, experts": ("qwen3_next", {"channels": 6, "heads": 3, "experts": 3}),
    "kimi_linear, experts": ("kimi_linear", {"heads": 4, "q_lora_rank": None, "rms_norm_eps": 1e-6}),
    "bailing_hybrid, experts": ("bailing_hybrid", {"heads": 4}),
}
# Axes that llama.cpp takes with another one alone.
TIED = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), ("state", "head_dim")),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), ("state", "head_dim", "head", "attn_head", "mlp")),
}
# Cuts that change the number of channels or the hidden size alone: llama.cpp builds twice the hidden size in these.
TWICE = ("mamba", "falcon_mamba", "jamba", "bamba", "granitemoehybrid")
CHANNELS = ("channel", "head", "head_dim", "group", "hidden")


def variant(name: str, seed: int = 0) -> PreTrainedModel:
    family, fields = VARIANTS[name]
    return zoo(family, seed=seed, **({"bias": False} | fields))


def cut(model: PreTrainedModel, *axes: str, seed: int = 7) -> PreTrainedModel:
    """Cut some axes in every layer to the same size: half of the units, other ones in each layer and group."""
    for axis in axes:
        groups = sspruner.trace(model).on_axis(axis)
        kept = {name: _fewer(group) for name, group in groups.items()}
        plan = {name: selection(g.groups, g.units, kept[name], seed + i) for i, (name, g) in enumerate(groups.items())}
        model = sspruner.apply(model, Plan(plan))
    return model


def _fewer(group: DependencyGroup) -> int:
    return min(group.counts(), key=lambda n: (abs(n - group.units // 2), n))


def axes_of(name: str) -> list[str]:
    """Return the axes of a variant that can be cut alone."""
    family, graph = VARIANTS[name][0], sspruner.trace(variant(name))
    alone = [axis for axis in graph.axes if axis not in ("weight", "decay", "mixer")]
    alone = [axis for axis in alone if not (family in TWICE and axis in CHANNELS)]
    several = [axis for axis in alone if all(g.counts() for g in graph.on_axis(axis).values())]
    several = [axis for axis in several if axis not in TIED.get(family, ())]
    if name == "jamba, experts":  # its dense MLPs have the experts' width
        several = [axis for axis in several if axis not in ("mlp", "expert_mlp")]
    return [axis for axis in several if not ("experts" in name and axis == "block")]  # a block of experts may not go


TEXT = (
    "The quick brown fox jumps over the lazy dog, isn't it? It's 1234567 o'clock; WE'VE seen 42 cafés.\n\n"
    "def main(x):\n    return x**2 + 3.14\n\t# naïve — “quoted” … 東京 and Москва, नमस्ते 😀👍🏽 e\u0301\r\n  end  "
)
HOSTILE = [
    "", " ", "  two  spaces  ", "a", "I'll we'd THEY'RE 'tis", "3.14 1,000,000 ²³ ⅓ ٣٤", "tabs\tand\nlines\r\n\r\n x",
    "東京タワー", "Привет, мир!", "नमस्ते दुनिया", "e\u0301\u0301 ñ", "😀👍🏽", "\u00a0nbsp\u2003em",
    "CamelCaseWords and snake_case", "<|endoftext|> in the middle <|endoftext|>", "$100 + 50% = <b>x</b> ~`^|",
    "/path/to//file\n/x", TEXT,
]  # fmt: skip
END = "<|endoftext|>"


def byte_level(steps: list[Any], ignore_merges: bool = False, size: int = 600) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with these pre-tokenizers, of which the last is the byte level."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, *HOSTILE] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def _split(regex: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def by_pre(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose pre-tokenizer has this name in llama.cpp."""
    expressions = {
        "llama-bpe": (gguf_pre.LLAMA3, True), "dbrx": (gguf_pre.LLAMA3, False), "qwen2": (gguf_pre.QWEN2, False),
        "qwen35": (gguf_pre.QWEN35, False), "tekken": (gguf_pre.TEKKEN, True), "gpt-4o": (gguf_pre.GPT4O, False),
    }  # fmt: skip
    if name in expressions:
        regex, ignore_merges = expressions[name]
        return byte_level(_split(regex), ignore_merges)
    if name == "starcoder":
        return byte_level([pre_tokenizers.Digits(individual_digits=True), _words()])
    if name == "falcon":
        digits = pre_tokenizers.Digits(individual_digits=False)
        three = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
        return byte_level([pre_tokenizers.Punctuation("contiguous"), _words(), digits, three])
    assert name == "gpt-2"
    return byte_level([_words()])


def sentencepiece_bpe(prefix: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return BPE in SentencePiece's form: pieces with scores, from which come all merges, and bytes to fall back on."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁the", "▁th", "he", "▁t", "th", "er", "▁quick", "ui", "ck", "qu", "▁qui", "uick", "ing", "in", "▁a", "an"]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyzTI,.'"))
    ordered = [w for w in words if _makeable(w, {*words, *letters})]
    vocab = {piece: i for i, piece in enumerate([*pieces, *ordered, *letters])}
    merges = [(w[:i], w[i:]) for w in ordered for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps]) if prefix else steps[0]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def _makeable(word: str, known: set[str]) -> bool:
    return any(word[:i] in known and word[i:] in known for i in range(1, len(word)))


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def multimodal() -> Any:
    """Return a tiny Qwen3.5 with a vision part."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = variant("qwen3_5").config.to_dict()
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 24}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config)
