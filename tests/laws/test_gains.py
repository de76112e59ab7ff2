"""A norm's weight that all heads share: it stays where heads keep the same channels, and moves where they do not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery import proof
from sspruner.surgery.proof import slice_with_proof
from sspruner.testing.plans import selection
from sspruner.training.twist import Deal
from support.examples import examples
from support.family_plans import DELTA, KDA, logits
from support.scoring import calibrated
from support.tiny import tokens
from support.zoo import zoo

each_family = pytest.mark.parametrize("family", [*DELTA, *KDA])
several = pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "kimi_linear"])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def channels(model: Any, after: int, seed: int | None) -> Plan:
    """A plan that keeps other channels in every head, or the last ones in all (seed None)."""
    return Plan({
        name: selection(group.groups, group.units, after, seed) if seed is not None
        else Selection(group.units, (tuple(range(group.units - after, group.units)),) * group.groups)
        for name, group in sspruner.trace(model).on_axis("head_dim").items()
    })  # fmt: skip


def gains(model: Any) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Of every mixer its group of value channels, the norm's weight, and the columns of the output projection."""
    for name, group in sspruner.trace(model).on_axis("head_dim").items():
        mixer = model.get_submodule(name.partition(":")[0])
        norm, out = (mixer.o_norm, mixer.o_proj) if hasattr(mixer, "o_norm") else (mixer.norm, mixer.out_proj)
        yield group, norm.weight, out.weight.view(len(out.weight), group.groups, group.units)  # (hidden, H, V)


@pytest.mark.cover(families=3)
@each_family
@examples(10)
@given(st.data())
def test_where_the_weight_of_the_norm_goes(family: str, data: st.DataObject) -> None:
    """Written out by hand: kept channels of the columns times the weight of their channel, whatever the head."""
    model = zoo(family, seed=data.draw(st.integers(0, 99)))
    units = next(gains(model))[0].units
    after = data.draw(st.integers(1, units - 1))
    alike = data.draw(st.booleans(), "the same channels in every head")
    plan = channels(model, after, None if alike else data.draw(st.integers(0, 99)))
    before = [(norm.clone(), out.clone()) for _, norm, out in gains(model)]
    slice_with_proof(model, plan, sspruner.trace(model))
    scale = (units / after) ** 0.5
    for (old_norm, old_out), (_, norm, out), cut in zip(before, gains(model), plan.groups.values(), strict=True):
        if len(set(cut.keep)) == 1:
            torch.testing.assert_close(norm, old_norm[list(cut.keep[0])] * scale)
            assert torch.equal(out, old_out[:, :, list(cut.keep[0])])
        else:
            torch.testing.assert_close(norm, torch.full_like(norm, scale))
            kept = [old_out[:, h, list(keep)] * old_norm[list(keep)] for h, keep in enumerate(cut.keep)]
            torch.testing.assert_close(out, torch.stack(kept, 1))


@pytest.mark.parametrize("family", [family for family in DELTA if family != "olmo_hybrid"])
def test_stock_classes_load_heads_with_channels_of_their_own(family: str, tmp_path: Path) -> None:
    """All but the epsilon of the norm, for which stock has no field of its own."""
    model, ids = zoo(family), tokens()
    plan = channels(model, 2, 3)
    assert any(len(set(cut.keep)) > 1 for cut in plan.groups.values())
    sspruner.apply(model, plan)
    sspruner.save(model, tmp_path / "cut")
    loaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"))
    for path in (site.path for site in sspruner.trace(model).layers):
        epsilon = model.get_submodule(path).norm.variance_epsilon
        assert epsilon == 2 * loaded.get_submodule(path).norm.variance_epsilon
        loaded.get_submodule(path).norm.variance_epsilon = epsilon
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    ours = copy.deepcopy(sspruner.load(tmp_path / "cut")[0])
    assert torch.equal(logits(ours, ids), logits(model, ids))


@several
def test_a_cut_that_fails_puts_the_weight_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(proof, "relative", lambda *_: float("nan"))
    with pytest.raises(sspruner.SSPrunerError):
        sspruner.apply(model, channels(model, 2, 3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.cover(most=5)
@several
@pytest.mark.parametrize("scorer", ["ghost", "magnitude", "taylor", "flap", "wanda"])
def test_every_head_keeps_its_own_best_channels(family: str, scorer: str) -> None:
    """And so the scores that stay add up to no less than with the best single set."""
    model = zoo(family)
    scores = sspruner.score(model, scorer, axis="head_dim", calibration=calibrated(tokens(6, 24)), device="cpu")
    plan = sspruner.plan(sspruner.trace(model), scores, keep=2)
    for name, cut in plan.groups.items():
        found = scores.importance[name].double()  # (H, V)
        own = sum(float(row[list(keep)].sum()) for row, keep in zip(found, cut.keep, strict=True))
        assert own == pytest.approx(float(found.topk(2, 1).values.sum()))
        assert own >= float(found.sum(0).topk(2).values.sum()) - 1e-6
    assert any(len(set(cut.keep)) > 1 for cut in plan.groups.values())


@several
def test_workers_of_twist_are_dealt_the_same_channels_in_every_head(family: str) -> None:
    """The weight of the norm is one tensor of the model, of which a sub-network has the channels that it was dealt."""
    for plan in Deal(zoo(family), ["head_dim"], 0.5, 0, 0).draw("any", 2):
        assert all(len(set(cut.keep)) == 1 for cut in plan.groups.values())
