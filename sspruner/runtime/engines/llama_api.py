"""llama.cpp's C API through ctypes, from the library in the package xllamacpp: what decoding on a CPU needs.

The offsets of the parameters' fields are those of xllamacpp 2026.10.11549; `defaults` raises if a default value is not
where it should be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

API = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
SIZE = 512  # bytes, more than either struct has
# name -> (offset, default); all are 32 bits wide
CONTEXT = {
    "n_ctx": (0, 512), "n_batch": (4, 2048), "n_ubatch": (8, 512), "n_seq_max": (12, 1),
    "n_outputs_max_per_seq": (24, 1), "n_threads": (28, 4), "n_threads_batch": (32, 4), "flash_attn_type": (52, -1),
    "type_k": (104, 1), "type_v": (108, 1),
}  # fmt: skip
MODEL = {"n_gpu_layers": (16, -1), "split_mode": (20, 1)}
VOCAB_ONLY = 72  # of the model's parameters, one byte


class Parameters(ctypes.Structure):
    """Parameters of a model or a context, as bytes."""

    _fields_ = [("bytes", ctypes.c_uint8 * SIZE)]


class Batch(ctypes.Structure):
    """llama_batch."""

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
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32

for _name, _result, _arguments in (
    ("llama_model_default_params", Parameters, []),
    ("llama_context_default_params", Parameters, []),
    ("llama_model_load_from_file", _POINTER, [ctypes.c_char_p, Parameters]),
    ("llama_init_from_model", _POINTER, [_POINTER, Parameters]),
    ("llama_batch_init", Batch, [_INT] * 3),
    ("llama_batch_free", None, [Batch]),
    ("llama_decode", _INT, [_POINTER, Batch]),
    ("llama_synchronize", None, [_POINTER]),
    ("llama_free", None, [_POINTER]),
    ("llama_log_set", None, [Log, _POINTER]),
):
    getattr(API, _name).restype, getattr(API, _name).argtypes = _result, _arguments
API.llama_log_set(_log, None)


def defaults(function: str, fields: dict[str, tuple[int, int]], **values: int) -> Parameters:
    """Return the default parameters with some values set. Raises RuntimeError for another layout of the struct."""
    parameters = getattr(API, function)()
    for field, (offset, default) in fields.items():
        at = ctypes.c_int32.from_buffer(parameters, offset)
        if at.value != default:
            raise RuntimeError(f"{field} is not at byte {offset} of {function}: {at.value} there, not {default}")
        if field in values:
            at.value = values[field]
    return parameters  # type: ignore[no-any-return]


def load(file: str, *, vocab_only: bool = False) -> Any:
    """Return the model of a GGUF file, in the processor's memory. Raises RuntimeError with llama.cpp's reason."""
    LOG.clear()
    parameters = defaults("llama_model_default_params", MODEL, n_gpu_layers=0)
    parameters.bytes[VOCAB_ONLY] = vocab_only
    model = API.llama_model_load_from_file(file.encode(), parameters)
    if not model:
        raise RuntimeError(reason())
    return model


def context(model: Any, **values: int) -> Any:
    """Return a context of a model. values: fields of CONTEXT. Raises RuntimeError with llama.cpp's reason."""
    LOG.clear()
    made = API.llama_init_from_model(model, defaults("llama_context_default_params", CONTEXT, **values))
    if not made:
        raise RuntimeError(reason())
    return made


def decode(context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
    """Decode a batch of (token, position, sequence, whether its logits are wanted), and wait for it."""
    batch = API.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        status = API.llama_decode(context, batch)
        API.llama_synchronize(context)
    finally:
        API.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}: {reason()}")


def reason() -> str:
    """Return the last lines that llama.cpp logged, as one."""
    return " ".join("".join(LOG[-4:]).split())


def free(context: Any) -> None:
    """Free a context."""
    API.llama_free(context)
