"""Resolve the name of a model, and build a model from a config with checked sizes and recorded cuts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sspruner.errors import InputError, ModelError
from sspruner.formats.checkpoint import INDEX, holds_weights, shards
from sspruner.formats.native import is_native
from sspruner.formats.sizes import check_sizes
from sspruner.formats.stock import stock_class_of
from sspruner.graph.text_model import text_config
from sspruner.graph.trace import trace
from sspruner.surgery.record import RECORD, WEIGHTS, RecordedCut, check_recorded, fields
from sspruner.surgery.slice import cut_buffer, slice_model
from sspruner.surgery.tensors import add_bias

REFERENCES = Path(__file__).parent.parent / "reference"  # one folder for each built-in reference model


DEFAULT = "mamba2-books-4m"
ADAPTER = "adapter_config.json"
UNTRUSTED = (
    "it needs code of its own, which is not run; read that code, and add --trust-remote-code (trust_remote_code=True) "
    "if you trust it"
)


def model_class_of(config: Any, where: str = "", trust_remote_code: bool = False) -> Any:
    """Return the class of a model: of transformers the one that its config names (`architectures`), else a language
    model's. For a model of its own code that is no language model, the class in that code, if it is trusted; None for
    other code of its own.
    """
    import transformers

    kinds = {auto: name for auto, name in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in auto}
    if where and kinds and "AutoModelForCausalLM" not in kinds:
        return _own_class(*next(iter(kinds.items())), where, trust_remote_code)
    default = stock_class_of(type(config))
    named = getattr(transformers, str(next(iter(getattr(config, "architectures", None) or ()), "")), None)
    fits = isinstance(named, type) and getattr(named, "config_class", None) is type(config)
    return named if default is not None and fits else default


def _own_class(kind: str, name: str, where: str, trust_remote_code: bool) -> Any:
    """Return a class in a model's folder or repository. kind: the class of transformers under which it is registered.

    Raises ModelError unless that code is trusted.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not trust_remote_code:
        raise ModelError(f"model {where}: {UNTRUSTED}")
    found = get_class_from_dynamic_module(name, where)
    found.register_for_auto_class(kind)  # so that the code is saved with the model
    return found


@contextmanager
def watched_init(
    model_class: Any,
    cuts: list[RecordedCut],
    where: str,
    weight_bytes: int | None = None,
    wide: Collection[str] = (),
) -> Iterator[None]:
    """Context manager that checks models of a class for absurd sizes after `__init__`, and cuts them.

    wide: names of tensors that were saved as fp32 in a narrower model; A_log, D and dt_bias among them stay fp32.
    from_pretrained builds modules on the meta device and then loads weights by name: modules that have their
    final sizes by then are filled exactly, by stock code, conversions included.
    """
    if model_class is None:  # custom code that the user trusts
        yield
        return
    original = model_class.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kept = {name for name in wide if _may_be_wide(self, name)}
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *kept}
        check_sizes(self, where, None if cuts else weight_bytes)
        if not cuts:
            return
        tie(self)  # so that shared parameters are cut once
        # Buffers that are not in the checkpoint are created again later, in their full size: they are cut at the end.
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


def weight_bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder that may be weights."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def _may_be_wide(model: Any, name: str) -> bool:
    """Return whether a parameter may be fp32 in a narrower model: mixers compute with it in fp32, whatever its dtype.

    Not the D of a Mamba1 mixer: its product with x would reach out_proj in fp32.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        mixer = model.get_submodule(owner)
    except AttributeError:  # a name that the loader converts
        return False
    return leaf in ("A_log", "dt_bias") or (leaf == "D" and not hasattr(mixer, "x_proj"))


def weights_in(where: Path) -> str:
    """Return the subfolder in which a folder's weights lie: what its config.json, which was saved last, records, or "".

    Where one of the two places is empty, it is the other. Raises ModelError where that cannot be told:
    `save` never leaves weights beside the config of a model whose weights it puts into the subfolder.
    """
    record = json.loads((where / "config.json").read_text(encoding="utf-8")).get(RECORD)
    recorded = isinstance(record, dict) and record.get("weights")
    beside, inside = (holds_weights(where / folder) for folder in ("", WEIGHTS))
    if recorded and beside and inside:
        raise ModelError(
            f"model {where}: weights lie beside config.json and in {WEIGHTS}/, and it cannot be told which belong to "
            f"it; remove the older ones (config.json records {WEIGHTS}/)"
        )
    return WEIGHTS if inside and (recorded or not beside) else ""


def tie(model: Any) -> None:
    """Tie weights like `model.tie_weights()`, which from_pretrained disables until the weights are loaded."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def finish_cut(model: Any, cut: Any) -> None:
    """Cut the buffers that transformers created in full size, and restore the saved config."""
    for buffer in model._sspruner_buffers:
        cut_buffer(*buffer)
    del model._sspruner_buffers
    text = text_config(model.config)
    for name, value in fields(cut).items():
        if getattr(text, name, None) != value:
            with suppress(AttributeError):  # a read-only property that the blocks have set already
                setattr(text, name, value)


def reference_folder(model: str | Path | None) -> Path | None:
    """Return the folder of a reference model, if that is meant.

    A folder of that name in the working directory takes precedence.
    """
    folder = REFERENCES / str(DEFAULT if model is None else model)
    named = str(model).replace("-", "").isalnum() and not Path(str(model)).exists()
    return folder if model is None or (named and folder.is_dir()) else None


def is_local(name: str) -> bool:
    """Return whether a name is a folder, or can only be meant as one: hub ids are `name` or `owner/name`."""
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
    )


def cached_folder(hub_id: str) -> Path | None:
    """Return the folder of the hub's cache in which the weights of a loaded model lie; None if they are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and any(holds_weights(folder / sub) for sub in ("", WEIGHTS)) else None


def check_folder(path: Path) -> dict[str, Any] | None:
    """Raise InputError or ModelError for a folder that is not a model.

    Returns the content of config.json if it is mamba_ssm's, else None.
    """
    if not path.exists():
        raise InputError(f"model {path}: no such path")
    if not path.is_dir():
        raise InputError(f"model {path}: is a file; give the folder that holds config.json")
    if (path / ADAPTER).is_file():  # transformers reads the adapter's base model, whatever weights lie beside it
        raise InputError(
            f"model {path}: holds an adapter (peft), which is no model by itself; --merge-adapters "
            "(merge_adapters=True) merges it into its base model"
        )
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
            file.open("rb").close()  # safetensors reports a file without read permission as missing
            with safe_open(str(file), framework="pt") as f:
                f.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {path}: {file.name} is corrupt or truncated ({brief(error)})") from error
    return data if native else None


def cannot(error: Exception, what: str, trust_remote_code: bool) -> ModelError:
    """Return a ModelError for a failure of transformers. If code must be trusted, it names our option."""
    if "trust_remote_code=True" in str(error) and not trust_remote_code:
        return ModelError(f"{what}: {UNTRUSTED}")
    return ModelError(f"{what}: {brief(error)}")


def brief(error: Exception) -> str:
    """Return the type of an error and its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def name_of(model: str | Path | None) -> str:
    """Return the name of a model for reports."""
    reference = reference_folder(model)
    return f"{reference.name} (reference)" if reference else str(model)
