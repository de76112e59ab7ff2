"""Fill a leaderboard: prune each model by each recipe with each seed, and measure on text that no recipe saw.

Each cell (recipe, model, cut, seed) is kept in a file as soon as it is measured, so that an interrupted run continues.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.benchmarking import resident
from sspruner.benchmarking.ceiling import synchronise
from sspruner.calibrate.seen import refuse_seen, seen_of
from sspruner.calibrate.sources import Calibration, Progress, calibration
from sspruner.comparison.board import KL, RATIO, RECALL, Dense, Entry, Leaderboard, Refusal, Row
from sspruner.compute.device import on_device, resolve_device
from sspruner.compute.forward import check_predicts_tokens, forward
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError, ModelError, PlanError
from sspruner.evaluation.measures import Inputs, Values, inputs_for, measure
from sspruner.evaluation.paired import Interval, mean, perplexity, perplexity_ratio, rate
from sspruner.files import strict_json
from sspruner.files.output import write_file
from sspruner.files.provenance import versions
from sspruner.formats.fitting import Subject, unfit
from sspruner.formats.targets import target
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.trace import trace
from sspruner.pruning.prune import prune
from sspruner.recipes.parts import CalibrationText
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.yaml import from_data
from sspruner.scoring.known import find_scorer

CELLS = ".cells"  # in the folder of a leaderboard: cells that are measured
RUNTIMES = ("hf", "vllm", "llama.cpp")
NOT_PRUNING = ("calibration", "evaluation")  # phases that are not counted as seconds of a prune
BESIDE = 2  # windows that the calibration holds out for `prune`; what it measures on them is not used

Cell = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a leaderboard is made. load: name -> model and tokenizer. cells: folder of cells that are measured."""

    load: Callable[[str], tuple[Any, Any]]
    cells: Path
    device: torch.device = field(default_factory=lambda: resolve_device(None))
    progress: Progress | None = None


@dataclass(frozen=True)
class Bench:
    """A dense model, the text and tasks that its cuts are measured on, and calibration text by seed.

    calibrated: seed -> text, and the seconds of a pass of the dense model over it.
    """

    model: nn.Module
    tokenizer: Any
    inputs: Inputs
    values: Values
    calibrated: dict[int, tuple[Calibration, float]] = field(default_factory=dict)


def filled(board: Leaderboard, place: Place, named: Sequence[str]) -> Iterator[Leaderboard]:
    """Yield the leaderboard after every entry that was missing.

    named: rows that are measured again where their scorer's code has changed; of others only what is missing is made.
    Raises InputError for a model that is not the one that the leaderboard measured, and for a recipe that was
    calibrated on text that is reported.
    """
    for name in board.settings.models:
        lacking = [(label, s) for label in board.rows for s in _lacking(board, label, name, label in named)]
        if not lacking:
            continue
        bench = _bench(board, name, place)
        board = replace(board, dense={**board.dense, name: _dense(board, name, bench)})
        for number, (label, sparsity) in enumerate(lacking):
            if place.progress:
                place.progress(f"{name}: {label}, {100 * sparsity:g} %", number, len(lacking))
            row = board.rows[label]
            key = _key(board, row, name)
            cells = [_cell(board, row, bench, (key, sparsity, seed), place) for seed in board.settings.seeds]
            row = row.with_entry(name, sparsity, pooled(cells, board.settings.seeds, key))
            board = replace(board, rows={**board.rows, label: row})
            yield board


def _lacking(board: Leaderboard, label: str, model: str, named: bool) -> list[float]:
    """Return the cuts of a row that are not made, or not with these seeds.

    Of a named row also those that were refused, and those made by other code.
    """
    row, found = board.rows[label], []
    for sparsity in board.settings.sparsities:
        entry = row.of(model, sparsity)
        whole = (isinstance(entry, Refusal) and not named) or (
            isinstance(entry, Entry) and entry.seeds == board.settings.seeds
        )
        if not whole or (named and entry and model in board.dense and entry.key != _key(board, row, model)):
            found.append(sparsity)
    return found


def _key(board: Leaderboard, row: Row, model: str) -> str:
    """Return a hash of what the entries of a row depend on, but for their cut and seeds, and the engine's code."""
    cls = find_scorer(row.recipe["method"]["scorer"])[0]
    file = Path(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
    code = file.read_text(encoding="utf-8") if file.is_file() else ""
    shared = board.settings.calibration, board.settings.measured, board.settings.windows
    dense = board.dense[model]
    text = strict_json.dumps({"of": [row.recipe, shared, dense.fingerprint, dense.text, code]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bench(board: Leaderboard, name: str, place: Place) -> Bench:
    """Load a model, and measure it on the reported text; on recall, too, if it was trained on that."""
    settings = board.settings
    model, tokenizer = place.load(name)
    check_predicts_tokens(model, "leaderboard")
    how: dict[str, Any] = {"samples": settings.windows, "seq_len": settings.calibration["seq_len"], "held_out": 0}
    with on_device(model, place.device):
        text = calibration(settings.measured, model, tokenizer, **how, text_column=settings.calibration["text_column"])
        metrics = ["ppl", "recall"] if hasattr(getattr(model, "config", None), "recall_pairs") else ["ppl"]
        inputs = inputs_for(model, list(text.batches(logits=True)), metrics, (), 0)
        with quick_on_cpu(model, place.device):
            (values,) = measure(model, [lambda: nullcontext(model)], inputs)
    return Bench(model, tokenizer, inputs, values)


def _dense(board: Leaderboard, name: str, bench: Bench) -> Dense:
    """Return the record of a dense model. Raises InputError if it is not the model that was measured before."""
    graph, values = trace(bench.model), bench.values
    assert values.text is not None
    measures = {"perplexity": perplexity(values.text.nll, values.text.tokens)}
    if RECALL in values.items:
        measures[RECALL] = mean(values.items[RECALL])
    windows = b"".join(tokens.numpy().tobytes() + mask.numpy().tobytes() for tokens, mask in bench.inputs.batches)
    text = hashlib.sha256(windows).hexdigest()
    dense = Dense(fingerprint(bench.model), measures, graph.state_bytes, graph.parameters, text)
    before = board.dense.get(name, dense)
    if (before.fingerprint, before.text) != (dense.fingerprint, dense.text):
        what = "model" if before.fingerprint != dense.fingerprint else "text"
        raise InputError(f"leaderboard, {name}: the {what} is not the one that its rows were measured with; give "
                         "another folder")  # fmt: skip
    return before


def _cell(board: Leaderboard, row: Row, bench: Bench, which: tuple[str, float, int], place: Place) -> Cell:
    """Return the cell of an entry and a seed, from its file or newly made. which: the row's key, sparsity and seed."""
    key, sparsity, seed = which
    file = place.cells / f"{key}-{sparsity!r}-{seed}.json"
    if (cell := _read(file)) is None or "error" in cell:  # a reason is not kept: another version may have none
        cell = _made(board, row, bench, (sparsity, seed), place)
        if "error" not in cell:
            write_file(file, strict_json.dumps(cell))
    return cell


def _read(file: Path) -> Cell | None:
    """Read a finished cell; None if there is none, or if it cannot be read."""
    try:
        cell: Cell = strict_json.loads(file.read_text(encoding="utf-8"))
    except strict_json.DAMAGE:
        return None
    return cell


def _made(board: Leaderboard, row: Row, bench: Bench, which: tuple[float, int], place: Place) -> Cell:
    """Prune a copy of the model, and measure it; or return the reason why it cannot be pruned like this."""
    sparsity, seed = which
    recipe: Recipe = from_data(Recipe, row.recipe)
    recipe = replace(
        recipe,
        budget=replace(recipe.budget, sparsity=sparsity),
        method=replace(recipe.method, seed=seed),
        calibration=CalibrationText(**board.settings.calibration),
    )
    data, one_pass = _calibrated(recipe.calibration, bench, seed, place)
    small = copy.deepcopy(bench.model)
    source: dict[str, Any] = {"calibration": data}
    if recipe.method.refit == "reconstruct":  # which reads more windows of the text
        source = {"tokenizer": bench.tokenizer}
    before = _bytes_now(place.device) if seed == board.settings.seeds[0] else None
    try:
        result = prune(small, recipe, device=str(place.device), **source)
    except (InputError, PlanError, ModelError) as error:
        return {"error": str(error)}
    memory = None if before is None else _peak_bytes(place.device) - before
    reported = (row[kept] for tokens, mask in bench.inputs.batches for row, kept in zip(tokens, mask, strict=True))
    refuse_seen(seen_of(small), reported, f"leaderboard, text {board.settings.measured}")
    seconds = sum(s for phase, s in result.report.seconds.items() if phase not in NOT_PRUNING)
    device = place.device
    with (
        on_device(bench.model, device),
        on_device(small, device),
        quick_on_cpu(bench.model, device),
        quick_on_cpu(small, device),
    ):
        (values,) = measure(bench.model, [lambda: nullcontext(small)], bench.inputs)
    subject = Subject.of(small)
    return {
        **_numbers(values, bench.values),
        "state_bytes": subject.graph.state_bytes,
        "parameters": subject.graph.parameters,
        "seconds": seconds,
        "forwards": seconds / one_pass,
        "memory": memory,
        "loads": {name: " ".join(unfit(subject, target(name)).split()) for name in RUNTIMES},
    }


def _calibrated(text: CalibrationText, bench: Bench, seed: int, place: Place) -> tuple[Calibration, float]:
    """Return the calibration text of a seed, and the seconds of a second pass of the dense model over it."""
    if seed not in bench.calibrated:
        how: dict[str, Any] = {"samples": text.samples, "seq_len": text.seq_len, "text_column": text.text_column}
        with on_device(bench.model, place.device), quick_on_cpu(bench.model, place.device), torch.no_grad():
            data = calibration(text.source, bench.model, bench.tokenizer, **how, held_out=BESIDE, seed=seed)
            for _ in range(2):  # the first pass finds out what is quick, and fills caches
                synchronise(place.device)
                start = time.perf_counter()
                for tokens, mask in data.batches():
                    forward(bench.model, tokens, mask, use_cache=False)
                synchronise(place.device)
            bench.calibrated[seed] = data, time.perf_counter() - start
    return bench.calibrated[seed]


def _bytes_now(device: torch.device) -> int | None:
    """Return the bytes in use, of the GPU or of this process, and begin to note their peak.

    None where the system does not say.
    """
    if device.type != "cuda":
        return resident.start()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_bytes(device: torch.device) -> int:
    """Return the peak since `_bytes_now`, which has returned a number."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident.peak()


def _numbers(values: Values, dense: Values) -> Cell:
    """Return what was measured: sums by window of text, and a share by recall task, of the cut and the dense model."""
    assert values.text is not None
    assert values.text.kl is not None
    assert dense.text is not None
    text = {"nll": values.text.nll, "dense_nll": dense.text.nll, "kl": values.text.kl, "tokens": values.text.tokens}
    found = {name: part.tolist() for name, part in text.items()}
    return found | ({RECALL: values.items[RECALL].tolist()} if RECALL in values.items else {})


def pooled(cells: Sequence[Cell], seeds: Sequence[int], key: str) -> Entry | Refusal:
    """Return the entry of several seeds: intervals are over windows and tasks, of each the mean over seeds."""
    for cell in cells:
        if "error" in cell:
            return Refusal(cell["error"], key)
    nll, dense, kl, tokens = (_mean(cells, name) for name in ("nll", "dense_nll", "kl", "tokens"))
    measures: dict[str, Interval] = {RATIO: perplexity_ratio(nll, dense, tokens), KL: rate(kl, tokens)}
    if RECALL in cells[0]:
        measures[RECALL] = mean(_mean(cells, RECALL))
    memory = [cell["memory"] for cell in cells if cell["memory"] is not None]
    timed = [cell for cell in cells if cell["memory"] is None] or cells  # page faults while memory is noted take time
    return Entry(
        measures=measures,
        state_bytes=max(cell["state_bytes"] for cell in cells),
        parameters=max(cell["parameters"] for cell in cells),
        seconds=sum(cell["seconds"] for cell in timed) / len(timed),
        forwards=sum(cell["forwards"] for cell in timed) / len(timed),
        memory=max(memory) if memory else None,
        loads=cells[0]["loads"],
        seeds=tuple(seeds),
        key=key,
        made_with=versions()["sspruner"],
    )


def _mean(cells: Sequence[Cell], name: str) -> torch.Tensor:
    """Return the mean over seeds by window or task, fp64 (items,)."""
    return torch.tensor([cell[name] for cell in cells], dtype=torch.float64).mean(0)
