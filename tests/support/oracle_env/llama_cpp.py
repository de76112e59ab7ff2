"""llama.cpp through ctypes, as much of it as the tests need beside what `bench --engine` decodes with."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "sspruner" / "runtime" / "engines"))

import llama_api
from llama_api import API

FLOAT32 = 0

for name, result, arguments in (
    ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
    ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    ("llama_model_free", None, [ctypes.c_void_p]),
    (
        "llama_tokenize",
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
        + [ctypes.c_bool] * 2,
    ),
):
    getattr(API, name).restype, getattr(API, name).argtypes = result, arguments


class Model:
    """One GGUF file, loaded."""

    def __init__(self, file: str, vocab_only: bool = False) -> None:
        self.model = llama_api.load(file, vocab_only=vocab_only)
        self.vocab = API.llama_model_get_vocab(self.model)
        self.size = API.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        API.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, with BOS and EOS as the file says, special tokens of the text read as such."""
        data = text.encode("utf-8")
        room = (ctypes.c_int32 * (len(data) + 16))()
        n = API.llama_tokenize(self.vocab, data, len(data), room, len(room), special, True)
        return list(room[:n])

    def run(self, prompts: Sequence[Sequence[int]], new: int = 0) -> tuple[list[np.ndarray], list[list[int]]]:
        """Decode all prompts as sequences of one batch, then `new` greedy tokens of all, step by step.

        Returns for each prompt its logits (T, V), and the tokens that follow it.
        """
        total = sum(map(len, prompts))
        # Kimi Linear wants n_ubatch and n_ctx to be multiples of the number of sequences.
        context = llama_api.context(
            self.model, n_ctx=len(prompts) * max(512, 2 * (max(map(len, prompts)) + new)),
            n_seq_max=len(prompts), n_outputs_max_per_seq=0, n_threads=1, n_threads_batch=1, flash_attn_type=0,
            type_k=FLOAT32, type_v=FLOAT32, n_batch=max(total, 2048), n_ubatch=512 * len(prompts),
        )  # fmt: skip
        tokens = [(t, i, s) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)]
        rows = self._decode(context, tokens)
        logits, start = [], 0
        for prompt in prompts:
            logits.append(rows[start : start + len(prompt)])
            start += len(prompt)
        last, made = [rows[-1] for rows in logits], [[] for _ in prompts]
        for step in range(new):
            for s, row in enumerate(last):
                made[s].append(int(row.argmax()))
            last = list(self._decode(context, [(made[s][-1], len(p) + step, s) for s, p in enumerate(prompts)]))
        llama_api.free(context)
        return logits, made

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Decode (token, position, sequence) in one batch: logits (tokens, V)."""
        llama_api.decode(context, [(*token, True) for token in tokens])
        rows = [np.ctypeslib.as_array(API.llama_get_logits_ith(context, i), (self.size,)) for i in range(len(tokens))]
        return np.array(rows)
