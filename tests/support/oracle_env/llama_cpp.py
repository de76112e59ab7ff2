"""llama.cpp through ctypes: the C API that the library of xllamacpp exports, as much of it as the tests need.

The offsets of the parameters' fields are those of xllamacpp 2026.10.11549; `defaults` stops if a default value is not
where it should be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

API = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
SIZE = 512  # bytes, more than either struct has
FLOAT32 = 0
# name -> (offset, default); all are 32 bits wide
CONTEXT = {
    "n_ctx": (0, 512), "n_batch": (4, 2048), "n_ubatch": (8, 512), "n_seq_max": (12, 1),
    "n_outputs_max_per_seq": (24, 1), "n_threads": (28, 4), "n_threads_batch": (32, 4), "flash_attn_type": (52, -1),
    "type_k": (104, 1), "type_v": (108, 1),
}  # fmt: skip
MODEL = {"n_gpu_layers": (16, -1), "split_mode": (20, 1)}
VOCAB_ONLY = 72  # of the model's parameters, one byte


class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * SIZE)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LOG: list[str] = []
_log = Log(lambda level, text, data: LOG.append(text.decode("utf-8", "replace")))

for name, result, arguments in (
    ("llama_model_default_params", Parameters, []),
    ("llama_context_default_params", Parameters, []),
    ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Parameters]),
    ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, Parameters]),
    ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
    ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
    ("llama_batch_init", Batch, [ctypes.c_int32] * 3),
    ("llama_batch_free", None, [Batch]),
    ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    ("llama_free", None, [ctypes.c_void_p]),
    ("llama_model_free", None, [ctypes.c_void_p]),
    ("llama_log_set", None, [Log, ctypes.c_void_p]),
    (
        "llama_tokenize",
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
        + [ctypes.c_bool] * 2,
    ),
):
    getattr(API, name).restype, getattr(API, name).argtypes = result, arguments
API.llama_log_set(_log, None)


def defaults(function: str, fields: dict[str, tuple[int, int]], **values: int) -> Parameters:
    """Return the default parameters with some values set."""
    parameters = getattr(API, function)()
    for field, (offset, default) in fields.items():
        at = ctypes.c_int32.from_buffer(parameters, offset)
        assert at.value == default, f"{field} is not at byte {offset} of {function}: {at.value} there, not {default}"
        if field in values:
            at.value = values[field]
    return parameters


class Model:
    """One GGUF file, loaded."""

    def __init__(self, file: str, vocab_only: bool = False) -> None:
        LOG.clear()
        parameters = defaults("llama_model_default_params", MODEL, n_gpu_layers=0)
        parameters.bytes[VOCAB_ONLY] = vocab_only
        self.model = API.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            raise RuntimeError("".join(LOG[-12:]))
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
        parameters = defaults(
            "llama_context_default_params", CONTEXT, n_ctx=max(512, 2 * len(prompts) * (max(map(len, prompts)) + new)),
            n_seq_max=len(prompts), n_outputs_max_per_seq=0, n_threads=1, n_threads_batch=1, flash_attn_type=0,
            type_k=FLOAT32, type_v=FLOAT32, n_batch=max(total, 2048),
        )  # fmt: skip
        context = API.llama_init_from_model(self.model, parameters)
        if not context:
            raise RuntimeError("".join(LOG[-12:]))
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
        API.llama_free(context)
        return logits, made

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Decode (token, position, sequence) in one batch: logits (tokens, V)."""
        batch = API.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 1
            batch.seq_id[i][0] = sequence
        status = API.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}: {''.join(LOG[-12:])}")
        rows = [np.ctypeslib.as_array(API.llama_get_logits_ith(context, i), (self.size,)) for i in range(len(tokens))]
        copied = np.array(rows)
        API.llama_batch_free(batch)
        return copied
