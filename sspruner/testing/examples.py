"""Examples from hypothesis without its replay and shrinking: a scorer that remembers would answer differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def try_examples(body: Callable[[Any], None], examples: int, strategy: st.SearchStrategy[Any]) -> None:
    """Call `body` on so many draws, the simplest first. Raises the first AssertionError, as it is."""
    found: list[AssertionError] = []

    @settings(
        max_examples=examples,
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        if found:
            return
        try:
            body(drawn)
        except AssertionError as error:
            found.append(error)

    run()
    if found:
        raise found[0]
