"""Load a model: the reference model, a Hugging Face folder or hub id, or a folder that sspruner saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from sspruner.errors import InputError, ModelError
from sspruner.graph.ssm_graph import trace
from sspruner.planning.plan import Plan
from sspruner.surgery.slice import recorded, slice_recorded

REFERENCE = Path(__file__).parent.parent / "reference"
REFERENCE_NAME = "mamba2-books-4m (reference)"


def load(model: str | Path | None = None, *, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a hub id, or, with no argument, the reference model that ships.

    The model is on the CPU in eval mode. The tokenizer is None if there is none. dtype: "auto" (as saved),
    "float32", "bfloat16" or "float16". Raises InputError for a path that is wrong, ModelError for a model that is
    incomplete, corrupt, or holds NaN or infinite weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(REFERENCE if model is None else model)
    if _is_local(where):
        where = str(Path(where).expanduser())
        _check_folder(Path(where))
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r}: must be auto, float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub raise many types for a bad config or name
        raise ModelError(f"model {where}: config cannot be read: {_brief(error)}") from error
    try:
        plan = recorded(config)
        with _cut_after_init(type(config), plan):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, with their shapes
            )
    except InputError:
        raise
    except Exception as error:
        raise ModelError(f"model {where}: cannot be loaded: {_brief(error)}") from error
    _check_complete(where, info)
    check_finite(loaded, where)
    return loaded.eval(), _tokenizer(where, trust_remote_code)


def check_finite(model: nn.Module, where: str = "") -> None:
    """Raise ModelError that names the first parameter with a NaN or infinite value, and the model's path if given."""
    prefix = f"model {where}: " if where else ""
    for name, p in model.named_parameters():
        bad = int((~p.detach().isfinite()).sum())
        if bad:
            raise ModelError(
                f"{prefix}{name}: {bad} of {p.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )


def name_of(model: str | Path | None) -> str:
    """How reports call the model that `load` would read."""
    return REFERENCE_NAME if model is None else str(model)


def _is_local(name: str) -> bool:
    """A folder, or what can only be meant as one: hub ids are `name` or `owner/name`."""
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
    )


def _check_complete(where: str, info: dict[str, Any]) -> None:
    """Raise ModelError for parameters that transformers would have filled with random values."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ModelError(f"model {where}: its weights lack {len(missing)} parameters, e.g. {missing[0]}")
    if mismatched:
        name, saved, expected = mismatched[0]
        raise ModelError(
            f"model {where}: {len(mismatched)} parameters do not have the shape that config.json says, e.g. {name} is "
            f"{tuple(saved)}, not {tuple(expected)}"
        )


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"model {path}: no such path")
    if not path.is_dir():
        raise InputError(f"model {path}: is a file; give the folder that holds config.json")
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"model {path}: no config.json in this folder; is it a Hugging Face model?")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model {path}: config.json is not JSON ({error})") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise ModelError(f"model {path}: config.json has no model_type; native mamba_ssm folders cannot be read yet")
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as f:
                f.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {path}: {file.name} is corrupt or truncated ({_brief(error)})") from error


@contextmanager
def _cut_after_init(config_class: type, plan: Plan | None) -> Iterator[None]:
    """While open, models built from this config class get the recorded cut right after their `__init__`.

    from_pretrained builds modules on the meta device and then loads weights by name: modules that have their
    final sizes by then are filled exactly, by stock code, conversions included.
    """
    if plan is None:
        yield
        return
    from transformers import AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM._model_mapping[config_class]
    original = model_class.__init__

    def cut_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        slice_recorded(self, plan, trace(self))

    model_class.__init__ = cut_init
    try:
        yield
    finally:
        model_class.__init__ = original


def _tokenizer(where: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if _is_local(where) and not any(Path(where).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: many types for one user fault
        raise ModelError(f"model {where}: its tokenizer cannot be read: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
