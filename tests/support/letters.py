"""A tokenizer with a token for each letter, for the tiny models' vocabulary."""

from __future__ import annotations

from typing import Any

from support.tiny import VOCABULARY


class Letters:
    """Tokenizer of characters, modulo the vocabulary; 0 ends a text."""

    eos_token_id: int | None = 0

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [self.ids(text) for text in texts]}

    def ids(self, text: str) -> list[int]:
        return [1 + ord(letter) % (VOCABULARY - 1) for letter in text]
