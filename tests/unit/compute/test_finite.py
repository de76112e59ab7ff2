"""A dense model that is not finite on the calibration text is refused, by its first such module, for every scorer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sspruner
from sspruner.errors import ModelError
from support.tiny import tokens
from support.zoo import zoo

DATA = tokens(6, 40)


def too_large(block: int, family: str = "mamba2") -> Any:
    """A model whose weights are finite in fp16 and whose activations are not, from one block on."""
    model = zoo(family)
    blocks = model.get_submodule(str(sspruner.trace(model).blocks))
    with torch.no_grad():
        mixer = next(m for name, m in blocks[block].named_modules() if name.endswith("in_proj"))
        mixer.weight.mul_(3e4)
    return model.half()


@pytest.mark.cover(most=6)
@pytest.mark.parametrize("scorer", ["magnitude", "random", "ghost", "balanced", "flap", "block-influence"])
@pytest.mark.parametrize("block", [0, 1])
def test_the_first_module_is_named_for_every_scorer(scorer: str, block: int) -> None:
    """Whether it needs weights alone or activations; nothing is cut, and no scorer is blamed."""
    model = too_large(block)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"axis": "block"} if scorer == "block-influence" else {"axis": "state"}
    if scorer == "flap":
        options = {"axis": "head"}
    message = rf"layers\.{block}\.\S+: its output on the calibration text is not finite in float16; .* --dtype float32"
    with pytest.raises(ModelError, match=message) as error:
        sspruner.prune(model, scorer, sparsity=0.5, calibration=DATA, **options)
    assert scorer not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_and_sampled_text() -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.\S+: its output"):
        sspruner.score(too_large(0), "ghost", calibration=DATA)
    with pytest.raises(ModelError, match=r"layers\.1\.\S+: its output"):
        sspruner.calibration("self", too_large(1), samples=2, seq_len=8)


def test_gradients_of_a_model_that_overflows_in_fp32() -> None:
    model = zoo("mamba2")
    with torch.no_grad():
        model.get_submodule("lm_head").weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"lm_head: its output .* not finite in float32; use a shorter --seq-len"):
        sspruner.score(model, "taylor", calibration=DATA)


def test_fp32_is_a_way_out() -> None:
    assert sspruner.prune(too_large(0).float(), "magnitude", sparsity=0.5, calibration=DATA).report.proof


class Unmoved(sspruner.Scorer):
    """Looks at activations, and gives the same numbers whatever they are."""

    name, axes, needs = "unmoved", {"state"}, "activations"

    def observe(self, view: sspruner.SSMView) -> None:
        self.units = view.group.units

    def importance(self) -> torch.Tensor:
        return torch.arange(float(self.units)).repeat(2, 1)


def test_a_scorer_that_does_not_notice() -> None:
    """Its numbers are finite; what it was shown is not."""
    assert sspruner.score(zoo("mamba2"), Unmoved, calibration=DATA).importance
    with pytest.raises(ModelError, match=r"layers\.0\.\S*: its output on the calibration text is not finite"):
        sspruner.score(too_large(0), Unmoved, calibration=DATA)
