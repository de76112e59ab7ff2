"""Save a model as a Hugging Face folder that `sspruner.load`, and stock classes where they can, read back exactly."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sspruner.axes import ELEMENT_AXES, axis_of
from sspruner.calibrate.seen import write_seen
from sspruner.compute.device import offloaded
from sspruner.compute.forward import predicts_tokens
from sspruner.errors import InputError, ModelError
from sspruner.files.output import atomic_folder
from sspruner.formats.checkpoint import write_model
from sspruner.formats.stock import loaded_by, stock_difference
from sspruner.graph.group import BARRED_LOGITS
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.usable import UNQUANTISED, check_not_quantised
from sspruner.io.offload import write_weights
from sspruner.plans.tensors import FOLDER
from sspruner.pruning.report import Report
from sspruner.reporting.card import write_card
from sspruner.surgery.mask import added_biases, barred_routers, masked_projections
from sspruner.surgery.record import RECORD, WEIGHTS, noted, subfolder

NO_TENSOR = "no tensor that is saved could say which experts a mask bars from the choice"


def save(
    model: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    result: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write `model`, `tokenizer` and a model card to the folder `out`, and return its path.

    With `result` (what `sspruner.prune` returned) also plan.json, report.json, recipe.yaml and, in the subfolder
    `sspruner`, scores.safetensors and the plan's tensors, if it has some; the card then says what the cut cost, too.
    The folder appears whole or not at all. Weights that stock classes cannot load lie in its subfolder `weights`.
    Raises InputError if the folder exists and is not empty, unless `overwrite` is given and it holds an earlier model;
    ModelError for a model that no folder can describe.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers, which a folder could describe: keep it whole with "
            "torch.save(model, FILE), or save the model of transformers that is inside it"
        )
    check_not_quantised(model, UNQUANTISED)
    _check_code(model)
    if routers := barred_routers(model):
        raise ModelError(f"{routers[0]}: {NO_TENSOR}; save the model cut, or unmasked: sspruner.unmask(model)")
    with atomic_folder(out, overwrite) as folder:
        write_folder(model, folder, tokenizer, result.report if result else None)
        if result is not None:
            # In a folder of its own: some runtimes read every *.safetensors that lies beside config.json.
            (folder / FOLDER).mkdir()
            result.plan.save(folder / "plan.json", tensors=folder / FOLDER / "plan.safetensors")
            units = {n: s for n, s in result.scores.importance.items() if axis_of(n) not in ELEMENT_AXES}
            if units:  # those of single elements would be as large as the model, in fp32
                replace(result.scores, importance=units).save(folder / FOLDER / "scores.safetensors")
            result.report.save(folder / "report.json")
            result.recipe.save(folder / "recipe.yaml")
    return Path(out)


def _check_code(model: Any) -> None:
    """Raise ModelError for a model of its own code that is no language model, if the folder would lack that code."""
    kind = type(model)
    if kind.__module__.startswith("transformers.") or predicts_tokens(model):
        return
    if kind.__module__ == "__main__" or kind._auto_class is None:
        raise ModelError(
            f"{kind.__name__}: the folder would lack its code, and nothing could load it; put the class in a file of "
            f"its own, and call {kind.__name__}.register_for_auto_class('AutoModel') before"
        )


def check_mask(graph: SSMGraph, axes: Sequence[str]) -> None:
    """Raise InputError, before any work, if a mask of these axes could not be saved."""
    for group in graph.groups.values():
        if group.axis in axes and any(member.mask == BARRED_LOGITS for member in group.members):
            raise InputError(f"mode mask: {group.name}: {NO_TENSOR}; use mode slice, or leave out --out")


def write_folder(model: Any, folder: Path, tokenizer: Any, report: Report | None) -> None:
    """Write what `sspruner.load` reads, and a card, which says what the report does if there is one."""
    with _unchanged(model.config), _noted(model), _located(model) as weights:
        if offloaded(model):
            write_weights(model, folder / weights)
        else:
            write_model(model, folder / weights)
        if weights:
            for file in ("config.json", "*.py"):  # and the model's own code
                for path in (folder / weights).glob(file):
                    path.rename(folder / path.name)
        write_seen(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        reader = "stock" if stock_reads(model) else "sspruner"
        write_card(folder, model, reader, report, tokenizer=tokenizer is not None)


@contextmanager
def _unchanged(config: Any) -> Iterator[None]:
    """Context manager that restores the config, in which `save_pretrained` notes the class and the dtype."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def stock_reads(model: Any) -> bool:
    """Return whether stock classes load what `save` writes of this model, and compute the same."""
    return (not getattr(model.config, RECORD, None) or stock_can_build(model)) and not stock_difference(model)


def loading(model: Any, out: str | Path) -> str:
    """Return in one line what loads a saved model: stock classes, or sspruner with the export that those need."""
    with _noted(model):
        stock = stock_reads(model)
    if stock:
        kind, more = loaded_by(model)
        return f"load it: {kind}.from_pretrained({str(out)!r}{more})"
    if not predicts_tokens(model):
        return f"load it: sspruner.load({str(out)!r}{loaded_by(model)[1]})"
    export = f"sspruner export {shlex.quote(str(out))} --to hf-remote --out NEW"
    return f"load it: sspruner.load({str(out)!r}); for transformers alone, first: {export}"


def _noted(model: Any) -> AbstractContextManager[None]:
    return noted(getattr(model, "config", None), added_biases(model), masked_projections(model))


@contextmanager
def _located(model: Any) -> Iterator[str]:
    """Yield the subfolder for the weights, recorded in the config meanwhile: "" unless stock classes cannot load them.

    Without weights beside config.json those refuse; else they fill what does not fit with random values.
    """
    if not getattr(model.config, RECORD, None):
        yield ""
        return
    folder = "" if stock_can_build(model) else WEIGHTS
    with subfolder(model.config, folder):
        yield folder


def stock_can_build(model: Any) -> bool:
    """Check whether the model's class makes tensors of the same names and shapes from its config alone."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model.config.model_type].from_dict(model.config.to_dict())
        with torch.device("meta"):
            stock = type(model)(config)
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError):
        return False  # a combination of sizes that the config or the class refuses
    return _shapes(stock) == _shapes(model)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
