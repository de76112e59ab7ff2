"""Load a model: a reference model, a Hugging Face folder or hub id, or one that sspruner or mamba_ssm saved."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sspruner.calibrate.seen import read_seen
from sspruner.compute.finite import check_finite
from sspruner.compute.processes import world
from sspruner.errors import InputError, ModelError
from sspruner.formats.checkpoint import tensor_names, wide_tensors
from sspruner.formats.native import read_native
from sspruner.formats.sizes import check_counts
from sspruner.graph.causality import not_causal
from sspruner.io.adapters import holds_adapter
from sspruner.io.placement import check_device_map
from sspruner.io.source import (
    brief,
    cached_folder,
    cannot,
    check_folder,
    finish_cut,
    is_local,
    model_class_of,
    reference_folder,
    watched_init,
    weight_bytes_in,
    weights_in,
)
from sspruner.recipes.texts import known_dtype
from sspruner.surgery.record import recorded, restore_stock, take_subfolder

GENERATION = "generation_config.json"
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # before the names of what DataParallel and others save

logger = logging.getLogger(__name__)


# Nine parameters: the public door for models from everywhere; each belongs to the model or the machine, none to a cut.
def load(
    model: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    offload: str | Path | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    merge_adapters: bool = False,
    causal: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a folder, a hub id, or a reference model: by its name, or without an argument.

    The model is on the CPU in eval mode. A native checkpoint of mamba_ssm is loaded as transformers' model with the
    same numbers. The tokenizer is None if there is none. A model that fits in one place is loaded as without a device
    map.

    tokenizer   folder or hub id of a tokenizer; by default the model's own
    dtype       "auto" (as saved), "float32", "bfloat16" or "float16"
    offload     folder for working files; the weights of the model's blocks then stay on disk, and are read one block
                at a time (docs/offload.md)
    device_map  "auto" distributes blocks over GPUs, memory and disk, up to max_memory (bytes by place), like
                accelerate; or a mapping from modules to places
    merge_adapters  merge the adapter (peft) that the folder holds into its base model; otherwise it is refused
    causal      False for a model that is meant to look ahead (bidirectional): its mixers are then not checked

    Raises InputError for a wrong path or place, ModelError for a model that is incomplete, corrupt, or has NaN or
    infinite weights.
    """
    where = str(reference_folder(model) or model)
    native = None
    if is_local(where):
        where = str(Path(where).expanduser())
        if merge_adapters and holds_adapter(Path(where)):
            apart = offload is not None or device_map is not None
            merged_model, its_tokenizer = _with_adapter(where, tokenizer, dtype, apart, trust_remote_code)
            return merged_model if causal else not_causal(merged_model), its_tokenizer
        native = check_folder(Path(where))
    known_dtype(dtype, "dtype")
    check_device_map(device_map, max_memory)
    loaded = None
    if offload is not None or device_map is not None:
        if world() > 1:
            what = "offload" if device_map is None else "device_map"
            raise InputError(f"{what} works in one process, not in {world()}: start it without torchrun")
        folder = None if offload is None else Path(offload)
        loaded = _apart(where, dtype, folder, device_map, max_memory, trust_remote_code)
    if loaded is None:
        loaded = _native(where, native, dtype) if native else _transformers(where, dtype, trust_remote_code)
        check_finite(loaded, where)
    if is_local(where):
        read_seen(loaded, Path(where))
    loaded_tokenizer = _tokenizer(
        str((tokenizer and reference_folder(tokenizer)) or tokenizer or where), trust_remote_code
    )
    if tokenizer and loaded_tokenizer is None:
        raise InputError(f"tokenizer {tokenizer}: there is none in this folder")
    return (loaded if causal else not_causal(loaded)).eval(), loaded_tokenizer


def _with_adapter(where: str, tokenizer: Any, dtype: str, apart: bool, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load an adapter's base model, merge the adapter, and load its tokenizer, or the base model's."""
    from sspruner.io.adapters import base_of, merged

    if apart:
        raise InputError(
            f"model {where}: an adapter is merged in memory: load it without offload, save it, and load that"
        )

    def load_base(name: str) -> Any:
        return load(name, dtype=dtype, trust_remote_code=trust_remote_code)[0]

    model = merged(where, load_base)
    check_finite(model, where)
    own = where if any(Path(where).glob("*token*")) else base_of(where)
    return model, _tokenizer(str(tokenizer or own), trust_remote_code)


def _native(where: str, data: dict[str, Any], dtype: str) -> Any:
    """Load a checkpoint of mamba_ssm into transformers' classes."""
    check_counts(data)
    config, weights = read_native(Path(where), data)
    model_class = model_class_of(config)
    try:
        wide = _saved_wide(Path(where), dtype)
        with watched_init(model_class, [], f"model {where}", weight_bytes_in(Path(where)), wide):
            loaded, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ModelError:
        raise
    except Exception as error:  # as below
        raise ModelError(f"model {where}: cannot be loaded: {brief(error)}") from error
    _check_complete(where, info, cut=True)
    if (Path(where) / GENERATION).is_file():  # written by our export, not by mamba_ssm
        loaded.generation_config = _generation(where)
    return loaded


def _generation(where: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(where)
    except Exception as error:  # as below
        raise ModelError(f"model {where}: {GENERATION} cannot be read: {brief(error)}") from error


def _transformers(where: str, dtype: str, trust_remote_code: bool) -> Any:
    """Load a model that transformers knows, with the cuts that its config records."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    try:
        check_counts(PreTrainedConfig.get_config_dict(where)[0])
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise many types for a bad config or name
        missing = "" if is_local(where) else "no folder of that name is here, and as a hub id its "
        raise cannot(error, f"model {where}: {missing}config cannot be read", trust_remote_code) from error
    try:
        cut = copy.deepcopy(config)
        cuts = recorded(config)
        folder = take_subfolder(config)
        restore_stock(config)  # the original model is built, then cut
        size, wide, model_class = None, set[str](), model_class_of(config, where, trust_remote_code)
        if is_local(where):
            folder = weights_in(Path(where))
            size = weight_bytes_in(Path(where) / folder)
            wide = _saved_wide(Path(where) / folder, dtype)
        with watched_init(model_class, cuts, f"model {where}", size, wide):
            loaded, info = (model_class or AutoModelForCausalLM).from_pretrained(
                where,
                config=config,
                subfolder=folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info`, with their shapes
            )
    except (InputError, ModelError):
        raise
    except Exception as error:
        raise cannot(error, f"model {where}: cannot be loaded", trust_remote_code) from error
    _check_complete(where, info, cut=bool(cuts))
    home = Path(where) if is_local(where) else cached_folder(where)
    if home is not None:
        _say_what_is_lost(where, home / folder, loaded)
    if cuts:
        finish_cut(loaded, cut)
    return loaded


def _apart(
    where: str,
    dtype: str,
    folder: Path | None,
    device_map: str | Mapping[str, int | str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    trust_remote_code: bool,
) -> Any:
    """Load a model whose blocks are on disk or on several devices; None if it fits in one place.

    Values are checked when they are used.
    """
    from sspruner.io.offload import offload, saved_dtype
    from sspruner.io.skeleton import skeleton

    if not is_local(where):
        from huggingface_hub import snapshot_download

        try:
            where = snapshot_download(where)
        except Exception as error:  # the hub raises many types
            raise ModelError(f"model {where}: cannot be fetched: {brief(error)}") from error
    built = skeleton(where, trust_remote_code=trust_remote_code)
    weights = Path(where) / weights_in(Path(where))
    resolved_dtype = getattr(torch, dtype) if dtype != "auto" else built.config.dtype or saved_dtype(weights)
    wide = _saved_wide(weights, dtype)
    built = skeleton(where, dtype=resolved_dtype, buffers=True, wide=wide, trust_remote_code=trust_remote_code)
    _say_what_is_lost(where, weights, built)
    return offload(built, where, weights, folder, device_map, max_memory)


def _saved_wide(folder: Path, dtype: str) -> set[str]:
    """Return the names of the parameters that keep fp32 in a model of a narrower dtype: with "auto", as saved."""
    try:
        return wide_tensors(folder) if dtype == "auto" else set()
    except ModelError:  # no weights, or a file is missing: reported where they are read
        return set()


def _check_complete(where: str, info: dict[str, Any], cut: bool) -> None:
    """Raise ModelError for parameters that transformers would have filled with random values.

    cut: also raise it for weights that nothing reads, since a cut model is built to the exact sizes.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        wrapped = next(
            (prefix for prefix in WRAPPERS if any(n.startswith(prefix) for n in info["unexpected_keys"])), ""
        )
        hint = f"; its names begin with {wrapped!r}, which a wrapper of the model added: save the model inside it"
        lacks = f"its weights lack {len(missing)} parameters, e.g. {missing[0]}"
        raise ModelError(f"model {where}: {lacks}{hint if wrapped else ''}")
    unread = sorted(info["unexpected_keys"])
    if unread and cut:
        raise ModelError(f"model {where}: config.json knows nothing of {len(unread)} of its weights, e.g. {unread[0]}")
    if unread:
        logger.warning("model %s: no parameter takes %d of its weights, e.g. %s", where, len(unread), unread[0])
    if mismatched:
        name, saved, expected = mismatched[0]
        raise ModelError(
            f"model {where}: {len(mismatched)} parameters do not have the shape that config.json says, e.g. {name} is "
            f"{tuple(saved)}, not {tuple(expected)}"
        )


def _say_what_is_lost(where: str, folder: Path, model: Any) -> None:
    """Warn of weights that the model's class leaves out without a word: what is saved later lacks them.

    Such are the layers of multi-token prediction, and the vision part of a model that is loaded as text alone.
    """
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = tensor_names(folder) if patterns else []
    left = [name for name in names if any(pattern.search(name) for pattern in patterns)]
    if left:
        parts = Counter(".".join(name.split(".")[: 1 if name.startswith("mtp.") else 3]) for name in left)
        listed = ", ".join(f"{part} ({count})" for part, count in parts.most_common(3))
        logger.warning(
            "model %s: %s does not load %d of its weights, and what is saved will lack them: %s",
            *(where, type(model).__name__, len(left), listed),
        )


def _tokenizer(where: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if is_local(where) and not any(Path(where).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: many types for one user fault
        raise cannot(error, f"model {where}: its tokenizer cannot be read", trust_remote_code) from error
