"""`sspruner.bench`: complete rows, ceilings by hand and as published, shapes as published. Nothing here is timed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.benchmarking import measure, resident, run
from sspruner.benchmarking.ceiling import Rates, Work, head_weights, prefill_work, step_work, token_operations
from sspruner.benchmarking.measure import order
from sspruner.benchmarking.run import Times, cache_bytes, run_once
from sspruner.benchmarking.shapes import SHAPES, shape_config, shape_model, shape_models
from sspruner.benchmarking.statistics import median_interval
from sspruner.compute.acceleration import accelerated
from sspruner.compute.forward import cache_in
from sspruner.errors import InputError
from sspruner.io.skeleton import skeleton
from support.command import done, refused, saved_model
from support.footprints import config_alone, taken
from support.gguf_cases import multimodal
from support.published import CONFIGS, DIGITS, PUBLISHED
from support.tiny import half, tiny_model, tokens
from support.zoo import FAMILIES, zoo

GIVEN: dict[str, Any] = {"bandwidth": 1e9, "flops": 1e11}
SMALL: dict[str, Any] = {"batches": (1, 3), "prompt": 9, "generate": 2, "repeats": 2, "device": "cpu", **GIVEN}


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sspruner.benchmarking import ceiling

    monkeypatch.setattr(ceiling, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(ceiling, "MATMUL", {"cpu": 16})


@pytest.mark.slow
def test_rows_are_complete_and_add_up() -> None:
    models = {"dense": tiny_model(state=8), "pruned": tiny_model(state=8)}
    sspruner.apply(models["pruned"], half(sspruner.trace(models["pruned"])))
    found = sspruner.bench(models, accelerate=True, **SMALL)
    labels = ("dense", "dense, accelerated", "pruned", "pruned, accelerated")
    asked = {(label, batch, phase) for label in labels for batch in (1, 3) for phase in ("decode", "prefill")}
    assert Counter((row.model, row.batch, row.phase) for row in found.rows) == Counter(asked)
    for row in found.rows:
        size = taken(models[row.model.split(",")[0]], 10)
        data = row.to_json()
        assert len(row.seconds) == 2
        assert row.tokens == row.batch * (9 if row.phase == "prefill" else 1)
        assert (row.state_bytes, row.weight_bytes) == (size.state_bytes, size.weight_bytes)
        low, high = data["tokens_per_second"][1:]
        assert low <= data["tokens_per_second"][0] <= high
        assert data["tokens_per_second"][1] == pytest.approx(1000 * row.tokens / data["ms"][2])
        assert data["fraction"] == pytest.approx(data["tokens_per_second"][0] / data["ceiling_tokens_per_second"])
        assert ("sspruner.accelerate" in row.path) == ("accelerated" in row.model and row.phase == "decode")
        assert row.peak_bytes is None or 0 < row.peak_bytes < 2**30  # exactly: the next test
        if row.phase == "decode":
            assert row.work.bytes == size.step_bytes(row.batch)
    dense = found.row("dense", 3)
    assert dense.speedup(dense) == (1, 1, 1)
    assert replace(dense, seconds=(1.0, 2.0)).speedup(replace(dense, seconds=(3.0, 6.0))) == (3, 3, 3)
    assert not any(map(accelerated, models.values()))


def test_peak_on_the_cpu_is_weights_cache_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of resident bytes that are made up: 100 MB at the start of each phase, 107 at the most."""
    model = tiny_model(state=8)
    monkeypatch.setattr(resident, "start", lambda: 100_000_000)
    monkeypatch.setattr(resident, "peak", lambda: 107_000_000)
    ids = torch.zeros(3, 9, dtype=torch.long)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = run_once(model, ids, 1, memory=True)
    assert found.prefill_peak == weights + 7_000_000
    held = found.step_peak - found.prefill_peak if found.step_peak and found.prefill_peak else 0
    with torch.no_grad():
        assert held == cache_bytes(cache_in(model(ids, use_cache=True))) > 0
    assert run_once(model, ids, 1).step_peak is None
    monkeypatch.setattr(resident, "start", lambda: None)
    assert run_once(model, ids, 1, memory=True).prefill_peak is None
    assert {row.peak_bytes for row in sspruner.bench({"one": model}, **SMALL).rows} == {None}


@pytest.mark.skipif(not resident.CLEAR.exists(), reason="only Linux tells what is resident")
def test_resident_peak_sees_what_is_gone_and_starts_anew() -> None:
    before = resident.start()
    assert before is not None
    size = 2**28
    torch.ones(size, dtype=torch.uint8)
    assert 0.95 * size <= resident.peak() - before < 1.5 * size  # the system counts by groups of pages
    before = resident.start()
    assert before is not None
    assert resident.peak() - before < size // 2


def test_what_is_resident_is_not_told_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "CLEAR", tmp_path / "none" / "clear_refs")
    assert resident.start() is None
    monkeypatch.setattr(resident, "CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmSize: 7 kB\n", encoding="utf-8")
    assert resident.start() is None
    (tmp_path / "status").write_text("VmSize: 7 kB\nVmHWM:\t 9 kB\nVmRSS:\t 5 kB\n", encoding="utf-8")
    assert (resident.start(), resident.peak()) == (5 * 1024, 9 * 1024)


def test_json_is_what_other_commands_read(tmp_path: Path) -> None:
    found = sspruner.bench({"one": tiny_model()}, **SMALL)
    found.save(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert data["version"] == 1
    assert {"device", "threads", "name"} <= set(data["machine"])
    assert (data["prompt"], data["generate"], data["seed"]) == (9, 2, 0)
    assert {"versions", "command"} <= set(data)
    keys = {"model", "batch", "phase", "tokens_per_second", "ms", "ceiling_tokens_per_second", "fraction"}
    keys |= {"peak_bytes", "state_bytes", "weight_bytes", "path"}
    assert all(keys <= set(row) for row in data["rows"])
    assert len(data["rows"]) == 4


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_every_repeat_measures_everything_in_an_order_of_its_own(jobs: int, repeats: int, seed: int) -> None:
    turns = list(order(range(jobs), repeats, seed))
    assert [sorted(turn) for turn in turns] == [list(range(jobs))] * repeats
    assert turns == list(order(range(jobs), repeats, seed))


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured once in every repeat; the order differs between repeats; what comes before is not timed."""
    models = {name: tiny_model(seed=i) for i, name in enumerate("abc")}
    names, seen = {id(model): name for name, model in models.items()}, []

    def fake(model: Any, ids: torch.Tensor, generate: int, *, cuda_graph: bool, memory: bool) -> Times:
        seen.append((names[id(model)], ids.shape[0]))
        return Times(float(len(seen)), float(len(seen)), len(seen) if memory else None, None)

    monkeypatch.setattr(measure, "run_once", fake)
    found = sspruner.bench(models, **SMALL | {"repeats": 4})
    turns = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert len(turns) == 6  # a warm-up, one for memory, and the repeats
    assert all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert any(a != b for a, b in pairwise(turns[2:]))
    assert all(second > 12 for row in found.rows for second in row.seconds)
    assert found.row("b", 3).seconds == tuple(6 * i + 1.0 + turns[i].index(("b", 3)) for i in range(2, 6))
    assert found.row("b", 3, "prefill").peak_bytes == 7 + turns[1].index(("b", 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_uses_the_cache(family: str) -> None:
    """Every family: what is cached is what its footprint says, and a bench of it ends."""
    model, seen = zoo(family), []
    held = run.cache_in

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cache_in", lambda out: seen.append(held(out)) or held(out))
        run.run_once(model, tokens(3, 9), 2)
    size = taken(model, 11)
    assert cache_bytes(seen[-1]) == 3 * (size.state_bytes + size.conv_bytes + size.kv_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_token_by_flop_counting(family: str) -> None:
    """torch's own count of what matrix products do in one forward over one token is what weights say, states aside."""
    from torch.utils.flop_counter import FlopCounterMode

    model = zoo(family)
    size = taken(model, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, 1), use_cache=False)
    counted = counter.get_total_flops()
    operations = token_operations(model, size) - 5 * size.state_bytes // 4
    assert operations <= counted + 2 * sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1)
    assert operations >= 2 * head_weights(model)


def test_operations_by_hand() -> None:
    """Mamba2: in_proj, out_proj, the convolution, the head: two each; five for each number of the state."""
    model = tiny_model(layers=2, groups=2, heads_per_group=2, head_dim=4, state=6, conv=3)
    rows, inner, hidden, channels = 2 * 16 + 2 * 2 * 6 + 4, 16, 8, 16 + 2 * 2 * 6
    layer = hidden * rows + inner * hidden + channels * 3
    size = taken(model, 7)
    operations = token_operations(model, size)
    assert operations == 2 * (2 * layer + 31 * hidden) + 5 * 2 * 4 * 4 * 6
    assert step_work(size, operations, 5) == Work(size.step_bytes(5), 5 * operations)
    whole = prefill_work(size, operations, head_weights(model), 5, 7)
    assert whole.operations == 5 * (7 * (operations - 2 * 31 * hidden) + 2 * 31 * hidden)
    assert whole.bytes == size.fixed_read_bytes + 5 * (size.state_bytes + size.conv_bytes)


def test_a_token_passes_no_vision_part() -> None:
    model = multimodal()
    size = taken(model, 7)
    operations = token_operations(model, size)
    assert any(p.ndim > 1 for p in model.model.visual.parameters())
    del model.model.visual
    assert token_operations(model, size) == operations


def test_the_slower_of_bytes_and_operations_is_the_ceiling() -> None:
    assert Work(100, 1000).seconds(Rates(10.0, 1000.0)) == 10.0
    assert Work(100, 1000).seconds(Rates(1000.0, 10.0)) == 100.0


PUBLISHED_CEILINGS = {64: {1: 1.04, 16: 1.37, 64: 1.71, 256: 1.91}, 16: {1: 1.07, 16: 1.91, 64: 3.62, 256: 5.94}}


@pytest.mark.slow
@pytest.mark.parametrize("keep", PUBLISHED_CEILINGS)
def test_the_published_ceilings_of_mamba2_of_13_billion(keep: int, tmp_path: Path) -> None:
    """(2.69e9 + b 201e6) / (2.69e9 + b 201e6 k/128) counts weights and states alone. Ours counts convolution states as
    well, and that rows of B and C are gone: by hand.
    """
    dense = replace(taken(skeleton(config_alone(tmp_path / "model", CONFIGS["Mamba2-1.3B"])), 0), conv_bytes=0)
    cut = replace(dense, state_bytes=dense.state_bytes * keep // 128)
    real = taken(shape_model("mamba2-1.3b", keep, dtype=torch.bfloat16, device="meta"), 0)
    weights = 1_343_757_312 - 48 * 2 * (128 - keep) * (2048 + 4 + 1)  # a row of in_proj, its convolution and bias
    for batch, ratio in PUBLISHED_CEILINGS[keep].items():
        rates = Rates(3.35e12, 1e30)
        seconds = [step_work(one, 0, batch).seconds(rates) for one in (dense, cut)]
        assert seconds[0] / seconds[1] == pytest.approx(ratio, abs=0.0051)
        states = 48 * (64 * 64 * keep * 4 + (4096 + 2 * keep) * 4 * 2)
        assert step_work(real, 0, batch).bytes == 2 * weights + batch * 2 * states


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_the_published_ones(shape: str) -> None:
    name = {key.lower(): key for key in CONFIGS}[shape]
    model = shape_model(shape, dtype=torch.bfloat16, device="meta")
    total = taken(model, 0).parameters
    assert abs(total - PUBLISHED[name]) <= DIGITS[name] / 2
    config = model.config.to_dict()
    assert {key: config[key] for key in CONFIGS[name] if key != "dtype"} == {
        key: value for key, value in CONFIGS[name].items() if key != "dtype"
    }


@pytest.mark.slow
def test_smaller_states_of_a_shape() -> None:
    found = shape_models(["mamba2-130m"], [16], [8], layers=1)
    states = {label: taken(model, 0).state_bytes for label, model in found.items()}
    size = 24 * 64 * 4
    expected = {"": 128 * size, ", state 16": 16 * size, ", balanced 8": 8 * size}
    assert states == {f"mamba2-130m{label}": value for label, value in expected.items()}
    with torch.no_grad():
        for model in found.values():
            assert model(input_ids=tokens(1, 3)).logits.isfinite().all()


@pytest.mark.parametrize(("shape", "keep"), [("mamba2-3b", 128), ("mamba2-130m", 0), ("mamba2-130m", 129)])
def test_shapes_that_there_are_not(shape: str, keep: int) -> None:
    with pytest.raises(InputError, match="shape"):
        shape_config(shape, keep)


def test_what_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.run_once

    def full(model: Any, ids: torch.Tensor, generate: int, **how: Any) -> Times:
        if ids.shape[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, generate, **how)

    monkeypatch.setattr(measure, "run_once", full)
    found = sspruner.bench({"one": tiny_model()}, **SMALL)
    assert {row.batch for row in found.rows} == {1}
    assert [(one["model"], one["batch"]) for one in found.failed] == [("one", 3)]


def test_other_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, *args: Any, **how: Any) -> Times:
        if accelerated(model):
            raise RuntimeError("shapes cannot be multiplied")
        return Times(1.0, 1.0, None, None)

    monkeypatch.setattr(measure, "run_once", broken)
    model = tiny_model()
    with pytest.raises(RuntimeError, match="multiplied"):
        sspruner.bench({"one": model}, accelerate=True, **SMALL)
    assert not accelerated(model)


def test_the_interval_is_one_of_order_statistics() -> None:
    """6 values: least and most (97 %); 20: the 6th and the 15th (95.9 %), as tables have it."""
    assert median_interval([3, 1, 2]) == (2, 1, 3)
    assert median_interval(range(1, 7)) == (3.5, 1, 6)
    assert median_interval(range(1, 21)) == (10.5, 6, 15)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.randoms())
def test_the_interval_holds_the_median_and_knows_no_order(values: list[float], rng: Any) -> None:
    found = median_interval(values)
    assert found[1] <= found[0] <= found[2]
    rng.shuffle(values)
    assert median_interval(values) == found


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folder, file = saved_model(tmp_path / "model"), tmp_path / "bench.json"
    small = ("--batch", "1,2", "--prompt", 5, "--generate", 2, "--repeats", 2, "--device", "cpu")
    shown = done("bench", folder, *small, "--accelerate", "--profile", "--json", file).stdout
    for words in (
        "decode",
        "prefill",
        "speed-up",
        "reached",
        "measured in this run",
        "one decode step",
        "aten::",
        "sspruner.accelerate",
    ):
        assert words in shown
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["command"].startswith("sspruner bench")
    assert [row["batch"] for row in data["rows"]] == [1, 1, 2, 2] * 2
    profiled = data["profile"]
    assert set(profiled) == {str(folder), f"{folder}, accelerated"}
    assert all(row["ms"] > 0 for rows in profiled.values() for row in rows)
    printed = json.loads(done("bench", folder, *small, "--json", "-", "--bandwidth", "1GB/s").stdout)
    assert printed["machine"]["bandwidth"] == 1e9
    assert printed["machine"]["measured"] == ["flops"]


@pytest.mark.parametrize(
    ("says", "asked"),
    [
        (("--batch", "'0'"), ("--batch", "0")),
        (("--keep", "--shape"), ("--keep", "64")),
        (("mamba2-9b", "mamba2-1.3b"), ("--shape", "mamba2-9b")),
        (("keep 200", "128"), ("--shape", "mamba2-130m", "--keep", "200")),
        (("prompt 0",), ("--prompt", "0")),
        (("cuda_graph", "cpu"), ("--cuda-graph", "--device", "cpu")),
        (("--flops", "fast"), ("--flops", "fast")),
        (("dtype",), ("--dtype", "int8")),
        (("twice",), ("--shape", "mamba2-130m", "--shape", "mamba2-130m")),
    ],
)
def test_wrong_requests_are_one_line(says: tuple[str, ...], asked: tuple[str, ...], tmp_path: Path) -> None:
    refused(tmp_path, says, "bench", *asked)
