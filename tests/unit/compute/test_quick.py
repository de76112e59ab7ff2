"""What makes a model quick on a CPU: the same numbers, and nothing of it is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.compute import quick
from sspruner.compute.products import Products
from sspruner.compute.quick import Wide, quick_on_cpu
from sspruner.evaluation.damage import damage
from support.tiny import tiny_model, tokens

CPU = torch.device("cpu")


def sizes(model: torch.nn.Module) -> list[int]:
    return [m.chunk_size for m in model.modules() if "chunk_size" in m.__dict__]


@pytest.mark.parametrize(("device", "inside"), [("cpu", 4), ("cuda", 8)])
def test_chunks_are_smaller_inside_on_a_cpu_alone_and_as_they_were_after_an_error(
    monkeypatch: pytest.MonkeyPatch, device: str, inside: int
) -> None:
    monkeypatch.setattr(quick, "CHUNK", 4)
    model = tiny_model()
    assert set(sizes(model)) == {8}

    def fails() -> None:
        with quick_on_cpu(model, torch.device(device)):
            assert set(sizes(model)) == {inside}
            with quick_on_cpu(model, torch.device(device)):
                assert set(sizes(model)) == {inside}
            assert set(sizes(model)) == {inside}
            assert model.config.chunk_size == 8
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert set(sizes(model)) == {8}


def test_a_chunk_that_is_small_already_stays() -> None:
    model = tiny_model()
    with quick_on_cpu(model, CPU):
        assert set(sizes(model)) == {8}


def test_scores_and_damage_do_not_depend_on_the_chunk_nor_on_how_sequences_are_batched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = tokens(4, 21)
    found = []
    for chunk, per_batch in ((64, 4), (4, 4), (3, 1)):
        monkeypatch.setattr(quick, "CHUNK", chunk)
        monkeypatch.setattr("sspruner.calibrate.sources.TOKENS_PER_BATCH", 21 * per_batch)
        model = tiny_model()
        result = sspruner.prune(model, "ghost", sparsity=0.5, calibration=ids, seed=0)
        assert set(sizes(model)) == {8}
        sspruner.save(result.model, tmp_path / f"{chunk}-{per_batch}")
        assert sspruner.load(tmp_path / f"{chunk}-{per_batch}")[0].config.chunk_size == 8
        found.append((result.scores.importance, result.report.pruned))
    for importance, pruned in found[1:]:
        for name, values in importance.items():
            torch.testing.assert_close(values, found[0][0][name], rtol=1e-5, atol=0)
        assert pruned["perplexity"] == pytest.approx(found[0][1]["perplexity"], rel=1e-5)


def test_chunks_are_restored_when_a_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "CHUNK", 4)
    model = tiny_model()
    graph = sspruner.trace(model)
    plan = sspruner.plan(graph, sspruner.score(model, "magnitude"), sparsity=0.5)
    with pytest.raises(IndexError):
        damage(model, plan, graph, [(torch.full((1, 3), 10**6), torch.ones(1, 3, dtype=torch.bool))])
    assert set(sizes(model)) == {8}


@given(
    st.sampled_from([torch.bfloat16, torch.float16]), st.integers(1, 40), st.integers(1, 70), st.integers(1, 9),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_wide_products_are_those_in_fp64_rounded_once(
    dtype: torch.dtype, rows: int, width: int, out: int, bias: bool, seed: int
) -> None:
    """Rounded once to the narrow type: half of its distance between numbers, and what fp32 sums lose."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, out))
    b = torch.randn(out, generator=generator).to(dtype) if bias else None
    with torch.no_grad(), Wide():
        y = F.linear(x, w, bias=b)
        same = w @ x.T
    assert y.dtype == same.dtype == dtype
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    lost = 1e-6 * F.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    unit = torch.finfo(dtype).eps
    if rows >= quick.ROWS:
        assert ((y.double() - exact).abs() <= unit / 2 * exact.abs() + lost + torch.finfo(dtype).tiny * unit).all()
    torch.testing.assert_close(y.double(), exact, rtol=2 * unit, atol=2 * unit * float(lost.max()) * 1e6)


def test_wide_products_go_through_fp32_where_that_pays_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(quick, "_wide", lambda value: seen.append(value.dtype) or value.float())
    w = torch.randn(3, 5).bfloat16()
    many, few = torch.randn(2, 16, 5).bfloat16(), torch.randn(1, 5).bfloat16()
    with torch.no_grad(), Wide():
        F.linear(few, w)
        F.linear(many.float(), w.float())
        assert not seen
        F.linear(many, w)
        assert seen == [torch.bfloat16] * 2
    weight = w.clone().requires_grad_()
    with Wide():
        F.linear(many, weight).float().sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert weight.grad is not None


def test_products_are_still_seen_inside() -> None:
    w, noted = torch.randn(3, 5).bfloat16(), []
    with torch.no_grad(), Wide(), Products({w: "w"}, lambda name, given: noted.append((name, given.dtype))):
        F.linear(torch.randn(20, 5).bfloat16(), w)
    assert noted == [("w", torch.bfloat16)]


@pytest.mark.parametrize("what", ["prune", "damage", "refit", "compare", "evaluate"])
def test_whatever_scores_or_measures_is_quick(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward of a mixer sees a small chunk, and the model has its own again afterwards."""
    monkeypatch.setattr(quick, "CHUNK", 4)
    model = tiny_model()
    graph, data = sspruner.trace(model), sspruner.calibration(tokens(8, 21), model, samples=6, held_out=2)
    plan = sspruner.plan(graph, sspruner.score(model, "magnitude"), sparsity=0.5)
    seen: set[int] = set()
    small = tiny_model(state=3)
    for layer in (*model.backbone.layers, *small.backbone.layers):
        layer.mixer.register_forward_pre_hook(lambda mixer, _: seen.add(mixer.chunk_size))
    if what == "prune":
        sspruner.score(model, "ghost", calibration=data)
    elif what == "damage":
        damage(model, plan, graph, data.held_out_batches(2))
    elif what == "refit":
        sspruner.refit(model, plan, calibration=data)
    elif what == "compare":
        sspruner.compare(model, ["magnitude"], sparsities=(0.5,), calibration=data, baseline=small)
    else:
        sspruner.evaluate(model, text=data.held_out, max_length=8, metrics=["perplexity", "length", "recall"])
    assert seen == {4}
    assert {*sizes(model), *sizes(small)} == {8}
