"""The sentence below the bytes of a decode step: what a smaller state can gain, from the same bytes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.benchmarking.footprint import Footprint, footprint
from sspruner.reporting.footprint import when_it_pays
from support.tiny import tiny_model

SIZES = st.integers(1, 10**9)
FOOTPRINTS = st.builds(
    Footprint,
    st.just("bfloat16"),
    SIZES,
    SIZES,
    SIZES,
    st.integers(0, 10**6),
    st.integers(0, 10**4),
    SIZES,
    SIZES,
    SIZES,
)


@given(FOOTPRINTS, st.integers(1, 256))
def test_half_of_the_state_gains_what_the_bytes_say(dense: Footprint, batch: int) -> None:
    share, step = dense.state_share(batch), dense.step_bytes(batch)
    assert 0 < share < 1
    found = [float(x) for x in re.findall(r"([\d.]+) times", when_it_pays(dense, None, batch))]
    half = 2 * batch * dense.state_bytes / 2
    assert found[-1] == pytest.approx(step / (step - half), abs=0.0051)


def test_with_a_plan_it_is_the_ratio_of_the_steps() -> None:
    model = tiny_model(state=8)
    dense = footprint(model, sspruner.trace(model), 0)
    sspruner.prune(model, "magnitude", keep=2)
    cut = footprint(model, sspruner.trace(model), 0)
    said = when_it_pays(dense, cut, 64)
    gains = [dense.step_bytes(b) / cut.step_bytes(b) for b in (1, 64)]
    assert said.endswith(f"with the plan a step is at most {gains[0]:.2f} and {gains[1]:.2f} times as fast.")
    assert gains[1] > gains[0] > 1
