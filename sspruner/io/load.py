"""Load a model: a reference model, a Hugging Face folder or hub id, or one that sspruner or mamba_ssm saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sspruner.device import in_turn
from sspruner.errors import InputError, ModelError
from sspruner.graph.ssm_graph import trace
from sspruner.io.checkpoint import INDEX, shards
from sspruner.io.native import is_native, read_native
from sspruner.io.placement import check_device_map
from sspruner.io.sizes import check_counts, check_sizes
from sspruner.processes import world
from sspruner.surgery.record import WEIGHTS, Cut, check_recorded, fields, recorded, restore_stock, weights_subfolder
from sspruner.surgery.slice import cut_buffer, slice_model
from sspruner.surgery.tensors import add_bias

REFERENCES = Path(__file__).parent.parent / "reference"  # one folder for each reference model that ships
DEFAULT = "mamba2-books-4m"
CHUNK = 2**24  # values that are looked at at once
GENERATION = "generation_config.json"


def load(
    model: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    offload: str | Path | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a hub id, or a reference model that ships: by its name, or with no argument.

    The model is on the CPU in eval mode; a native checkpoint of mamba_ssm becomes transformers' model of the same
    numbers. The tokenizer is the model's own, or that of another folder or hub id, `tokenizer`; None if there is none.
    dtype: "auto" (as saved), "float32", "bfloat16" or "float16". offload: a folder for working files; the weights of
    the model's blocks then stay on disk, and are read one block at a time (docs/offload.md). device_map: blocks stay on
    GPUs, in memory or on disk, each in one place: "auto", as accelerate fills them up to max_memory, bytes by place; or
    a map, module -> place. A model that fits in one place is loaded as without it. Raises InputError for a path or a
    place that is wrong, ModelError for a model that is incomplete, corrupt, or holds NaN or infinite weights.
    """
    where = str(_reference(model) or model)
    native = None
    if _is_local(where):
        where = str(Path(where).expanduser())
        native = _check_folder(Path(where))
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r}: must be auto, float32, bfloat16 or float16")
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
    found = _tokenizer(str((tokenizer and _reference(tokenizer)) or tokenizer or where), trust_remote_code)
    if tokenizer and found is None:
        raise InputError(f"tokenizer {tokenizer}: there is none in this folder")
    return loaded.eval(), found


def _native(where: str, data: dict[str, Any], dtype: str) -> Any:
    """A checkpoint of mamba_ssm, in transformers' classes."""
    from transformers import AutoModelForCausalLM

    check_counts(data)
    config, weights = read_native(Path(where), data)
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    try:
        with _watched_init(type(config), [], f"model {where}", _weight_bytes(Path(where))):
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
        raise ModelError(f"model {where}: cannot be loaded: {_brief(error)}") from error
    _check_complete(where, info, cut=True)
    if (Path(where) / GENERATION).is_file():  # their own loader writes none, an export does
        loaded.generation_config = _generation(where)
    return loaded


def _generation(where: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(where)
    except Exception as error:  # as below
        raise ModelError(f"model {where}: {GENERATION} cannot be read: {_brief(error)}") from error


def _transformers(where: str, dtype: str, trust_remote_code: bool) -> Any:
    """A model that transformers knows, with the cuts that its config records."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    try:
        check_counts(PreTrainedConfig.get_config_dict(where)[0])
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise many types for a bad config or name
        raise _cannot(error, f"model {where}: config cannot be read", trust_remote_code) from error
    try:
        cut = copy.deepcopy(config)
        cuts = recorded(config)
        restore_stock(config)  # the original model is built, then cut
        folder = weights_subfolder(config)
        size = _weight_bytes(Path(where) / folder) if _is_local(where) else None
        with _watched_init(type(config), cuts, f"model {where}", size):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                subfolder=folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, with their shapes
            )
    except (InputError, ModelError):
        raise
    except Exception as error:
        raise _cannot(error, f"model {where}: cannot be loaded", trust_remote_code) from error
    _check_complete(where, info, cut=bool(cuts))
    if cuts:
        _finish_cut(loaded, cut)
    return loaded


def _apart(
    where: str,
    dtype: str,
    folder: Path | None,
    device_map: str | Mapping[str, int | str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    trust_remote_code: bool,
) -> Any:
    """A model whose blocks lie on disk or on several devices; None if it fits in one place. Values are checked when
    they are used."""
    from sspruner.io.offload import offload, saved_dtype
    from sspruner.io.skeleton import skeleton

    if not _is_local(where):
        from huggingface_hub import snapshot_download

        try:
            where = snapshot_download(where)
        except Exception as error:  # the hub raises many types
            raise ModelError(f"model {where}: cannot be fetched: {_brief(error)}") from error
    built = skeleton(where, trust_remote_code=trust_remote_code)
    weights = Path(where) / weights_subfolder(built.config)
    wanted = getattr(torch, dtype) if dtype != "auto" else built.config.dtype or saved_dtype(weights)
    built = skeleton(where, dtype=wanted, buffers=True, trust_remote_code=trust_remote_code)
    return offload(built, where, weights, folder, device_map, max_memory)


def check_finite(model: nn.Module, where: str = "") -> None:
    """Raise ModelError that names the first parameter with a NaN or infinite value, and the model's path if given."""
    prefix = f"model {where}: " if where else ""
    for name, p in in_turn(model):
        bad = sum(int((~part.isfinite()).sum()) for part in torch.split(p.detach().flatten(), CHUNK))
        if bad:
            raise ModelError(
                f"{prefix}{name}: {bad} of {p.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )


def name_of(model: str | Path | None) -> str:
    """How reports call the model that `load` would read."""
    reference = _reference(model)
    return f"{reference.name} (reference)" if reference else str(model)


def _reference(model: str | Path | None) -> Path | None:
    """The folder of a reference model, if that is meant. A folder of that name in the working directory goes first."""
    folder = REFERENCES / str(DEFAULT if model is None else model)
    named = str(model).replace("-", "").isalnum() and not Path(str(model)).exists()
    return folder if model is None or (named and folder.is_dir()) else None


def _is_local(name: str) -> bool:
    """A folder, or what can only be meant as one: hub ids are `name` or `owner/name`."""
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
    )


def _check_complete(where: str, info: dict[str, Any], cut: bool) -> None:
    """Raise ModelError for parameters that transformers would have filled with random values; in a cut model, which is
    built to measure, for weights that nothing reads, too."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ModelError(f"model {where}: its weights lack {len(missing)} parameters, e.g. {missing[0]}")
    unread = sorted(info["unexpected_keys"]) if cut else []
    if unread:
        raise ModelError(f"model {where}: config.json knows nothing of {len(unread)} of its weights, e.g. {unread[0]}")
    if mismatched:
        name, saved, expected = mismatched[0]
        raise ModelError(
            f"model {where}: {len(mismatched)} parameters do not have the shape that config.json says, e.g. {name} is "
            f"{tuple(saved)}, not {tuple(expected)}"
        )


def _check_folder(path: Path) -> dict[str, Any] | None:
    """Raise for a folder that is no model; the content of config.json if it is mamba_ssm's, else None."""
    if not path.exists():
        raise InputError(f"model {path}: no such path")
    if not path.is_dir():
        raise InputError(f"model {path}: is a file; give the folder that holds config.json")
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"model {path}: no config.json in this folder; is it a Hugging Face model?")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"model {path}: config.json cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model {path}: config.json is not JSON ({error})") from error
    native = isinstance(data, dict) and is_native(data)
    if not native and (not isinstance(data, dict) or "model_type" not in data):
        raise ModelError(f"model {path}: config.json has no model_type, nor the d_model and n_layer of mamba_ssm")
    for index in sorted([*path.glob(f"*{INDEX}"), *path.glob(f"{WEIGHTS}/*{INDEX}")]):
        shards(index)
    for file in sorted([*path.glob("*.safetensors"), *path.glob(f"{WEIGHTS}/*.safetensors")]):
        try:
            file.open("rb").close()  # safetensors takes a file that may not be read for one that is not there
            with safe_open(str(file), framework="pt") as f:
                f.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {path}: {file.name} is corrupt or truncated ({_brief(error)})") from error
    return data if native else None


@contextmanager
def _watched_init(config_class: type, cuts: list[Cut], where: str, weight_bytes: int | None = None) -> Iterator[None]:
    """While open, models built from this config class are checked for absurd sizes right after their `__init__`, and
    then get the recorded cuts.

    from_pretrained builds modules on the meta device and then loads weights by name: modules that have their
    final sizes by then are filled exactly, by stock code, conversions included.
    """
    from transformers import AutoModelForCausalLM

    if config_class not in AutoModelForCausalLM._model_mapping:  # of code that the user trusts
        yield
        return
    model_class: Any = AutoModelForCausalLM._model_mapping[config_class]
    original = model_class.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check_sizes(self, where, None if cuts else weight_bytes)
        if not cuts:
            return
        tie(self)  # so that shared parameters are cut once
        # Buffers that are not in the checkpoint are made anew after this, in their full size: they are cut at the end.
        self._sspruner_buffers = []
        for cut in cuts:
            for name in cut.biases:
                add_bias(self, name)
            graph = trace(self)
            check_recorded(cut.plan, graph)
            slice_model(self, cut.plan, graph, later=self._sspruner_buffers)
        check_sizes(self, where, weight_bytes)

    model_class.__init__ = watched
    try:
        yield
    finally:
        model_class.__init__ = original


def _weight_bytes(folder: Path) -> int:
    """The bytes of the files in a folder that can be weights."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def tie(model: Any) -> None:
    """What `model.tie_weights()` does; from_pretrained switches that off until the weights are there."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def _finish_cut(model: Any, cut: Any) -> None:
    """Cut the buffers that transformers made in their full size, and give the model the config that was saved."""
    for buffer in model._sspruner_buffers:
        cut_buffer(*buffer)
    del model._sspruner_buffers
    for name, value in fields(cut).items():
        if getattr(model.config, name, None) != value:
            with suppress(AttributeError):  # a property of what the blocks have set already
                setattr(model.config, name, value)


def _tokenizer(where: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if _is_local(where) and not any(Path(where).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: many types for one user fault
        raise _cannot(error, f"model {where}: its tokenizer cannot be read", trust_remote_code) from error


def _cannot(error: Exception, what: str, trust_remote_code: bool) -> ModelError:
    """The error for what transformers could not do; where it asks for code to be trusted, with our option's name."""
    if "trust_remote_code=True" in str(error) and not trust_remote_code:
        return ModelError(
            f"{what}: it needs code of its own, which is not run; read that code, and add --trust-remote-code "
            "(trust_remote_code=True) if you trust it"
        )
    return ModelError(f"{what}: {_brief(error)}")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
