"""Tensors that something else computes are refused by name before any work, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sspruner
from support.tensors import same, tensors
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"
)  # peft with transformers 5.23
IN_PROJ = "backbone.layers.0.mixer.in_proj"


def layer(model: Any) -> nn.Linear:
    found: nn.Linear = model.get_submodule(IN_PROJ)
    return found


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"]))


def parametrized(model: Any) -> Any:
    parametrize.register_parametrization(layer(model), "weight", Twice())
    return model


def normed(model: Any) -> Any:
    parametrizations.weight_norm(layer(model))
    return model


def masked_by_torch(model: Any) -> Any:
    prune.l1_unstructured(layer(model), "weight", 0.5)
    return model


KINDS: dict[Callable[[Any], Any], str] = {
    adapted: r"in_proj\.weight: an adapter \(LoRA\) is on it; merge it first",
    parametrized: r"in_proj\.weight: torch computes it from others .*remove_parametrizations\(module, 'weight'\)",
    normed: r"in_proj\.weight: torch computes it from others",
    masked_by_torch: r"in_proj\.weight: a mask of torch\.nn\.utils\.prune is on it.*prune\.remove\(module, 'weight'\)",
}


@pytest.mark.parametrize("job", ["trace", "score", "prune", "apply"])
@pytest.mark.parametrize("make", KINDS)
def test_what_something_else_computes_is_refused(make: Callable[[Any], Any], job: str) -> None:
    plan = half(sspruner.trace(tiny_model()), "state")
    model = make(tiny_model())
    before, said = tensors(model), logits(model, tokens())
    jobs: dict[str, Callable[[], Any]] = {
        "trace": lambda: sspruner.trace(model),
        "score": lambda: sspruner.score(model, "magnitude"),
        "prune": lambda: sspruner.prune(model, "ghost", keep=2, calibration=tokens(4, 12)),
        "apply": lambda: sspruner.apply(model, plan),
    }
    with pytest.raises(sspruner.ModelError, match=KINDS[make]):
        jobs[job]()
    assert same(tensors(model), before)
    assert torch.equal(logits(model, tokens()), said)


def test_a_merged_adapter_is_cut_like_any_model() -> None:
    model = adapted(zoo("mamba2")).merge_and_unload()
    sspruner.apply(model, half(sspruner.trace(model), "state"))


def test_an_adapter_elsewhere_does_not_matter() -> None:
    """On a matrix that no axis cuts, here one that the user has added."""
    model = zoo("mamba2")
    model.extra = nn.Linear(3, 3)
    prune.l1_unstructured(model.extra, "weight", 0.5)
    assert sspruner.trace(model).groups
