"""The vocabulary of a GGUF file: kinds, names of pre-tokenizers, special tokens, and what is refused or warned of."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import sspruner
from sspruner.formats.gguf_pre import MARKS_SPLIT, NAMES, recognised
from sspruner.formats.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from support.gguf_cases import END, by_pre, byte_level, sentencepiece_bpe, unigram


def model(rows: int, ends: Any = None) -> Any:
    """What the writer reads of a model: the rows of its embedding, and the tokens that end a text."""
    embedding = SimpleNamespace(weight=SimpleNamespace(shape=(rows, 4)))
    return SimpleNamespace(get_input_embeddings=lambda: embedding, generation_config=SimpleNamespace(eos_token_id=ends))


def found(tokenizer: Any, more: int = 0, pre: str | None = None, ends: Any = None) -> dict[str, Any]:
    """Return the fields without their prefix."""
    fields = vocabulary(tokenizer, model(len(tokenizer) + more, ends), pre)
    return {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in fields.items()}


@pytest.mark.parametrize("name", NAMES.values())
def test_pre_tokenizers_are_recognised(name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fields = found(by_pre(name))
    assert fields["model"] == "gpt2"
    assert fields["pre"] == name
    assert bool([w for w in said if "combining marks" in str(w.message)]) == (name in MARKS_SPLIT)


def test_the_reference_tokenizer() -> None:
    _, tokenizer = sspruner.load()
    fields = found(tokenizer)
    assert fields["pre"] == "gpt-2"
    assert fields["tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["eos_token_id"] == fields["bos_token_id"] == fields["padding_token_id"] == 0
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (False, False)
    assert fields["token_type"] == [CONTROL] + [NORMAL] * (len(tokenizer) - 1)


def test_an_unknown_pre_tokenizer_is_refused_and_can_be_named() -> None:
    tokenizer = byte_level([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.raises(sspruner.InputError, match=r"is not recognised: .*WhitespaceSplit.*name it .--pre llama-bpe"):
        found(tokenizer)
    assert found(tokenizer, pre="my-pre")["pre"] == "my-pre"
    prefix = byte_level([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    with pytest.raises(sspruner.InputError, match="is not recognised"):
        found(prefix)


def test_whole_words_first_is_another_pre_tokenizer() -> None:
    """llama.cpp ties to the name whether whole words are looked up before merging."""
    steps = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert recognised(steps, False) == "gpt-2"
    assert recognised(steps, True) == ""


def test_unused_added_and_padding_tokens() -> None:
    tokenizer = by_pre("gpt-2")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    n = len(tokenizer)
    fields = found(tokenizer, more=2)
    assert fields["tokens"][-4:] == ["<tool>", "<pad>", f"[PAD{n}]", f"[PAD{n + 1}]"]
    assert fields["token_type"][-4:] == [USER_DEFINED, CONTROL, UNUSED, UNUSED]
    assert fields["padding_token_id"] == n - 1
    with pytest.raises(sspruner.InputError, match=f"has the token {n - 1}, and the embedding has {n - 1} rows"):
        found(tokenizer, more=-1)


def test_ends_of_text() -> None:
    """Those of the generation config come first; a tokenizer without any would get llama.cpp's own."""
    tokenizer = by_pre("gpt-2")
    fields = found(tokenizer, ends=[5, 7])
    assert [fields[f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [5, 7, tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match="stops at 3 tokens by id"):
        found(tokenizer, ends=[5, 6, 7])
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(sspruner.InputError, match="no end-of-text token"):
        found(without)
    assert found(without, ends=3)["bos_token_id"] == 3


def test_added_bos_and_eos() -> None:
    tokenizer = by_pre("gpt-2")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 0)])
    fields = found(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END))
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (True, True)
    backend.post_processor = processors.TemplateProcessing(single=f"{END} {END} $A", special_tokens=[(END, 0)])
    with pytest.raises(sspruner.InputError, match=r"llama.cpp adds BOS and EOS alone"):
        found(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END))


def test_chat_template() -> None:
    tokenizer = by_pre("gpt-2")
    assert "chat_template" not in found(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert found(tokenizer)["chat_template"] == "{{ messages }}"


def test_sentencepiece_bpe() -> None:
    fields = found(sentencepiece_bpe())
    assert (fields["model"], fields["pre"], fields["add_space_prefix"], fields["add_bos_token"]) == (
        "llama", "default", True, True,
    )  # fmt: skip
    assert fields["token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert "merges" not in fields
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    assert scores["▁the"] > scores["▁a"] > scores["a"], "what is merged first has the highest score"
    assert not found(sentencepiece_bpe(prefix=False))["add_space_prefix"]


def test_merges_that_no_scores_express() -> None:
    """Without one of the merges of a token, llama.cpp would still merge its parts."""
    tokenizer = sentencepiece_bpe()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["merges"] = [m for m in data["model"]["merges"] if m != ["▁t", "he"]]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="</s>", bos_token="<s>"
    )
    with pytest.raises(sspruner.InputError, match="are not SentencePiece's"):
        found(other)


def test_unigram() -> None:
    with pytest.warns(UserWarning, match="puts a space before every text"):
        fields = found(unigram())
    assert (fields["model"], fields["add_space_prefix"], fields["remove_extra_whitespaces"]) == ("t5", True, False)
    assert fields["token_type"][0] == UNKNOWN
    assert all(score <= 0 for score in fields["scores"])


def test_other_kinds_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(sspruner.InputError, match="a tokenizer of type WordLevel is not written"):
        found(PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END))
    lower = by_pre("gpt-2").backend_tokenizer
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(sspruner.InputError, match=r"llama.cpp's BPE has no Lowercase"):
        found(PreTrainedTokenizerFast(tokenizer_object=lower, eos_token=END))
    lower.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match="does not normalise text"):
        found(PreTrainedTokenizerFast(tokenizer_object=lower, eos_token=END))
    with pytest.raises(sspruner.InputError, match="is no fast tokenizer"):
        vocabulary(SimpleNamespace(), model(3), None)
    with pytest.raises(sspruner.InputError, match="--pre gpt-2: pre-tokenizers have names for byte-level BPE alone"):
        found(unigram(), pre="gpt-2")
