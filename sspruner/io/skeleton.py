"""Build a model without its weights, on the meta device from config.json alone, of any size, in seconds."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sspruner.errors import InputError, ModelError
from sspruner.formats.native import native_config
from sspruner.formats.sizes import check_counts
from sspruner.io.source import (
    cannot,
    check_folder,
    finish_cut,
    is_local,
    model_class_of,
    reference_folder,
    watched_init,
)
from sspruner.surgery.record import recorded, restore_stock, take_subfolder


def skeleton(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    buffers: bool = False,
    wide: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Any:
    """Build the model that `load` would read, on the meta device, in eval mode, with the recorded cuts.

    Needs config.json alone; of a hub id nothing else is downloaded.

    dtype    by default the config's; float32 if it has none, then `model.config.dtype` stays None
    buffers  create the buffers that no checkpoint has, on the CPU
    wide     parameters that stay fp32, whatever `dtype`

    Raises InputError for a wrong path, ModelError for a config that cannot be read, makes no model, or describes an
    absurdly large one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    where = str(reference_folder(model) or model)
    native = None
    if is_local(where):
        where = str(Path(where).expanduser())
        native = check_folder(Path(where))
    try:
        check_counts(native or PreTrainedConfig.get_config_dict(where)[0])
        if native:
            config = native_config(native, f"model {where}")
        else:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        cut, cuts = copy.deepcopy(config), recorded(config)
        take_subfolder(config)
        restore_stock(config)  # the original model is built, then cut
        model_class = model_class_of(config, where, trust_remote_code)
        resolved = dtype or config.dtype or torch.float32
        with torch.device("meta"), watched_init(model_class, cuts, f"model {where}", wide=wide):
            if model_class is None:
                built = AutoModelForCausalLM.from_config(config, dtype=resolved, trust_remote_code=trust_remote_code)
            else:
                built = model_class._from_config(config, dtype=resolved)
                _keep_wide(built)
    except (InputError, ModelError):
        raise
    except Exception as error:  # transformers raises many types for a bad config or name
        raise cannot(error, f"model {where}: cannot be built from its config", trust_remote_code) from error
    for name, p in built.named_parameters():
        if not all(p.shape):
            raise ModelError(f"model {where}: config.json makes {name} {tuple(p.shape)}; no model has such a size")
    if buffers:
        _make_buffers(built)
    if cuts:
        finish_cut(built, cut)
    built.config.dtype = dtype or cut.dtype
    return built.eval()


def _keep_wide(model: Any) -> None:
    """Give the parameters that a class keeps in fp32 that dtype, like `from_pretrained`."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, p in model.named_parameters():
        if any(f".{part}." in f".{name}." for part in kept):
            p.data = p.data.float()


def _make_buffers(model: Any) -> None:
    """Fill the buffers that no checkpoint has, like `from_pretrained`, before any cut of them."""
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device="cpu")
    _fill(model, model)


def _fill(module: Any, owner: Any) -> None:
    """Initialise a module and those inside it. owner: the model around it, of a multimodal one the part it is in."""
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _fill(child, owner)
    owner._init_weights(module)  # has no effect on meta tensors
