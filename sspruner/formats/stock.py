"""Exports hf and hf-padded: models that stock classes of transformers load from a config and weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.compute.forward import predicts_tokens
from sspruner.compute.precision import in_fp32
from sspruner.errors import ModelError, PlanError
from sspruner.formats.checkpoint import write_model
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config
from sspruner.graph.trace import trace
from sspruner.runtime.sizes import sizes_of
from sspruner.surgery.pad import pad
from sspruner.surgery.proof import check_same
from sspruner.surgery.record import RECORD, restore_stock

REFUSALS = (
    ValueError,
    KeyError,
    RuntimeError,
    ZeroDivisionError,
    AttributeError,
)  # errors that configs and classes raise for sizes they do not support


def write_stock(model: Any, folder: Path) -> None:
    """Write `model` for its stock class.

    Raises ModelError, with the nearest cut, if that class does not build its sizes.
    """
    check_stock(model, "hf")
    with without_record(model):
        write_model(model, folder)


def check_stock(model: Any, target: str) -> None:
    """Raise ModelError unless the stock class builds the same names, shapes and epsilons from the config alone."""
    why = stock_difference(model)
    if why:
        raise ModelError(f"{target} cannot express this cut: {why}. {nearest(model)}")


def padded(model: Any, to: str = "hf-padded", differs: Callable[[Any], str] | None = None) -> Any:
    """Return a model of stock sizes that computes the same, with zeros where layers are smaller than the config's size.

    to       the export format, for errors
    differs  returns why that format cannot express a padded model, "" if it can; by default for stock classes

    Sizes with a config field are padded to the largest layer's, others to those before the cut. The logits are proved
    to be equal. Raises ModelError for what zeros cannot fill: projected states, removed modules, new biases. The
    scaling of norm weights is rounded to the model's dtype after the proof.
    """
    graph = trace(model)
    why = "it has no sizes of its own" if graph.family is None else ""
    for config in () if why else _larger(model, graph):
        try:
            large = type(model)(config).float().eval()
            with in_fp32(model):
                pad(model, graph, large, trace(large))
        except (PlanError, *REFUSALS) as error:
            why = " ".join(str(error).split())[:200]
            continue
        if why := (differs or stock_difference)(large):
            continue
        check_same(model, large, graph)
        _as(model, large)
        large.generation_config = model.generation_config
        large.config.dtype = model.dtype
        return large
    raise ModelError(f"{to} cannot express this cut: {why}; hf-remote and sspruner express more")


def padding(model: Any, large: Any) -> str:
    """Describe the cost of padding."""
    before, after = trace(model), trace(large)
    return (
        f"padded with zeros: {after.parameters - before.parameters:,} of {after.parameters:,} parameters are padding, "
        f"and a sequence keeps {after.state_bytes:,} bytes of state where the cut itself needs {before.state_bytes:,}"
    )


@contextmanager
def without_record(model: Any) -> Iterator[None]:
    """Context manager that hides the record of cuts from the config, so that it is a stock one."""
    record = model.config.__dict__.pop(RECORD, None)
    try:
        yield
    finally:
        if record is not None:
            setattr(model.config, RECORD, record)


def nearest(model: Any) -> str:
    """Describe the nearest cut that the model's stock config can express, and the formats that express more."""
    advice = nearest_stock(model)
    return f"{advice}{'hf-padded, ' if advice or trace(model).family else ''}hf-remote and sspruner express more"


def nearest_stock(model: Any) -> str:
    """Describe the nearest cut that the model's stock config can express, with a trailing space; "" if unknown."""
    graph, original = trace(model), _original(model)
    if graph.family is None or original is None:
        return ""
    stock, advice = trace(original), []
    fields = {d for size in graph.family.config_sizes.values() for term in size for d in term}
    for axis in graph.axes:
        sizes = {group.units for group in graph.on_axis(axis).values()}
        whole = {group.units for group in stock.on_axis(axis).values()} if axis in stock.axes else sizes
        if sizes == whole:
            continue
        if axis in fields and len(sizes) > 1:
            units = [group.units for group in graph.on_axis(axis).values()]
            advice.append(f"--axis {axis} --keep {round(sum(units) / len(units))}, one size for all layers")
        elif axis in graph.family.couplings:
            advice.append(graph.family.couplings[axis])
        elif axis not in fields:
            advice.append(f"{axis} uncut, at {', '.join(map(str, sorted(whole)))}")
    text = "; ".join(advice)
    return f"The nearest that it builds: {text}. " if text else ""


def stock_difference(model: Any) -> str:
    """Describe where a model differs from what its stock class builds from its config; "" if nowhere."""
    stock = _built(_plain(model))
    if stock is None:
        return f"{type(model).__name__} refuses the sizes of its config"
    for what, ours, theirs in (
        ("module", {n for n, _ in model.named_modules()}, {n for n, _ in stock.named_modules()}),
        ("tensor", set(model.state_dict()), set(stock.state_dict())),
    ):
        if other := sorted(ours ^ theirs):
            return f"the {what} {other[0]} is in one of the cut model and {type(model).__name__} alone"
    sizes = sizes_of(model, stock)
    for name, shape in sizes["shapes"].items():
        return f"{name} is {tuple(shape)}, and {tuple(stock.state_dict()[name].shape)} in {type(model).__name__}"
    for path, attributes in sizes["attributes"].items():
        name, value = next(iter(attributes.items()))
        found = vars(stock.get_submodule(path)).get(name)
        why = " (the cut folds a factor into this norm's epsilon, which has no field in the config)" * ("eps" in name)
        return f"{path}.{name} is {value}, and {found} in {type(model).__name__}{why}"
    return ""


def _larger(model: Any, graph: SSMGraph) -> Iterator[Any]:
    """Yield configs that may fit the model: with the largest layer's sizes, and with the sizes before it was cut."""
    assert graph.family is not None
    family, stock = graph.family, (getattr(model.config, RECORD, None) or {}).get("stock", {})
    largest, before = _plain(model), _plain(model)
    for field, values in family.stock_sizes({site.path: site.layout for site in graph.sites}).items():
        if values:
            setattr(text_config(largest), field, max(values))
        text = text_config(before)
        setattr(text, field, stock.get(field, getattr(text, field)))
    if family.config_epsilon:
        setattr(before, family.config_epsilon, stock.get(family.config_epsilon, getattr(before, family.config_epsilon)))
    yield from (largest, before)


def _as(model: nn.Module, large: nn.Module) -> None:
    """Convert a model's tensors to the dtypes of another model's."""
    values = model.state_dict()
    for name, tensor in large.state_dict(keep_vars=True).items():
        if name in values:
            tensor.data = tensor.data.to(values[name].dtype)


def _plain(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.__dict__.pop(RECORD, None)
    return config


def _original(model: Any) -> nn.Module | None:
    """Return the model before it was cut, on the meta device."""
    config = copy.deepcopy(model.config)
    restore_stock(config)
    config.__dict__.pop(RECORD, None)
    return _built(config, type(model))


def loaded_by(model: Any) -> tuple[str, str]:
    """Return the class that loads a model without sspruner, and further arguments of its from_pretrained, as text."""
    if predicts_tokens(model):
        return "AutoModelForCausalLM", ""
    kind = getattr(model, "_auto_class", None)
    return (kind, ", trust_remote_code=True") if kind else (type(model).__name__, "")


def stock_class_of(config_class: type) -> Any:
    """Return the class of transformers that predicts tokens from such a config: of text, else of images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind._model_mapping[config_class] for kind in kinds if config_class in kind._model_mapping), None)


def _built(config: Any, model_class: Any = None) -> nn.Module | None:
    from transformers import CONFIG_MAPPING

    try:
        fresh = CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())
        kind = model_class or stock_class_of(type(fresh))
        with torch.device("meta"):
            return kind(fresh) if kind else None
    except REFUSALS:
        return None
