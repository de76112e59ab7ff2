"""Names of llama.cpp's pre-tokenizers, found by the steps of a tokenizer's own.

llama.cpp has the regular expressions in its source, under names (src/llama-vocab.cpp of ggml-org/llama.cpp). Its
converter finds the name by a hash of the tokens of one text, so it knows tokenizers of published models alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASCII_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FIRST = r"[^\r\n\p{L}\p{N}]?"
SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = rf"{ASCII_SUFFIX}|{FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ASCII_SUFFIX}|{FIRST}\p{{L}}+|\p{{N}}|{REST}"
QWEN35 = (
    rf"{ASCII_SUFFIX}|{FIRST}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{FIRST}{UPPER}*{LOWER}+|{FIRST}{UPPER}+{LOWER}*|\p{{N}}|{SLASH}"
GPT4O = rf"{FIRST}{UPPER}*{LOWER}+{ASCII_SUFFIX}?|{FIRST}{UPPER}+{LOWER}*{ASCII_SUFFIX}?|\p{{N}}{{1,3}}|{SLASH}"

Steps = tuple[str, ...]
NAMES: dict[tuple[Steps, bool], str] = {  # (steps, whether whole words are looked up before merging) -> name
    (("gpt2",), False): "gpt-2",
    (("digit", "gpt2"), False): "starcoder",
    (("punctuation", "gpt2", "digits", "[0-9][0-9][0-9]"), False): "falcon",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}

MARKS_SPLIT = (
    "tekken",
    "gpt-4o",
)  # llama.cpp's expressions for these lack \p{M}: measured, tests/engines/test_llama.py


def recognised(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """Return llama.cpp's name of a pre-tokenizer, as tokenizer.json describes it; "" if there is none."""
    steps = [_step(part) for part in parts(pre_tokenizer)]
    return NAMES.get((tuple(step for step in steps if step), ignore_merges), "")


def parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the members of a sequence in tokenizer.json, one after the other."""
    if step is None:
        return []
    inner = step.get("pretokenizers", step.get("normalizers"))
    return [step] if inner is None else [part for member in inner for part in parts(member)]


def _step(part: Mapping[str, Any]) -> str:
    """Return one step as text: a regular expression, a name of its own for the built-in ones, "" for none."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "gpt2" if part.get("use_regex", True) else ""
    if kind == "Split" and "Regex" in part["pattern"]:
        isolated = part["behavior"] == "Isolated" and not part["invert"]
        matched = part["behavior"] == "Removed" and part["invert"]  # the same where every character is matched
        return str(part["pattern"]["Regex"]) if isolated or matched else f"unknown {part}"
    if kind == "Digits":
        return "digit" if part["individual_digits"] else "digits"
    if kind == "Punctuation" and part["behavior"] == "Contiguous":
        return "punctuation"
    return f"unknown {part}"
