"""Run hypothesis examples without replay and shrinking, which a scorer that keeps state would answer differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def try_examples(body: Callable[[Any], None], examples: int, strategy: st.SearchStrategy[Any]) -> None:
    """Call `body` on a number of draws, the simplest first. Raises the first AssertionError unchanged."""
    failures: list[AssertionError] = []

    @settings(
        max_examples=examples,
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        if failures:
            return
        try:
            body(drawn)
        except AssertionError as error:
            failures.append(error)

    run()
    if failures:
        raise failures[0]
