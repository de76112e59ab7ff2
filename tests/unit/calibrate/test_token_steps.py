"""Loops over tokens under autograd: the gradients are those of plain indexing, without a tensor of zeros per token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.calibrate.token_steps import TokenSteps, differentiable
from support.tiny import tokens
from support.zoo import zoo

SHAPE = (2, 3, 5, 2)
picks = st.one_of(
    st.integers(-3, 2).map(lambda t: (slice(None), t)),
    st.integers(-5, 4).map(lambda t: (slice(None), slice(None), t)),
    st.integers(-3, 2).map(lambda t: (slice(None), t, slice(None))),
    st.integers(-2, 1).map(lambda t: (t,)),
    st.integers(-2, 1),
    st.just((slice(None), 1, 2)),
    st.just((slice(None), slice(0, 2), 1)),
    st.just((Ellipsis, 1)),
    st.just((slice(None), None, 1)),
    st.just((slice(None), torch.tensor([0, 2]))),
    st.just(slice(1, 2)),
)


@given(keys=st.lists(picks, min_size=1, max_size=12))
def test_any_indices_in_any_order_are_as_without(keys: list[object]) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[list[torch.Tensor], torch.Tensor]:
        leaf = x.clone().requires_grad_()
        parts = [(leaf * 2)[key] for key in keys] + [leaf[key] for key in keys]
        sum((i + 1) * part.square().sum() for i, part in enumerate(parts)).backward()
        return [p.detach() for p in parts], leaf.grad

    parts, gradient = run()
    with differentiable():
        again, same = run()
    for part, other in zip(parts, again, strict=True):
        assert torch.equal(part, other)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=0)


def test_a_tensor_that_is_written_to_is_read_again() -> None:
    leaf = torch.ones(SHAPE, requires_grad=True)
    with differentiable():
        x = leaf * 1
        before = [x[:, :, t] for t in (0, 1, 2)]
        x = x.mul_(3)
        after = [x[:, :, t] for t in (0, 1, 2)]
        assert all(part.detach().eq(3).all() for part in after)
        sum(part.sum() for part in after).backward()
    assert len(before) == 3
    assert leaf.grad[:, :, :3].eq(3).all()
    assert leaf.grad[:, :, 3:].eq(0).all()


def test_an_index_out_of_range_is_the_same_error() -> None:
    x = torch.ones(SHAPE, requires_grad=True)
    with differentiable():
        assert x[:, :, 0].shape == x[:, :, 1].shape
        with pytest.raises(IndexError):
            x[:, :, 5]


def test_nothing_is_held_after_a_few_other_tensors() -> None:
    steps = TokenSteps()
    with steps, torch.enable_grad():
        for _ in range(20):
            x = torch.ones(SHAPE, requires_grad=True)
            assert len([x[:, :, t] for t in range(5)]) == 5
    assert len(steps._seen) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_a_scan_makes_no_zeros_for_each_token(family: str) -> None:
    """The zeros that gradients of an index make: linear in the tokens, and without `differentiable` their square."""

    def zeros(length: int) -> int:
        logits = zoo(family)(input_ids=tokens(1, length), use_cache=False).logits
        found, front = set(), [logits.grad_fn]
        while front:
            node = front.pop()
            if node is not None and node not in found:
                found.add(node)
                front += [parent for parent, _ in node.next_functions]
        return sum(math.prod(n._saved_self_sym_sizes) for n in found if n.name() == "SelectBackward0")

    assert zeros(32) > 3 * zeros(16)
    with differentiable():
        assert zeros(32) < 2.1 * zeros(16)
