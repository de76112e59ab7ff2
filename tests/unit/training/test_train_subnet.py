"""Sub-networks of a model: what they hold, how they are dealt, and that they are what a slice makes of the model."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.errors import InputError
from sspruner.plans.plan import Plan
from sspruner.surgery.slice import slice_model, without_rows
from sspruner.testing.plans import plans, sizes
from sspruner.training.subnet import Subnets, kept_runs
from sspruner.training.twist import Deal
from support.examples import examples
from support.flat import flat
from support.tiny import close, logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo


def made(model: Any, plan: Plan) -> tuple[Any, dict[str, Any], Subnets]:
    """The sub-network of a plan, from the elements that it says it holds."""
    subnets = Subnets(model, plan)
    places = subnets.places(plan)
    values = {name: places(name).of(value) for name, value in flat(model).items()}
    return *subnets.make(plan, values), subnets


@pytest.mark.slow
@pytest.mark.ci_cover(families=6)
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
@examples(8)
@given(data=st.data())
def test_a_sub_network_is_the_slice_of_the_model(family: str, data: st.DataObject) -> None:
    """On every axis of every family: the same tensors, to the bit but for the scales, and the same logits."""
    model = zoo(family)
    graph = sspruner.trace(model)
    axis = data.draw(st.sampled_from([axis for axis in graph.axes if any(map(sizes, graph.on_axis(axis).values()))]))
    plan = data.draw(plans(graph, (axis,)))
    found, held, subnets = made(model, plan)
    expected = copy.deepcopy(model)
    slice_model(expected, plan, graph)
    named = dict(expected.named_parameters())
    assert [*dict(found.named_parameters())] == [*named]
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-6, atol=0)
    for name, buffer in found.named_buffers():
        assert torch.equal(buffer, dict(expected.named_buffers())[name])
    ids = tokens(2, 9)
    close(logits(found, ids), logits(expected, ids), expected, ids)
    places = subnets.places(plan)
    for name, value in flat(model).items():  # and back: a sub-network's weights in the model's terms
        if name in held:
            assert (places(name).of(torch.arange(len(value))).diff() > 0).all()
            torch.testing.assert_close(subnets.weights(name, held[name]), places(name).of(value), rtol=1e-6, atol=0)
        else:
            assert not len(places(name).of(value))


@given(shape=st.lists(st.integers(1, 8), min_size=1, max_size=3), together=st.booleans(), data=st.data())
def test_runs_are_what_a_cut_keeps(shape: list[int], together: bool, data: st.DataObject) -> None:
    """The same elements as of the tensor cut as a tensor, also in runs as short as single elements."""
    cuts = {}
    for dims in [(0, 1)] if together and len(shape) > 1 else [(dim,) for dim in range(len(shape))]:
        # Of several dimensions the last one shrinks, equally at every index of the others.
        last, others = shape[dims[-1]], math.prod(shape[dim] for dim in dims[:-1])
        drop = data.draw(st.lists(st.integers(0, last - 1), unique=True, max_size=last - 1))
        if drop:
            cuts[dims] = torch.tensor(sorted(row * last + one for row in range(others) for one in drop))
    numbers = torch.arange(math.prod(shape)).view(shape)
    runs, expected = kept_runs(torch.Size(shape), cuts), without_rows(numbers, cuts).flatten()
    assert torch.equal(runs.of(numbers.flatten()), expected)
    assert torch.equal(runs.shorter(1), expected)


def test_runs_are_long() -> None:
    """A tensor that is not cut is one run; two of four heads of 64 columns or rows are as many in every row, or two."""
    heads = torch.cat([torch.arange(64, 128), torch.arange(192, 256)])
    for shape, cuts, length, count in (
        ((6, 256), {}, 6 * 256, 1),
        ((6, 256), {(1,): heads}, 64, 6 * 2),
        ((256, 6), {(0,): heads}, 64 * 6, 2),
        ((256, 6), {(0,): heads[1:]}, 6, 129),
        ((128, 6), {(0,): torch.cat([torch.arange(32), torch.arange(48, 128)])}, 16 * 6, 1),
    ):
        runs = kept_runs(torch.Size(shape), cuts)
        assert (runs.length, len(runs.numbers)) == (length, count)


def test_the_skeleton_holds_no_weights() -> None:
    model = tiny_model(tied=True)
    found, held, subnets = made(model, halved(model))
    assert all(p.is_meta for p in subnets.skeleton.parameters())
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert all(p.requires_grad for p in held.values())
    assert not any(p.is_meta for p in model.parameters())


def halved(model: Any) -> Plan:
    return Deal(model, ["head"], 0.5, 0, 0).draw("any", 1)[0]


@given(
    sets=st.integers(1, 3),
    heads=st.integers(2, 7),
    workers=st.integers(1, 7),
    keep=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
def test_every_unit_is_dealt(sets: int, heads: int, workers: int, keep: float, seed: int) -> None:
    """All workers have the same sizes; between them they hold every unit, or the deal is refused."""
    model = tiny_model(layers=1, groups=sets, heads_per_group=heads)
    deal = Deal(model, ["head"], keep, 0, seed)
    (group,) = deal.groups.values()
    try:
        one = deal.draw("one", 1)[0]
    except InputError:  # so much is kept, or so little, that nothing would go, or all
        assert round(heads * keep) in (0, heads)
        return
    q = one.groups[group.name].after
    if workers > heads or workers * q < heads:
        with pytest.raises(InputError, match="does not hold"):
            deal.check(workers)
        return
    deal.check(workers)
    hands = [hand.groups[group.name] for hand in deal.draw("round 0", workers)]
    assert {hand.after for hand in hands} == {q}
    for number in range(sets):
        held = Counter(unit for hand in hands for unit in hand.keep[number])
        assert sorted(held) == list(range(heads))
    assert deal.draw("round 0", workers) == deal.draw("round 0", workers)


@pytest.mark.slow
def test_hands_are_random() -> None:
    """Over many rounds every worker has every unit about as often, and any two units together about as often."""
    deal = Deal(tiny_model(layers=1, heads_per_group=5), ["head"], 0.6, 0, 1)  # 5 heads, 3 of them for each of 2
    (name,) = deal.groups
    counts = torch.zeros(2, 5, 5)
    for number in range(600):
        for worker, hand in enumerate(deal.draw(f"round {number}", 2)):
            kept = torch.zeros(5)
            kept[list(hand.groups[name].keep[0])] = 1
            counts[worker] += torch.outer(kept, kept)
    alone, pairs = counts.diagonal(dim1=1, dim2=2), counts[:, *torch.triu_indices(5, 5, 1)]
    assert (alone / 600 - 3 / 5).abs().max() < 4 * (0.6 * 0.4 / 600) ** 0.5
    assert (pairs / 600 - 3 / 10).abs().max() < 4 * (0.3 * 0.7 / 600) ** 0.5
    other = Deal(tiny_model(layers=1, heads_per_group=5), ["head"], 0.6, 0, 2)
    assert [other.draw(f"round {i}", 2) for i in range(5)] != [deal.draw(f"round {i}", 2) for i in range(5)]


@pytest.mark.parametrize("axis", ["head", "block"])
def test_blocks_at_the_ends_stay_whole(axis: str) -> None:
    deal = Deal(tiny_model(layers=5), [axis], 0.5, 1, 0)
    for number in range(8):
        (hand,) = deal.draw(f"draw {number}", 1)
        if axis == "head":
            assert {name.split(".")[2] for name in hand.groups} == {"1", "2", "3"}
        else:
            (blocks,) = hand.groups.values()
            assert {0, 4} <= set(blocks.keep[0])
    deal.check(2 if axis == "head" else 3)


def test_what_cannot_be_dealt_is_refused() -> None:
    model = tiny_model(layers=3, heads_per_group=4)
    for arguments, said in (
        ((["head"], 0.5, 2, 0), "ends 2: none of the 3 blocks is between them"),
        ((["weight"], 0.5, 0, 0), "axis 'weight': of single elements; twist deals state, head"),
        ((["channel"], 0.5, 0, 0), "axis 'channel'"),
    ):
        with pytest.raises(InputError, match=said):
            Deal(model, *arguments)
    with pytest.raises(InputError, match=r"3 workers with 1 of 4 units of .*:head each: m q >= n does not hold, 3 < 4"):
        Deal(model, ["head"], 0.25, 0, 0).check(3)
    with pytest.raises(InputError, match=r"5 workers for 4 units of .*:head: m <= n does not hold"):
        Deal(model, ["head"], 0.75, 0, 0).check(5)
    Deal(model, ["head", "state"], 0.5, 1, 0).check(2)
