"""A mixer's class that reads something else than when its family was described is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from sspruner.graph import class_reads
from sspruner.graph.class_reads import Reads, changes, known_reads
from sspruner.graph.family import Family
from sspruner.graph.known import installed_families
from support.zoo import FAMILIES, zoo

INSTALLED = [family for family in FAMILIES if family in CONFIG_MAPPING]
each_family = pytest.mark.parametrize("family", INSTALLED)


def described(family: str) -> tuple[Family, Any]:
    """A family and the first mixer of a tiny model."""
    found = installed_families()[family]
    return found, next(module for module in zoo(family).modules() if found.recognises(module))


def test_every_family_is_recorded_for_the_installed_version() -> None:
    assert set(known_reads()[metadata.version("transformers")]) == set(INSTALLED)


@each_family
def test_an_installed_class_is_as_recorded(family: str) -> None:
    found, mixer = described(family)
    assert class_reads.class_reads(mixer) == known_reads()[metadata.version("transformers")][family]
    assert changes(found, mixer) == ""


class Stock(nn.Module):
    """A mixer of which forward, a method that it calls and a part of it read something."""

    class Part(nn.Module):
        scale = 1.0

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.part, self.linear, self.size, self.shift, self.unread = Stock.Part(), nn.Linear(2, 2), 2, 0.0, 1

    def forward(self, hidden_states: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.seen = len(hidden_states)  # written, not read
        return self.part(self.moved(self.linear(hidden_states))) * getattr(self, "gain", 1.0)

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, self.size) + self.shift


def test_what_a_forward_reads() -> None:
    reads = class_reads.class_reads(Stock())
    assert reads == Reads(
        frozenset({"hidden_states", "cache"}),
        frozenset({"part", "part.scale", "linear", "size", "shift", "gain"}),
        frozenset({"len", "getattr"}),
    )
    assert Reads.from_json(reads.to_json()) == reads


def test_a_class_without_its_source_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found, mixer = described("mamba2")

    def gone(function: Callable[..., Any]) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(class_reads.inspect, "getsource", gone)
    assert changes(found, mixer) == ""


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5_text", "kimi_linear"])
def test_a_changed_class_is_named_with_what_has_changed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another argument, another attribute, another function, and a size that is no longer read."""
    found, mixer = described(family)

    def forward(self: Any, hidden_states: torch.Tensor, memory: Any = None) -> torch.Tensor:
        return scanned(hidden_states * self.temperature)  # noqa: F821

    monkeypatch.setattr(type(mixer), "forward", forward)
    said = changes(found, mixer)
    assert said.startswith(f"{type(mixer).__name__} takes the argument memory and reads the attribute temperature and ")
    assert " and calls scanned and no longer reads " in said
    lost = {"mamba2": "num_heads", "qwen3_5_text": "head_v_dim", "kimi_linear": "head_dim"}[family]
    assert lost in said.partition("no longer reads ")[2].partition(";")[0].split(", ")
    assert said.endswith(f"those of transformers {', '.join(known_reads())}")
    assert "\n" not in said


def test_a_renamed_argument_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.24: a forward that does not know the new name would decode without a state."""
    found, mixer = described("qwen3_5_text")
    older = {version: families for version, families in known_reads().items() if version == "5.23.0"}
    monkeypatch.setattr(class_reads, "known_reads", lambda: older)

    def forward(self: Any, hidden_states: torch.Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any):
        return None

    monkeypatch.setattr(type(mixer), "forward", forward)
    assert "takes the argument cache and no longer reads" in changes(found, mixer)
