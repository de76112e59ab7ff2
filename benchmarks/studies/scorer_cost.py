"""What every scorer costs: seconds and peak memory of scoring a whole model, as ratios to one plain forward of it.

Both over the same tokens, fp32. Scoring is all that `sspruner.prune` does to know what goes: every block observed or
differentiated, cut, and run once more for the next one's input (one-shot: not cut). Every row has a process of its own:
first the growth of peak resident memory over the loaded model (Linux), then forward and scoring in turn, in seconds;
ratios are taken within a repeat. "130M": random weights in the shape of Mamba2-130M, vocabulary 4096, random tokens.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    Made,
    Subject,
    growth,
    in_fresh_process,
    mib,
    progress,
    random_model,
    random_tokens,
    span,
    table,
    timed,
    wait_until_quiet,
)  # fmt: skip

import sspruner

ROWS = {  # axis -> scorers, with options and one-shot
    "state": (
        "random", "magnitude", "wanda", "ghost", "ghost, one-shot", "ghost, variant=means", "ghost, variant=output",
        "balanced", "balanced, weights=none", "rrqr", "last", "snip", "taylor", "taylor, one-shot",
        "taylor, order=fisher", "taylor, order=fisher, one-shot", "tp:magnitude", "tp:lamp", "tp:fpgm", "tp:taylor",
        "tp:hessian", "sparsessm",
    ),
    "head": ("flap", "head-merge"),
    "block": ("block-influence", "perplexity-drop", "perplexity-drop, stop=1"),
    "weight": ("wanda", "sparsegpt", "gradmag"),
}  # fmt: skip
MODELS = {"mamba2-books-4m": (8, 256), "mamba1-books": (8, 256), "130M": (4, 128)}  # -> sequences, tokens in each
MAMBA1_ONLY, MAMBA2_ONLY = ("sparsessm",), ("balanced", "flap", "head-merge")
SLOW = 20.0  # seconds; what takes longer is timed once


def arguments(row: str) -> dict[str, Any]:
    """Return the fields of a recipe that a row's text stands for."""
    scorer, *more = row.split(", ")
    options = dict(part.split("=") for part in more if "=" in part)
    values = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    return {"scorer": scorer, "options": values, "one_shot": "one-shot" in more}


def label(row: str) -> str:
    """Return the name of a row in the table."""
    return ", ".join(part.rpartition("=")[2] for part in row.split(", "))


def model_and_data(name: str, data: Path) -> tuple[Any, sspruner.Calibration]:
    """Return a model of MODELS, and its calibration."""
    if name != "130M":
        subject = Subject(name, data)
        return subject.model, subject.text("books-val.txt", *MODELS[name])
    model = random_model(hidden=768, heads=24, layers=24)
    return model, sspruner.calibration(random_tokens(*MODELS[name]), model, samples=MODELS[name][0], held_out=0)


def scoring(model: Any, data: sspruner.Calibration, axis: str, row: str) -> float:
    """Return the seconds of the phase `scoring` of a prune in mask mode; the model is as before afterwards."""
    how = {"axis": axis, "sparsity": 0.5, "mode": "mask"} | arguments(row)
    result = sspruner.prune(model, calibration=data, **how)
    sspruner.unmask(model)
    return float(result.report.seconds["scoring"])


@torch.no_grad()
def forward(model: Any, data: sspruner.Calibration) -> None:
    """Run the model once over the calibration."""
    model(input_ids=data.tokens, attention_mask=data.mask.long(), use_cache=False)


def measure(name: str, data: Path, axis: str, row: str, repeats: int, threads: int) -> dict[str, Any]:
    """Return bytes of a row, or of the plain forward (row=""), and seconds of both. For a fresh process."""
    torch.set_num_threads(threads)

    def run(model: Any, seen: sspruner.Calibration) -> float:
        return scoring(model, seen, axis, row) if row else timed(lambda: forward(model, seen))

    small, ids = random_model(hidden=64, heads=2), random_tokens(2, 32)
    with suppress(sspruner.SSPrunerError):
        run(small, sspruner.calibration(ids, small, samples=2, held_out=0))  # libraries and threads are loaded by now
    try:
        case = model_and_data(name, data)
        found: dict[str, Any] = {"bytes": growth(lambda: run(*case)), "weights": case[0].get_memory_footprint()}
        found |= {"seconds": [], "ratios": []}
        while row and len(found["seconds"]) < repeats and max(found["seconds"], default=0) < SLOW:
            wait_until_quiet(10)
            plain = timed(lambda: forward(*case))
            found["seconds"].append(run(*case))
            found["ratios"].append(found["seconds"][-1] / plain)
        return found
    except sspruner.SSPrunerError as error:
        return {"error": str(error)}


def line(found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Return the cells of a row. found, plain: of the scorer and of the forward."""
    if "error" in found:
        return ["–"] * 5
    ratios, more = sorted(found["ratios"]), found["bytes"]
    whole = (plain["weights"] + more) / (plain["weights"] + plain["bytes"])
    times = [f"{median(found['seconds']):.2f}", span((median(ratios), ratios[0], ratios[-1]))]
    return [*times, mib(more), f"{more / plain['bytes']:.2f}", f"{whole:.2f}"]


def one_table(name: str, s: Any) -> str:
    """Return the table of a model."""
    threads, mamba1 = torch.get_num_threads(), name == "mamba1-books"
    plain = in_fresh_process(measure, name, s.data, "", "", 0, threads)
    lines, failed, taylor = [], [], {}
    for axis, rows in ROWS.items():
        for row in rows:
            scorer = row.split(", ")[0]
            if scorer in (MAMBA2_ONLY if mamba1 else MAMBA1_ONLY) or scorer not in getattr(s, "rows", [scorer]):
                continue
            found = in_fresh_process(measure, name, s.data, axis, row, s.repeats, threads)
            lines.append([label(row), axis, *line(found, plain)])
            progress(f"{name}: {' | '.join(lines[-1])} {found.get('error', '')}")
            failed += [f"\n\n– {label(row)}, {axis}: {found['error']}"] if "error" in found else []
            taylor[label(row)] = found.get("bytes")
    head = ["scorer", "axis", "scoring, s", "/ forward (least to most)", "peak extra MiB", "/ forward's"]
    weights, extra, (count, length) = mib(plain["weights"]), mib(plain["bytes"]), MODELS[name]
    title = f"{name}, {count} x {length} tokens: weights {weights} MiB, a forward takes {extra} MiB more"
    made = table(title, [*head, "/ forward's, weights counted"], lines) + "".join(failed)
    for turn in ("taylor", "taylor, fisher"):
        if taylor.get(turn) and taylor.get(f"{turn}, one-shot"):
            ratio = taylor[turn] / taylor[f"{turn}, one-shot"]
            made += f"\n\nPeak extra memory of {turn}, layer by layer to one-shot: {ratio:.2f}."
    return made


def tables(s: Any) -> Made:
    """Return a table for each model. Settings: models, repeats, rows (scorers)."""
    return "\n".join(one_table(name, s) for name in s.models), f"seed 0; up to {s.repeats} repeats", None
