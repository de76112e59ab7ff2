"""Load the models that a benchmark names: folders, hub ids, and published shapes with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sspruner.benchmarking.shapes import DTYPES, STATE, shape_config, shape_models
from sspruner.compute.device import resolve_device
from sspruner.errors import InputError
from sspruner.io.load import load
from sspruner.io.source import name_of
from sspruner.recipes.texts import known_dtype


def named_models(
    models: Sequence[str],
    shapes: Sequence[str] = (),
    keep: Sequence[int] = (),
    balanced: Sequence[int] = (),
    *,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the models that the command line names, then its shapes; the reference model if there is none.

    dtype "auto" is bfloat16 for shapes on a GPU, float32 on the CPU. Raises InputError for duplicates.
    """
    if len(set(models)) < len(models) or len(set(shapes)) < len(shapes):
        raise InputError("a model is named twice; once is enough, for all are measured in turns")
    target_device = resolve_device(device)
    known_dtype(dtype, "dtype")
    for shape in shapes:
        for size in (STATE, *keep, *balanced):
            shape_config(shape, size)
    loaded = {}
    names: list[str | None] = [*models] or ([] if shapes else [None])
    for model in names:
        loaded_model, _ = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
        label = name_of(model)
        loaded[str(model) if label in loaded else label] = loaded_model
    precision = "bfloat16" if target_device.type == "cuda" else "float32"
    chosen_dtype = DTYPES[precision if dtype == "auto" else dtype]
    return loaded | shape_models(shapes, keep, balanced, dtype=chosen_dtype, device=target_device, seed=seed)
