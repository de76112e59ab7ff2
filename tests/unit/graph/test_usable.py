"""Wrapped, split, empty and quantised models are refused by name, before any work, and are left as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sspruner
from sspruner.errors import ModelError
from support.tiny import tokens
from support.zoo import FAMILIES, zoo

DATA = tokens(6, 20)


def mixer(model: Any) -> Any:
    return model.backbone.layers[1].mixer


def int8(model: Any) -> Any:
    """A dynamically quantised linear layer of torch, whose weight is a method."""
    torch.backends.quantized.engine = "onednn"
    layer = mixer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.in_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(prepared(layer.in_proj))
    return model


def prepared(linear: nn.Linear) -> nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def with_dtype(dtype: torch.dtype) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        linear = mixer(model).out_proj
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        return model

    return change


def packed(model: Any) -> Any:
    """Like a layer of GPTQ or AWQ."""
    mixer(model).out_proj.register_buffer("qweight", torch.zeros(3, 3, dtype=torch.int32))
    return model


def noted(model: Any) -> Any:
    """A model that transformers has loaded with quantised weights."""
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return model


def schemed(model: Any) -> Any:
    """Like a layer of compressed-tensors."""
    mixer(model).in_proj.quantization_scheme = SimpleNamespace()
    return model


def hooked(model: Any) -> Any:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(mixer(model), AlignDevicesHook(io_same_device=True))
    return model


class FullyShardedDataParallel(nn.Module):
    """Of the name of torch's: that needs a process group."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inside


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "compiled": (torch.compile, r"OptimizedModule: torch\.compile wraps the model; give the model itself"),
    "DataParallel": (nn.DataParallel, "DataParallel: wraps the model; give the model itself, model.module"),
    "FSDP": (FullyShardedDataParallel, "FullyShardedDataParallel: FSDP has split its weights"),
    "accelerate": (hooked, r"layers\.1\.mixer: accelerate moves its weights; load the model with sspruner.load"),
    "dynamic int8": (int8, r"layers\.1\.mixer\.in_proj: Linear is quantised; prune first, then quantise"),
    "int8": (with_dtype(torch.int8), r"layers\.1\.mixer\.out_proj\.weight: a weight of type int8 is quantised; prune"),
    "fp8": (with_dtype(torch.float8_e4m3fn), r"out_proj\.weight: a weight of type float8_e4m3fn is quantised; prune"),
    "packed": (packed, r"layers\.1\.mixer\.out_proj: Linear has packed weights; prune first"),
    "scheme": (schemed, r"layers\.1\.mixer\.in_proj: Linear is quantised; prune first"),
    "config": (noted, r"Mamba2ForCausalLM: its weights are quantised \(bitsandbytes\); prune first, then quantise"),
    "meta": (lambda model: model.to("meta"), r"is on the meta device, without values; load the model with sspruner"),
}  # fmt: skip


@pytest.mark.cover(most=5)
@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(case: str) -> None:
    make, message = CASES[case]
    model = make(zoo("mamba2"))
    before = {name: (type(value), value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    plan = sspruner.plan(sspruner.trace(zoo("mamba2")), sspruner.score(zoo("mamba2"), "magnitude"), sparsity=0.5)
    for call in (
        lambda: sspruner.prune(model, "magnitude", sparsity=0.5, calibration=DATA),
        lambda: sspruner.prune(model, "ghost", sparsity=0.5, calibration=DATA),
        lambda: sspruner.score(model, "ghost", calibration=DATA),
        lambda: sspruner.apply(model, plan),
    ):
        with pytest.raises(ModelError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    now = {name: (type(value), value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    assert now == before


@pytest.mark.parametrize("case", [name for name, (_, says) in CASES.items() if "quantis" in says])
def test_a_quantised_model_is_neither_saved_nor_exported(case: str, tmp_path: Path) -> None:
    model = CASES[case][0](zoo("mamba2"))
    for write in (sspruner.save, sspruner.export):
        with pytest.raises(ModelError, match="save it before it is quantised, and quantise"):
            write(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_data_parallel_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel needs a process group: here a class that says it is one."""
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", FullyShardedDataParallel)
    with pytest.raises(ModelError, match="wraps the model; give the model itself"):
        sspruner.trace(FullyShardedDataParallel(zoo("mamba2")))


@pytest.mark.cover(most=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_they_are_made_are_usable(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert sspruner.trace(zoo(family).to(dtype)).layers
    assert sspruner.trace(zoo(family).to("meta")).layers  # sizes alone


def other_head(model: Any) -> None:
    model.lm_head = nn.Linear(model.config.hidden_size, 40, bias=False)


def other_embedding(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(40, model.config.hidden_size))


def other_config(model: Any) -> None:
    model.config.vocab_size = 40


@pytest.mark.parametrize("change", [other_head, other_embedding, other_config])
def test_sizes_of_the_vocabulary_that_differ(change: Callable[[Any], None]) -> None:
    """They are found before any work, not when the cut model is loaded."""
    model = zoo("mamba2")
    change(model)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(zoo("mamba2"), "magnitude"), sparsity=0.5)
    message = r"sizes of the vocabulary differ \(config\.vocab_size \d+, the embedding \d+, the output head \d+\)"
    for call in (
        lambda: sspruner.prune(model, "ghost", sparsity=0.5, calibration=DATA),
        lambda: sspruner.score(model, "magnitude"),
        lambda: sspruner.apply(model, plan),
    ):
        with pytest.raises(ModelError, match=message):
            call()
    model.resize_token_embeddings(50, mean_resizing=False)
    if change is not other_head:
        assert sspruner.prune(model, "ghost", sparsity=0.5, calibration=DATA).report.proof


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize("family", ["mamba", "zamba", "mamba2", "zamba2"])
def test_fp64(family: str) -> None:
    proof = sspruner.prune(zoo(family).double(), "ghost", sparsity=0.5, calibration=DATA).report.proof
    assert proof
    assert proof.state_bytes_removed > 0
