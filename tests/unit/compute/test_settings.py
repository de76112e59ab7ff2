"""Whatever torch is set to where a function is called, its results are the same, and the settings stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch

import sspruner
from sspruner.compute.settings import _whole_products_of_old_torch, whole_products
from support.tiny import tokens
from support.zoo import zoo

DATA, OTHER = tokens(8, 40), tokens(4, 40, seed=9)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def few_bits() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS: dict[str, Any] = {
    "few bits": few_bits,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "fp64": lambda: default(torch.float64),
    "bf16": lambda: default(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def results(model: Any, scorer: str) -> dict[str, Any]:
    pruned = sspruner.prune(model, scorer, sparsity=0.5, calibration=DATA)
    assert pruned.report.proof
    numbers = (pruned.report.dense["perplexity"], pruned.report.pruned["perplexity"], pruned.report.proof.error)
    measured = sspruner.evaluate(model, text=OTHER, metrics=["perplexity"], max_length=16)["perplexity"]
    return {"kept": pruned.plan.groups, "importance": pruned.scores.importance, "numbers": numbers, "value": measured}


@cache
def expected(scorer: str) -> dict[str, Any]:
    """The results without any setting."""
    return results(zoo("mamba2"), scorer)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["numbers"], one["value"]) == (other["numbers"], other["value"])
    assert all(torch.equal(value, other["importance"][name]) for name, value in one["importance"].items())
    assert one["kept"].keys() == other["kept"].keys()


@pytest.mark.cover
@pytest.mark.parametrize("scorer", ["ghost", "taylor"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_torch_change_no_result(setting: str, scorer: str) -> None:
    model, around = zoo("mamba2"), SETTINGS[setting]()
    assert isinstance(around, AbstractContextManager)
    with around:
        found = results(model, scorer)
    assert_same(expected(scorer), found)


@pytest.mark.parametrize("way", [whole_products, _whole_products_of_old_torch])
def test_products_keep_their_bits(way: Any) -> None:
    """As torch names its settings today, and as it did before 2.9."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = a @ b
    with few_bits():
        around = a @ b
        with way():
            assert torch.equal(a @ b, exact)
        assert torch.equal(a @ b, around)


def test_train_mode_changes_no_result_and_stays() -> None:
    model = zoo("mamba2").train()
    assert_same(expected("ghost"), results(model, "ghost"))
    assert model.training


def test_weights_made_in_inference_mode() -> None:
    """They are cut where they were made and elsewhere; gradients of them there are none, and that is said."""
    with torch.inference_mode():
        here, elsewhere, refused = (zoo("mamba2") for _ in range(3))
        found = results(here, "ghost")
    assert_same(expected("ghost"), found)
    assert_same(found, results(elsewhere, "ghost"))
    with pytest.raises(sspruner.ModelError, match=r"made under torch.inference_mode\(\)"):
        sspruner.score(refused, "taylor", calibration=DATA)
