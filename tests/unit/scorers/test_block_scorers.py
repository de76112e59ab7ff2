"""perplexity-drop against a greedy removal by hand, on losses of a model that really runs without the blocks.

block-influence is tested in test_scorers.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner_plugins.perplexity_drop import PerplexityDrop
from support.scoring import batches_of, calibrated, importance, shown
from support.tiny import tokens
from support.zoo import zoo

CASES = [("mamba2", "block"), ("mamba", "block"), ("zamba2", "block"), ("bamba", "mixer"), ("nemotron_h", "block")]


def rank(loss: Callable[[Sequence[int]], float], units: int, stop: int | None = None) -> list[float]:
    scorer = PerplexityDrop(stop)
    scorer.observe(SimpleNamespace(loss=loss, group=SimpleNamespace(units=units)))
    found = scorer.importance()
    assert found.shape == (1, units)
    return found[0].tolist()


def slow_ranks(loss: Callable[[frozenset[int]], float], units: int, stop: int) -> list[int]:
    """Every unit's place: the greedy ones by trying all that are left, the others by their own loss."""
    gone = list[int]()
    while len(gone) < min(stop, units - 1):
        tried = [(loss(frozenset({*gone, u})), loss(frozenset({u})), u) for u in range(units) if u not in gone]
        gone.append(min(tried)[-1])
    rest = sorted((loss(frozenset({u})), u) for u in range(units) if u not in gone)
    order = [*gone, *[u for _, u in rest]]
    return [order.index(u) for u in range(units)]


def table(units: int, seed: int, worst: float) -> Callable[[Sequence[int]], float]:
    """A loss for every subset, drawn once; some are `worst`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2**units, generator=generator).round(decimals=1).double()
    values[torch.rand(2**units, generator=generator) < 0.2] = worst
    return lambda gone: float(values[sum(2**u for u in set(gone))])


@given(
    st.integers(1, 6), st.integers(0, 2**16), st.none() | st.integers(0, 7), st.sampled_from([9.0, math.inf, math.nan])
)
def test_it_is_the_greedy_removal(units: int, seed: int, stop: int | None, worst: float) -> None:
    """For any losses, ties among them; NaN and infinity are the worst of all."""
    loss = table(units, seed, worst)
    as_worst = table(units, seed, 9.0)
    expected = slow_ranks(as_worst, units, units if stop is None else stop)
    assert rank(loss, units, stop) == expected


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_the_worst(worst: float) -> None:
    losses = {(0,): worst, (1,): 2.0, (2,): 1.0, (0, 2): worst, (1, 2): 9.0}
    assert rank(lambda gone: losses[tuple(gone)], 3) == [2, 1, 0]
    assert rank(lambda gone: losses[tuple(gone)], 3, stop=0) == [2, 1, 0]
    assert rank(lambda gone: worst, 3) == [0, 1, 2]


def test_of_equal_losses_the_unit_goes_that_is_missed_less_alone() -> None:
    losses = {(0,): 3.0, (1,): 2.0, (2,): 1.0, (0, 2): 5.0, (1, 2): 5.0}
    assert rank(lambda gone: losses[tuple(gone)], 3) == [2, 1, 0]


@given(st.integers(2, 6), st.integers(0, 2**16), st.randoms())
def test_units_keep_their_rank_under_another_number(units: int, seed: int, random: Any) -> None:
    values = torch.rand(2**units, generator=torch.Generator().manual_seed(seed)).double()
    places = list(range(units))
    random.shuffle(places)

    def loss(gone: Sequence[int]) -> float:
        return float(values[sum(2**u for u in gone)])

    ranks = rank(loss, units)
    assert rank(lambda gone: loss([places[u] for u in gone]), units) == [ranks[place] for place in places]


def test_it_sees_what_single_losses_cannot() -> None:
    """0 and 1 do the same job: either may go, not both. By single losses both would go first."""
    losses = {(0,): 1.0, (1,): 1.1, (2,): 2.0, (0, 1): 9.0, (0, 2): 2.5, (1, 2): 2.5}
    assert rank(lambda gone: losses[tuple(sorted(gone))], 3) == [0, 2, 1]
    assert rank(lambda gone: losses[tuple(sorted(gone))], 3, stop=0) == [0, 1, 2]


@pytest.mark.parametrize(("stop", "calls"), [(None, 5 + 4 + 3 + 2), (0, 5), (1, 5), (2, 5 + 4), (9, 5 + 4 + 3 + 2)])
def test_its_cost_is_what_it_says(stop: int | None, calls: int) -> None:
    asked = list[tuple[int, ...]]()

    def loss(gone: Sequence[int]) -> float:
        asked.append(tuple(gone))
        return float(sum(gone))

    assert rank(loss, 5, stop) == [0, 1, 2, 3, 4]
    assert len(asked) == len(set(asked)) == calls
    assert all(1 <= len(gone) < 5 for gone in asked)  # never without all of them


@pytest.mark.parametrize("stop", [-1, 1.5, "2", True])
def test_a_wrong_stop_is_refused(stop: Any) -> None:
    with pytest.raises(sspruner.InputError, match=r"stop=.*; a number of units, 0 or more"):
        sspruner.score(zoo("mamba2"), "perplexity-drop", axis="block", options={"stop": stop}, calibration=tokens())


@contextmanager
def without(model: torch.nn.Module, paths: Sequence[str], axis: str) -> Iterator[None]:
    """The model with blocks that hand on their input, and with mixers that add nothing."""

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        new = hidden if axis == "block" else torch.zeros_like(hidden)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    hooks = [model.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def slow_loss(model: torch.nn.Module, ids: torch.Tensor, lengths: Sequence[int]) -> float:
    """Mean over all predicted tokens, one row at a time without its padding, one token at a time."""
    losses = []
    for row, n in zip(ids, lengths, strict=True):
        logits = model(input_ids=row[None, :n], use_cache=False).logits[0].double()
        losses += [F.cross_entropy(logits[t], row[t + 1]) for t in range(n - 1)]
    return float(torch.stack(losses).mean())


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize(("family", "axis"), CASES)
def test_the_losses_are_those_of_a_model_that_runs_without(family: str, axis: str) -> None:
    """Padding does not count, batches change nothing, and the model is as it was."""
    model, lengths = zoo(family), [19, 7, 12]
    ids, mask = tokens(3, 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    (group,) = sspruner.trace(model).on_axis(axis).values()
    before = copy.deepcopy(model.state_dict())
    paths = [block.path for block in group.blocks]
    for gone in ([], [0], [1, 2], [0, group.units - 1]):
        with without(model, [paths[u] for u in gone], axis):
            expected = slow_loss(model, ids, lengths)
        for size in (4096, 19):
            with batches_of(size):
                (view,) = shown(model, torch.where(mask, ids, 7), axis, "loss", mask)
                assert view.loss(gone) == pytest.approx(expected, rel=1e-4), gone
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis"), CASES)
def test_a_model_is_ranked_by_its_losses(family: str, axis: str) -> None:
    model, ids = zoo(family), tokens(3, 19)
    (name, group) = next(iter(sspruner.trace(model).on_axis(axis).items()))
    paths, known = [block.path for block in group.blocks], dict[frozenset[int], float]()

    def loss(gone: frozenset[int]) -> float:
        if gone not in known:
            with without(model, [paths[u] for u in sorted(gone)], axis):
                known[gone] = round(slow_loss(model, ids, [19] * 3), 4)
        return known[gone]

    expected = slow_ranks(loss, group.units, group.units)
    found = importance(model, ids, "perplexity-drop", axis=axis)
    assert list(found) == [name]
    assert found[name][0].tolist() == expected
    stopped = importance(model, ids, "perplexity-drop", axis=axis, options={"stop": 1})
    assert stopped[name][0].tolist() == slow_ranks(loss, group.units, 1)


def test_the_blocks_that_go_are_the_ones_ranked_lowest() -> None:
    model, ids = zoo("mamba2", layers="MMMM"), tokens(3, 19)
    scores = importance(model, ids, "perplexity-drop", axis="block")["backbone.layers:block"][0]
    result = sspruner.prune(model, "perplexity-drop", axis="block", keep=2, calibration=calibrated(ids))
    assert sorted(scores.tolist()) == [0, 1, 2, 3]
    (selection,) = result.plan.groups.values()
    assert selection.keep == (tuple(u for u in range(4) if scores[u] >= 2),)
    assert len(model.backbone.layers) == 2


def test_other_axes_and_scorers_that_did_not_ask_have_no_losses() -> None:
    with pytest.raises(sspruner.InputError, match="'perplexity-drop' does not score axis 'state'"):
        importance(zoo("mamba2"), tokens(), "perplexity-drop")
    (view,) = shown(zoo("mamba2"), tokens(), "block", "weights")
    with pytest.raises(sspruner.PluginError, match="set needs='loss'"):
        view.loss([0])


def test_a_model_whose_loss_explodes_is_ranked() -> None:
    """Logits beyond fp32: no loss is a number, and every unit has a rank all the same."""
    model, ids = zoo("mamba2"), tokens()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    (view,) = shown(model, ids, "block", "loss")
    assert not math.isfinite(view.loss([0]))
    for scores in importance(model, ids, "perplexity-drop", axis="block").values():
        assert sorted(scores[0].tolist()) == [0, 1, 2]
