"""Measure what every scorer costs: seconds and peak memory of scoring a whole model, as ratios to one plain forward.

Both over the same tokens, fp32. Scoring is all that `sspruner.prune` does to know what goes: every block observed or
differentiated, cut, and run once more for the next one's input (one-shot: not cut). Every row has a process of its own:
first the growth of peak resident memory over the loaded model (Linux), then forward and scoring in turn, in seconds.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from common import (
    NO,
    Made,
    Subject,
    forward,
    growth,
    in_fresh_process,
    mib,
    over,
    progress,
    random_model,
    random_tokens,
    table,
    timed,
    wait_until_quiet,
)

import sspruner

Row = dict[str, Any]  # fields of a recipe; none: the plain forward


def model_and_data(name: str, data: Path, size: tuple[int, int]) -> tuple[Any, sspruner.Calibration]:
    """Return a model, and its calibration of so many sequences and tokens in each."""
    if name != "130M":
        subject = Subject(name, data)
        return subject.model, subject.text("books-val.txt", size[0], seq_len=size[1])
    model = random_model(hidden=768, heads=24, layers=24)
    return model, sspruner.calibration(random_tokens(*size), model, samples=size[0], held_out=0)


def run(model: Any, data: sspruner.Calibration, row: Row) -> float:
    """Return the seconds of the phase `scoring` of a prune in mask mode, or of the forward. The model stays."""
    if not row:
        return timed(lambda: forward(model, data.tokens))
    result = sspruner.prune(model, calibration=data, sparsity=0.5, mode="mask", **row)
    sspruner.unmask(model)
    return float(result.report.seconds["scoring"])


def measure(name: str, data: Path, size: tuple[int, int], row: Row, repeats: int, threads: int) -> Row:
    """Return bytes of a row, or of the plain forward, and seconds of both. For a fresh process."""
    torch.set_num_threads(threads)
    small, ids = random_model(hidden=64, heads=2), random_tokens(2, 32)
    with suppress(sspruner.SSPrunerError):
        run(small, sspruner.calibration(ids, small, samples=2, held_out=0), row)  # libraries are loaded by now
    try:
        model, seen = model_and_data(name, data, size)
        found = {"bytes": growth(lambda: run(model, seen, row)), "weights": model.get_memory_footprint()}
        wait_until_quiet()
        turns = [(run(model, seen, {}), run(model, seen, row)) for _ in range(repeats)]
        return found | {"forward": [plain for plain, _ in turns], "scoring": [own for _, own in turns]}
    except sspruner.SSPrunerError as error:
        return {"error": str(error)}


def cells(found: Row, plain: Row) -> list[str]:
    """Return the cells of a row. found, plain: of the scorer and of the forward."""
    if "error" in found:
        return [NO] * 5
    whole = (plain["weights"] + found["bytes"]) / (plain["weights"] + plain["bytes"])
    times = [f"{median(found['scoring']):.2f}", over(found["scoring"], found["forward"])]
    return [*times, mib(found["bytes"]), f"{found['bytes'] / plain['bytes']:.2f}", f"{whole:.2f}"]


def one_table(name: str, recipe: Row, s: Any) -> str:
    """Return the table of a model."""
    size, without = recipe["models"][name]["tokens"], recipe["models"][name]["without"]
    plain = in_fresh_process(measure, name, s.data, size, {}, 0, torch.get_num_threads())
    lines, failed, taken = [], "", {}
    rows = [(axis, label, row) for axis, rows in recipe["rows"].items() for label, row in rows.items()]
    for axis, label, row in rows[:2] if s.quick else rows:
        if row["scorer"] in without:
            continue
        found = in_fresh_process(measure, name, s.data, size, row | {"axis": axis}, s.repeats, torch.get_num_threads())
        lines.append([label, axis, *cells(found, plain)])
        progress(f"{name}: {' | '.join(lines[-1])} {found.get('error', '')}")
        failed += f"\n\n– {label}, {axis}: {found['error']}" if "error" in found else ""
        taken[label] = found.get("bytes")
    head = ["scorer", "axis", "scoring, s", "/ forward (least to most)", "peak extra MiB", "/ forward's"]
    weights, extra = mib(plain["weights"]), mib(plain["bytes"])
    title = f"{name}, {size[0]} x {size[1]} tokens: weights {weights} MiB, a forward takes {extra} MiB more"
    made = table(title, [*head, "/ forward's, weights counted"], lines) + failed
    for turn in ("taylor", "taylor, fisher"):
        if taken.get(turn) and taken.get(f"{turn}, one-shot"):
            ratio = taken[turn] / taken[f"{turn}, one-shot"]
            made += f"\n\nPeak extra memory of {turn}, layer by layer to one-shot: {ratio:.2f}."
    return made


def tables(s: Any) -> Made:
    """Return a table for each model. Settings: models, repeats."""
    recipe = yaml.safe_load(s.file.read_text(encoding="utf-8"))
    return [one_table(name, recipe, s) for name in s.models], f"seed 0; {s.repeats} repeats"
