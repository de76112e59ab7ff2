"""Compare: several scorers, several cuts, one pass of scoring, one held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sspruner.asked import make_budget
from sspruner.calibrate.sources import Progress
from sspruner.device import on_device, resolve_device
from sspruner.errors import InputError, PlanError
from sspruner.evaluate.damage import Damage, damages
from sspruner.graph.ssm_graph import trace
from sspruner.pipeline import Source, calibrated, score
from sspruner.planning.decide import plan
from sspruner.planning.plan import Plan, check_plan
from sspruner.report.result import measured, versions
from sspruner.walk import TOKENS_PER_BATCH, OneScorer

SPARSITIES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Comparison:
    """What each scorer's cut costs. cells: scorer -> sparsity -> perplexity and KL, or why it cannot be made.

    All scores are one-shot: of the dense model. from_cache: scorers whose scores were made in an earlier run.
    """

    axis: str
    sparsities: tuple[float, ...]
    dense_perplexity: float
    cells: dict[str, dict[float, Damage | str]]
    from_cache: tuple[str, ...]
    calibration: dict[str, Any]
    seed: int
    model: str = ""

    def to_json(self) -> str:
        """As JSON: a cell has `perplexity` and `kl_to_dense`, or `error`."""
        data = asdict(self) | {"versions": versions()}
        data["cells"] = {label: {f"{s:g}": _cell(cell) for s, cell in row.items()} for label, row in self.cells.items()}
        return json.dumps({"version": 1, **data}, indent=2) + "\n"


def _cell(cell: Damage | str) -> dict[str, Any]:
    return {"error": cell} if isinstance(cell, str) else measured(cell)


def compare(
    model: nn.Module,
    scorers: Sequence[OneScorer],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    axis: str = "state",
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    normalise: str | None = None,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    cache: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Score with all scorers in one pass over the dense model, plan every cut of each, and measure them all, masked, on
    the held-out text. The model is left as it was.

    The arguments are those of `score` and `plan`. Scorers that also change weights are compared by their selection
    alone. Raises InputError for bad arguments; a cut that a scorer cannot make is a cell with the reason.
    """
    if not scorers or not sparsities:
        raise InputError("compare: name at least one scorer and one sparsity")
    if allocation == "adaptive":
        raise InputError("compare: allocation adaptive measures the layers of one scorer; use prune for each")
    for sparsity in sparsities:  # what makes no sense fails before any work
        make_budget(axis, sparsity, None, allocation, multiple_of, ratios, ignore, normalise=normalise)
    compute = resolve_device(device)
    with on_device(model, compute):
        data = calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    scores = score(
        model, list(scorers), calibration=data, axis=axis, options=options, device=device, seed=seed, cache=cache,
        progress=progress,
    )  # fmt: skip
    graph = trace(model)
    budget: dict[str, Any] = {
        "allocation": allocation,
        "multiple_of": multiple_of,
        "ratios": ratios,
        "ignore": ignore,
        "normalise": normalise,
    }
    cells: dict[str, dict[float, Damage | str]] = {label: {} for label in scores}
    plans: dict[tuple[str, float], Plan] = {}
    for label, scored in scores.items():
        for sparsity in sparsities:
            try:
                made = plan(graph, scored, sparsity=sparsity, **budget)
                check_plan(made, graph, model=model)
                plans[label, sparsity] = made
            except (InputError, PlanError) as error:  # PlanError: whole modules that have to stay
                cells[label][sparsity] = str(error)
    if not plans:
        raise InputError(next(cell for row in cells.values() for cell in row.values() if isinstance(cell, str)))
    per_batch = max(1, TOKENS_PER_BATCH // 2 // data.held_out.shape[1])
    with on_device(model, compute), torch.no_grad():
        found = damages(model, list(plans.values()), graph, data.held_out_batches(per_batch), progress)
    for (label, sparsity), cost in zip(plans, found, strict=True):
        cells[label][sparsity] = cost
    return Comparison(
        axis=axis,
        sparsities=tuple(sparsities),
        dense_perplexity=found[0].dense_perplexity,
        cells={label: {s: cells[label][s] for s in sparsities} for label in scores},
        from_cache=tuple(label for label, scored in scores.items() if scored.from_cache),
        calibration={
            "source": data.source,
            "tokens": int(data.mask.sum()),
            "held_out_tokens": int(data.held_out_mask.sum()),
            "held_out_is_separate": data.held_out_is_separate,
        },
        seed=seed,
    )
