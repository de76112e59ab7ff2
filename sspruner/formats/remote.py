"""Export hf-remote: a folder that transformers alone loads, with the code that its sizes need beside the weights."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError
from sspruner.formats.checkpoint import write_model
from sspruner.graph.layout import DECODE, ENCODE
from sspruner.runtime.kda_forward import is_fitted
from sspruner.runtime.sizes import sizes_of
from sspruner.surgery.record import RECORD, restore_stock

CODE = "modeling_pruned"  # the file of code beside the weights, without its suffix
PARTS = ("projected_state.py", "sizes.py")  # files of sspruner.runtime that the file of code consists of
KDA = "kda_forward.py"  # one more, where a mixer's forward was replaced

CLASSES = '''

class Pruned{config}({config}):
    """The stock config of the model that was cut; `pruned` has the sizes that it got."""

    model_type = "pruned_{model_type}"


class Pruned{model}({model}):
    """The stock model in the sizes of the config's `pruned`."""

    config_class = Pruned{config}
    _keep_in_fp32_modules_strict = {{*({model}._keep_in_fp32_modules_strict or ()), "{encode}", "{decode}"}}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Its initialisation is stock's: what the weights do not hold (buffers) is filled as in the stock model."""
        return False

    def __init__(self, config: Pruned{config}) -> None:
        super().__init__(config)
        resize(self, config.pruned)
        for module in self.modules():
            if "{encode}" in module._parameters:
                project_state(module, module.{encode}.data, module.{decode}.data)
{fit}'''


def write_remote(model: Any, folder: Path) -> None:
    """Write `model` so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it.

    Supports any sizes that a cut made, and projected states; not mixers or blocks that were dropped from the middle of
    the config's lists. Raises ModelError for a model that it cannot express.
    """
    config, stock = built_from_config(model)
    name, of = type(model).__name__, type(config).__name__
    fields = json.loads(config.to_json_string(use_diff=False)) | {
        "model_type": f"pruned_{config.model_type}",
        "architectures": [f"Pruned{name}"],  # generate() looks for the family's name in that of the class
        "auto_map": {"AutoConfig": f"{CODE}.Pruned{of}", "AutoModelForCausalLM": f"{CODE}.Pruned{name}"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "pruned": sizes_of(model, stock),
    }
    # Save under the modules' names: older names are translated by the model type, which has changed.
    write_model(model, folder, save_original_format=False)
    (folder / "config.json").write_text(
        json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    (folder / f"{CODE}.py").write_text(_code(model), encoding="utf-8")


def built_from_config(model: Any) -> tuple[Any, nn.Module]:
    """Return the config from which stock code builds the modules of `model`, and the built model on the meta device.

    Tries the model's own config first, then that of the model before it was cut.
    """
    why = "its class refuses its config"
    for restored in (False, True):
        config = copy.deepcopy(model.config)
        if restored:
            restore_stock(config)
        if hasattr(config, RECORD):
            delattr(config, RECORD)
        try:
            with torch.device("meta"):
                stock = type(model)(config)
        except (ValueError, KeyError, RuntimeError, ZeroDivisionError):
            continue
        why = _difference(model, stock)
        if not why:
            return config, stock
    raise ModelError(f"hf-remote cannot express this cut: {why}; sspruner.load reads what sspruner.save writes")


def _difference(model: nn.Module, stock: nn.Module) -> str:
    """Describe a module or tensor that only one of two models has, except state bases and biases; "" if none."""
    ours, theirs = ({n for n, _ in m.named_modules()} for m in (model, stock))
    if ours != theirs:
        return f"module {sorted(ours ^ theirs)[0]} is in {'the built' if theirs - ours else 'the cut'} model alone"
    saved = model.state_dict().keys()
    shapes = [{n: tuple(b.shape) for n, b in m.named_buffers() if n not in saved} for m in (model, stock)]
    other = [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]
    if other:
        return f"the buffer {other[0]} was cut, and is not among the weights"
    removed = sorted({n for n, _ in stock.named_parameters()} - {n for n, _ in model.named_parameters()})
    return f"parameter {removed[0]} is gone" if removed else ""


def _code(model: Any) -> str:
    """Return the self-contained file of code, made from sspruner's own files."""
    fitted = any(map(is_fitted, model.modules()))
    names = (*PARTS, KDA) if fitted else PARTS
    parts = [(resources.files("sspruner.runtime") / part).read_text(encoding="utf-8") for part in names]
    first, *others = (part.rstrip() for part in parts)
    rest = (part.replace("from __future__ import annotations\n", "") for part in others)
    name, config = type(model).__name__, type(model.config).__name__
    classes = CLASSES.format(
        model=name,
        config=config,
        model_type=model.config.model_type,
        encode=ENCODE,
        decode=DECODE,
        fit="            fit_forward(module)\n" if fitted else "",
    )
    head = f"from transformers import {config}, {name}"
    return "\n\n\n".join([first, *rest, head]) + "\n" + classes
