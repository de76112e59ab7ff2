"""What a projected state costs and saves at run time: seconds against the dense model and a selection of the same size.

    python benchmarks/projection_cost.py --table docs/benchmarks.md

Random weights, fp32, this machine's processor: transformers' own code without kernels. Decode: one token for each of
`batch` sequences, with a cache, after a short prompt. Prefill: one forward of 4 x 256 tokens. The three models take
turns within a repeat; ratios are medians of those within a repeat.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import insert, progress, provenance, table
from scoring_cost import random_model, timed, wait_until_quiet

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.testing.plans import directions

SHAPES = {"reference": {"hidden": 256, "heads": 8, "layers": 6}, "130M": {"hidden": 768, "heads": 24, "layers": 24}}
PREFILL, PROMPT, STEPS = (4, 256), 8, 4


def models(shape: str, keep: int) -> dict[str, Any]:
    """The dense model, one whose states are selected, and one whose states are projected."""
    dense = random_model(**SHAPES[shape]).eval()
    graph = sspruner.trace(dense)
    selection = Plan({n: Selection(g.units, (tuple(range(keep)),)) for n, g in graph.on_axis("state").items()})
    cut = {"selected": selection, "projected": directions(selection, graph, 0)}
    return {"dense": dense} | {label: sspruner.apply(copy.deepcopy(dense), plan) for label, plan in cut.items()}


@torch.no_grad()
def decode(model: Any, batch: int) -> float:
    """Seconds of one decode step, the mean over a few."""
    ids = torch.randint(4096, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = model(input_ids=ids, use_cache=True).cache_params
    step = lambda: model(input_ids=ids[:, :1], use_cache=True, cache_params=cache)  # noqa: E731
    step()
    return timed(lambda: [step() for _ in range(STEPS)]) / STEPS


@torch.no_grad()
def prefill(model: Any) -> float:
    """Seconds of one forward without a cache."""
    ids = torch.randint(4096, PREFILL, generator=torch.Generator().manual_seed(0))
    return timed(lambda: model(input_ids=ids, use_cache=False))


def ratios(cases: dict[str, Any], what: Any, repeats: int) -> list[str]:
    """Milliseconds of the dense model, then both cuts against it and the projection against the selection."""
    runs = []
    for _ in range(repeats):
        wait_until_quiet(5)
        runs.append({label: what(model) for label, model in cases.items()})
    pairs = (("selected", "dense"), ("projected", "dense"), ("projected", "selected"))
    found = [[run[a] / run[b] for run in runs] for a, b in pairs]
    shown = [f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in found]
    return [f"{1000 * median([run['dense'] for run in runs]):.1f}", *shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--table", type=Path, help="write the table into this page, too")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for shape in given.shapes:
        cases = models(shape, given.keep)
        jobs = {f"decode, batch {b}": lambda m, b=b: decode(m, b) for b in given.batch} | {"prefill": prefill}
        for label, job in jobs.items():
            rows.append([f"{shape}, {label}", *ratios(cases, job, given.repeats)])
            progress(" | ".join(rows[-1]))
    head = ["what", "dense, ms", "selected / dense", "projected / dense", "projected / selected"]
    made = table(f"State of {given.keep} instead of 128: median (least to most)", head, rows)
    made += "\n\n" + provenance(f"seed 0; {given.repeats} interleaved repeats")
    print(made)
    if given.table:
        insert(given.table, "projection_cost.py", made)


if __name__ == "__main__":
    main()
