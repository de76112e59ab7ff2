"""Export gguf: one file for llama.cpp, written with the package gguf and no converter.

The parts of the model, under names common to all families, are in gguf_blocks.py; fields and what llama.cpp cannot
build in gguf_fields.py; names and values of the tensors in gguf_tensors.py; delta rules in gguf_delta.py, attention
in gguf_attention.py; the one epsilon in gguf_epsilon.py; the vocabulary in gguf_tokenizer.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sspruner.errors import InputError, ModelError, Remark, install
from sspruner.formats.gguf_blocks import Parts, parts
from sspruner.formats.gguf_epsilon import Epsilons, check_difference, epsilons
from sspruner.formats.gguf_fields import cuts, fields
from sspruner.formats.gguf_options import BLOCK, FILE, GGUF
from sspruner.formats.gguf_tensors import ALWAYS_F32, tensors
from sspruner.formats.gguf_tokenizer import vocabulary
from sspruner.formats.gguf_weights import Weights
from sspruner.graph.trace import trace

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
QUANTISED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
ENDS = ("token_embd.weight", "output.weight")  # of at least 8 bits: what is lost there is lost for every token
LARGEST_F16 = 65504.0


def write_gguf(model: Any, folder: Path, tokenizer: Any, options: GGUF) -> None:
    """Write `model` and its tokenizer to the file model.gguf in `folder`.

    Raises InputError without the package gguf and for a tokenizer that is not recognised, ModelError for a model that
    llama.cpp does not build or does not compute. Warns of what it computes a little differently.
    """
    package = gguf_package()
    described, chosen = check_gguf(model)
    tokens = vocabulary(tokenizer, model, options.pre)
    if remark := check_difference(model, described, chosen):
        warnings.warn(remark, Remark, stacklevel=3)
    kind = options.type or DTYPES.get(model.dtype, "f32")
    out = package.GGUFWriter(folder / FILE, described.architecture)
    try:
        general = {"general.type": "model", "general.file_type": _file_type(package, kind)}
        if kind in QUANTISED:
            general["general.quantization_version"] = package.GGML_QUANT_VERSION
        architecture = {f"{described.architecture}.{n}": v for n, v in fields(described, chosen.one).items()}
        _add_fields(out, package, general | architecture | tokens | cuts(model))
        _add_tensors(out, package, described, chosen, kind)
    finally:
        out.close()


def check_gguf(model: Any) -> tuple[Parts, Epsilons]:
    """Return a model's parts and epsilons. Raises ModelError for what llama.cpp cannot build.

    The model may be on the meta device: then a parameter without a place in the file counts as one that is not zero.
    """
    if any(site.layout.is_projected for site in trace(model).layers):
        raise ModelError("gguf: llama.cpp has no projected states (--basis balanced); prune with --basis select")
    described = parts(model)
    chosen = epsilons(described)
    fields(described, chosen.one)
    weights = Weights()
    for _ in tensors(described, chosen, weights):
        pass
    if left := weights.unread(model):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ModelError(f"gguf: llama.cpp has no place for {left[0]}{more} in models of type {described.kind}")
    return described, chosen


def gguf_difference(model: Any) -> str:
    """Return why llama.cpp cannot build a model, which may be on the meta device; "" if it can."""
    try:
        check_gguf(model)
    except ModelError as error:
        return str(error)
    return ""


def gguf_package() -> Any:
    """Import the package gguf. Raises InputError if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"export --to gguf needs the package gguf: {install('gguf')}") from error
    return gguf


def element_type(name: str, shape: torch.Size, kind: str) -> str:
    """Return the element type of a tensor: f32 for vectors and what llama.cpp wants in it, else `kind`.

    Rows that are no multiple of 32 cannot be quantised, and are f16.
    """
    if len(shape) < 2 or name.endswith(ALWAYS_F32):
        return "f32"
    if kind in QUANTISED:
        if shape[-1] % BLOCK:
            return "f16"
        return "q8_0" if name in ENDS else kind
    return kind


def _add_fields(out: Any, package: Any, values: Mapping[str, Any]) -> None:
    """Add fields in GGUF's types: uint32, float32, bool, string, and arrays."""
    types = package.GGUFValueType
    for name, value in values.items():
        if isinstance(value, list | bytes):
            out.add_array(name, value)
        else:
            kind = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}[type(value)]
            out.add_key_value(name, value, kind)


def _add_tensors(out: Any, package: Any, described: Parts, chosen: Epsilons, kind: str) -> None:
    """Write the header and all tensors. Two passes, so that one tensor at a time is in memory."""
    types, plain = {}, 0
    for name, tensor in tensors(described, chosen, Weights()):
        types[name] = element_type(name, tensor.shape, kind)
        plain += kind in QUANTISED and types[name] == "f16"
        stored = package.GGMLQuantizationType[types[name].upper()]
        block, size = package.GGML_QUANT_SIZES[stored]
        out.add_tensor_info(name, list(tensor.shape), torch.float32, tensor.numel() // block * size, raw_dtype=stored)
    if plain:
        warnings.warn(
            f"{plain} matrices are f16, not {kind}: their rows are no multiple of {BLOCK} long", Remark, stacklevel=4
        )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for name, tensor in tensors(described, chosen, Weights()):
        if types[name] == "f16" and float(tensor.abs().max()) > LARGEST_F16:
            raise ModelError(f"gguf: {name} has values beyond the range of f16; use --gguf-type bf16 or f32")
        values = tensor.cpu().contiguous().numpy()
        out.write_tensor_data(package.quants.quantize(values, package.GGMLQuantizationType[types[name].upper()]))


def _file_type(package: Any, kind: str) -> int:
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(package.LlamaFileType[name])
