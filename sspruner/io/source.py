"""Source: what a name of a model means, and what building a model from a config takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sspruner.errors import InputError, ModelError
from sspruner.formats.checkpoint import INDEX, shards
from sspruner.formats.native import is_native
from sspruner.formats.sizes import check_sizes
from sspruner.graph.trace import trace
from sspruner.surgery.record import WEIGHTS, RecordedCut, check_recorded, fields
from sspruner.surgery.slice import cut_buffer, slice_model
from sspruner.surgery.tensors import add_bias

REFERENCES = Path(__file__).parent.parent / "reference"  # one folder for each reference model that ships


DEFAULT = "mamba2-books-4m"


@contextmanager
def watched_init(
    config_class: type, cuts: list[RecordedCut], where: str, weight_bytes: int | None = None
) -> Iterator[None]:
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


def weight_bytes_in(folder: Path) -> int:
    """The bytes of the files in a folder that can be weights."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def tie(model: Any) -> None:
    """What `model.tie_weights()` does; from_pretrained switches that off until the weights are there."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def finish_cut(model: Any, cut: Any) -> None:
    """Cut the buffers that transformers made in their full size, and give the model the config that was saved."""
    for buffer in model._sspruner_buffers:
        cut_buffer(*buffer)
    del model._sspruner_buffers
    for name, value in fields(cut).items():
        if getattr(model.config, name, None) != value:
            with suppress(AttributeError):  # a property of what the blocks have set already
                setattr(model.config, name, value)


def reference_folder(model: str | Path | None) -> Path | None:
    """The folder of a reference model, if that is meant. A folder of that name in the working directory goes first."""
    folder = REFERENCES / str(DEFAULT if model is None else model)
    named = str(model).replace("-", "").isalnum() and not Path(str(model)).exists()
    return folder if model is None or (named and folder.is_dir()) else None


def is_local(name: str) -> bool:
    """A folder, or what can only be meant as one: hub ids are `name` or `owner/name`."""
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
    )


def check_folder(path: Path) -> dict[str, Any] | None:
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
            raise ModelError(f"model {path}: {file.name} is corrupt or truncated ({brief(error)})") from error
    return data if native else None


def cannot(error: Exception, what: str, trust_remote_code: bool) -> ModelError:
    """The error for what transformers could not do; where it asks for code to be trusted, with our option's name."""
    if "trust_remote_code=True" in str(error) and not trust_remote_code:
        return ModelError(
            f"{what}: it needs code of its own, which is not run; read that code, and add --trust-remote-code "
            "(trust_remote_code=True) if you trust it"
        )
    return ModelError(f"{what}: {brief(error)}")


def brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def name_of(model: str | Path | None) -> str:
    """How reports call the model that `load` would read."""
    reference = reference_folder(model)
    return f"{reference.name} (reference)" if reference else str(model)
