"""What a projected state costs and saves at run time: seconds against the dense model and a selection of the same size.

Random weights, fp32, this machine's processor: transformers' own code without kernels. Decode: one token for each of
`batch` sequences, with a cache, after a short prompt. Prefill: one forward of 4 x 256 tokens. The three models take
turns within a repeat; ratios are medians of those within a repeat.
"""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import torch
from common import Made, progress, random_model, random_tokens, span, table, timed, wait_until_quiet

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.testing.plans import directions

SHAPES = {"reference": {"hidden": 256, "heads": 8, "layers": 6}, "130M": {"hidden": 768, "heads": 24, "layers": 24}}
PREFILL, PROMPT, STEPS = (4, 256), 8, 4
PAIRS = (("selected", "dense"), ("projected", "dense"), ("projected", "selected"))


def models(shape: str, keep: int) -> dict[str, Any]:
    """Return the dense model, one whose states are selected, and one whose states are projected."""
    dense = random_model(**SHAPES[shape])
    graph = sspruner.trace(dense)
    selection = Plan({n: Selection(g.units, (tuple(range(keep)),)) for n, g in graph.on_axis("state").items()})
    cuts = {"selected": selection, "projected": directions(selection, graph, 0)}
    return {"dense": dense} | {label: sspruner.apply(copy.deepcopy(dense), plan) for label, plan in cuts.items()}


@torch.no_grad()
def seconds(model: Any, batch: int | None) -> float:
    """Return the seconds of a decode step, the mean over a few; without a batch those of a prefill."""
    if batch is None:
        ids = random_tokens(*PREFILL)
        return timed(lambda: model(input_ids=ids, use_cache=False))
    ids = random_tokens(batch, PROMPT)
    cache = model(input_ids=ids, use_cache=True).cache_params
    step = lambda: model(input_ids=ids[:, :1], use_cache=True, cache_params=cache)  # noqa: E731
    step()
    return timed(lambda: [step() for _ in range(STEPS)]) / STEPS


def tables(s: Any) -> Made:
    """Return milliseconds of the dense model and ratios of both cuts. Settings: shapes, keep, batches, repeats."""
    rows = []
    for shape in s.shapes:
        cases = models(shape, s.keep)
        for batch in (*s.batches, None):
            runs = []
            for _ in range(s.repeats):
                wait_until_quiet(5)
                runs.append({label: seconds(model, batch) for label, model in cases.items()})
            ratios = [sorted(run[a] / run[b] for run in runs) for a, b in PAIRS]
            cells = [f"{1000 * median(run['dense'] for run in runs):.1f}"]
            cells += [span((median(r), r[0], r[-1])) for r in ratios]
            rows.append([f"{shape}, {f'decode, batch {batch}' if batch else 'prefill'}", *cells])
            progress(" | ".join(rows[-1]))
    head = ["what", "dense, ms", *[" / ".join(pair) for pair in PAIRS]]
    title = f"State of {s.keep} instead of 128: median (least to most)"
    return table(title, head, rows), f"seed 0; {s.repeats} interleaved repeats", None
