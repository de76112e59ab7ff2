"""Passkey retrieval, generated on the spot: a number said once in a long dull text has to be said again at its end.

    There is an important number hidden in a lot of irrelevant text. Find it and remember it.
    The grass is green. The sky is blue. ... The pass key is 51423. Remember it. The grass is green. ...
    What is the pass key? The pass key is 51423

The number is given (teacher forcing): asked is how likely its tokens are, and whether each is the likeliest. `depth`
is the share of the filler that stands before the sentence with the number: 0 is the farthest from the question.
Task: Mohtashami and Jaggi, arXiv 2305.16300; here the number is said once, not twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sspruner.errors import InputError
from sspruner.evaluation.last_word import Passage, passages

BEGIN = "There is an important number hidden in a lot of irrelevant text. Find it and remember it.\n"
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "The pass key is {key}. Remember it."
QUESTION = "\nWhat is the pass key? The pass key is {key}"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 10_000, 100_000  # five digits


def passkeys(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float] = DEPTHS, count: int = 2, seed: int = 0
) -> list[Passage]:
    """`count` passages of each length and depth, in this order; `last_word.last_words` asks for their numbers.

    lengths: tokens of a passage, at most: as many sentences of filler as fit. Raises InputError where not one fits.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for length in lengths:
        sentences = _fitting(tokenizer, length)
        for depth in depths:
            for _ in range(count):
                key = int(torch.randint(*KEYS, (), generator=generator))
                texts.append(passkey_text(sentences, depth, key))
    return passages(tokenizer, texts, max_length=max(lengths))


def passkey_text(sentences: int, depth: float, key: int) -> str:
    """One passage with so many sentences of filler, `depth` of them, rounded, before the one with the key."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    filler.insert(round(depth * sentences), NEEDLE.format(key=key))
    return BEGIN + " ".join(filler) + QUESTION.format(key=key)


def _fitting(tokenizer: Any, length: int) -> int:
    """The most sentences of filler with which a passage has at most `length` tokens, whatever its key and depth."""

    def fits(sentences: int) -> bool:
        """Wherever the needle stands. Digits may be merged: several keys are tried, and one token is spared."""
        widest = max(
            len(tokenizer(passkey_text(sentences, depth, key), add_special_tokens=False)["input_ids"])
            for depth in (0, 0.5, 1)
            for key in (10_000, 57_938)
        )
        return widest < length

    if not fits(1):
        raise InputError(f"passkey: {length} tokens are too few for the question and one sentence of filler")
    least, most = 1, max(2, length)  # the answer lies in [least, most)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
