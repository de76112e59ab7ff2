"""What every scorer costs: seconds and peak memory of scoring a whole model, as ratios to one plain forward of it.

    python benchmarks/scorer_cost.py --data ../shared/data
    python benchmarks/scorer_cost.py --models 130M --rows taylor ghost --tokens 4 128

Both over the same tokens, fp32. Scoring is all that `sspruner.prune` does to know what goes: every block observed or
differentiated, cut, and run once more for the next one's input (one-shot: not cut). Every row has a process of its own:
first the growth of peak resident memory over the loaded model (Linux), then forward and scoring in turn, in seconds;
ratios are taken within a repeat. "130M": random weights in the shape of Mamba2-130M, vocabulary 4096, random tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import progress, provenance, table
from scorer_rows import Row, row
from scoring_cost import mib, random_model, random_tokens, timed, wait_until_quiet

import sspruner
from sspruner.benchmarking import resident

ROWS: dict[str, list[Row]] = {  # axis -> rows
    "state": [
        *map(row, ("random", "magnitude", "wanda", "ghost")),
        row("ghost", one_shot=True),
        row("ghost", variant="means"),
        row("ghost", variant="output"),
        row("balanced"),
        row("balanced", weights="none"),
        *map(row, ("rrqr", "last")),
        row("snip"),
        row("taylor"),
        row("taylor", one_shot=True),
        row("taylor", order="fisher"),
        row("taylor", order="fisher", one_shot=True),
        *[row(f"tp:{name}") for name in ("magnitude", "lamp", "fpgm", "taylor", "hessian")],
        row("sparsessm"),
    ],
    "head": [*map(row, ("flap", "head-merge"))],
    "block": [row("block-influence"), row("perplexity-drop"), row("perplexity-drop", stop=1)],
    "weight": [*map(row, ("wanda", "sparsegpt", "gradmag"))],
}
MODELS = {"mamba2-books-4m": (8, 256), "mamba1-books": (8, 256), "130M": (4, 128)}  # -> sequences, tokens in each
MAMBA1_ONLY, MAMBA2_ONLY = ("sparsessm",), ("balanced",)
SLOW = 20.0  # seconds; what takes longer is timed once


def model_and_data(name: str, tokens: tuple[int, int], data: Path) -> tuple[Any, sspruner.Calibration]:
    if name == "130M":
        model = random_model(hidden=768, heads=24, layers=24)
        return model, sspruner.calibration(random_tokens(*tokens), model, samples=tokens[0], held_out=0)
    model, tokenizer = sspruner.load(name, dtype="float32")
    size = {"samples": tokens[0], "seq_len": tokens[1], "held_out": 0}
    return model, sspruner.calibration(data / "books-val.txt", model, tokenizer, **size)


def scoring(model: Any, calibration: sspruner.Calibration, axis: str, of: Row) -> float:
    """Seconds of the phase `scoring` of a prune in mask mode; the model is as before afterwards."""
    result = sspruner.prune(
        model, of.scorer, axis=axis, sparsity=0.5, mode="mask", calibration=calibration, **of.arguments
    )
    sspruner.unmask(model)
    return float(result.report.seconds["scoring"])


def growth(job: Callable[[], Any]) -> int:
    """By how many bytes the process's resident memory grew at its peak while `job` ran."""
    before = resident.start()
    if before is None:
        raise SystemExit("this system does not tell what is resident")
    job()
    return resident.peak() - before


def measure(
    name: str, tokens: tuple[int, int], data: Path, axis: str, of: Row | None, repeats: int, threads: int
) -> dict[str, Any]:
    """One row, or the plain forward (of=None): bytes, and seconds of both. For a fresh process."""
    torch.set_num_threads(threads)

    @torch.no_grad()
    def forward(model: Any, calibration: sspruner.Calibration) -> None:
        model(input_ids=calibration.tokens, attention_mask=calibration.mask.long(), use_cache=False)

    def run(model: Any, calibration: sspruner.Calibration) -> float:
        return scoring(model, calibration, axis, of) if of else timed(lambda: forward(model, calibration))

    small, ids = random_model(hidden=64, heads=2), random_tokens(2, 32)
    with suppress(sspruner.SSPrunerError):
        run(small, sspruner.calibration(ids, small, samples=2, held_out=0))  # libraries and threads are loaded by now
    try:
        case = model_and_data(name, tokens, data)
        found: dict[str, Any] = {"bytes": growth(lambda: run(*case)), "weights": case[0].get_memory_footprint()}
        found |= {"seconds": [], "ratios": []}
        while of and len(found["seconds"]) < repeats and max(found["seconds"], default=0) < SLOW:
            wait_until_quiet(10)
            plain = timed(lambda: forward(*case))
            found["seconds"].append(run(*case))
            found["ratios"].append(found["seconds"][-1] / plain)
        return found
    except sspruner.SSPrunerError as error:
        return {"error": str(error)}


def measured(*arguments: Any) -> dict[str, Any]:
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(measure, arguments)
    finally:
        pool.close()
        pool.join()


def line(label: str, axis: str, found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """A row of the table. found, plain: of the scorer and of the forward."""
    if "error" in found:
        return [label, axis, *["–"] * 5]
    weights = plain["weights"]
    seconds, ratios = found["seconds"], found["ratios"]
    times = [f"{median(seconds):.2f}", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
    ratio, whole = found["bytes"] / plain["bytes"], (weights + found["bytes"]) / (weights + plain["bytes"])
    return [label, axis, *times, mib(found["bytes"]), f"{ratio:.2f}", f"{whole:.2f}"]


def one_table(name: str, given: argparse.Namespace) -> str:
    tokens = tuple(given.tokens or MODELS[name])
    common = (name, tokens, given.data)
    plain = measured(*common, "", None, 0, given.threads)
    lines, failed, taylor = [], [], {}
    for axis, rows in ROWS.items():
        for of in rows:
            known = of.scorer not in (MAMBA2_ONLY if name == "mamba1-books" else MAMBA1_ONLY)
            asked = not given.rows or {of.label, of.scorer} & set(given.rows)
            if not known or not asked or (axis == "head" and name == "mamba1-books"):
                continue
            found = measured(*common, axis, of, given.repeats, given.threads)
            lines.append(line(of.label, axis, found, plain))
            progress(f"{name}: {' | '.join(lines[-1])} {found.get('error', '')}")
            failed += [f"\n\n– {of.label}, {axis}: {found['error']}"] if "error" in found else []
            taylor[of.label] = found.get("bytes")
    head = ["scorer", "axis", "scoring, s", "/ forward (least to most)", "peak extra MiB", "/ forward's"]
    head += ["/ forward's, weights counted"]
    weights, extra = mib(plain["weights"]), mib(plain["bytes"])
    title = f"{name}, {tokens[0]} x {tokens[1]} tokens: weights {weights} MiB, a forward takes {extra} MiB more"
    made = table(title, head, lines) + "".join(failed)
    for turn in ("taylor", "taylor, fisher"):
        if taylor.get(turn) and taylor.get(f"{turn}, one-shot"):
            ratio = taylor[turn] / taylor[f"{turn}, one-shot"]
            made += f"\n\nPeak extra memory of {turn}, layer by layer to one-shot: {ratio:.2f}."
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", help="some of the rows, by scorer or label")
    parser.add_argument("--tokens", type=int, nargs=2, help="sequences and their length; default: by model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books-val.txt")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = "\n".join(one_table(name, given) for name in given.models)
    note = f"seed 0; up to {given.repeats} repeats"
    made += "\n\n" + provenance(note)
    print(made)


if __name__ == "__main__":
    main()
