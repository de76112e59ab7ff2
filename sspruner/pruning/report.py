"""Report: the content of report.json, what was cut and what it cost. One dataclass, numbers in base units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from sspruner.axes import axis_of
from sspruner.compute.forward import no_tokens
from sspruner.evaluation.damage import Damage
from sspruner.evaluation.output_error import OutputError
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import flag, integer, number, table, text, versioned
from sspruner.files.output import write_file
from sspruner.files.provenance import hub_name, peak_memory_bytes, versions
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.pruning.stages import Decision, Outcome, PruneJob
from sspruner.scoring.scores import Scores
from sspruner.surgery.proof import Proof

# Check of a report's field, by the first word of its type.
CHECKS: dict[str, Callable[[Any], Any]] = {"str": text, "bool": flag, "int": integer, "dict": table}
MEASURED = ("perplexity", "kl_to_dense")  # keys of `dense` and `pruned` that are floats; the others are integers
RATIO = "perplexity_ratio"  # of `pruned`: over that of the dense model, [value, low, high]; not in older files
OUTPUT_ERROR = "output_error"  # of `pruned`: [value, low, high]; of models that predict no tokens


@dataclass(frozen=True)
class Report:
    """The report of one prune. Bytes, seconds, nats; state bytes per sequence.

    basis       the basis of the state's units: "select" for its coordinates, else the scorer's name for its directions
    proof       None in mask mode
    refit       kind, damage without it, each block's error before and after; of a reconstruction also by cut module:
                errors on held-out text, step that was kept, steps, seconds; {} without a refit
    search      measured before the cut on calibration text: limits, curve of cuts, perplexity by scorer, damage by
                layer; and, for layers of different sizes, the damage of one size for all, on held-out text
    target      the runtime that the sizes fit, its number of GPUs, what was rounded, and its notes
    sparsity    zeros among single elements (`sparsity_of`), {} if the plan has no axis of single elements
    recipe      the recipe (`Recipe.to_json`), {} in reports of version 0.1
    base_model  name of the base model on the hub (`hub_name`), "" if it is not from the hub
    left_out    why perplexity and KL were not measured, but the output error at most; "" if they were
    zero_scores by axis, units that the scorer could say nothing of: what they are, how many of how many, and by group
    """

    scorer: str
    options: dict[str, Any]
    axis: str
    budget: dict[str, Any]
    mode: str
    one_shot: bool
    calibration: dict[str, Any]
    dense: dict[str, Any]
    pruned: dict[str, Any]
    layers: dict[str, dict[str, int]]
    proof: Proof | None
    continuation: dict[str, Any] | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    seed: int
    versions: dict[str, str]
    model: str = ""
    command: str = ""
    sparsity: dict[str, Any] = field(default_factory=dict)
    basis: str = "select"
    refit: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    target: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""
    zero_scores: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report. Raises InputError for a file that `save` did not write."""
        return strict_json.load("report", path, cls.from_json)

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Parse a report, from its text or from the parsed JSON. Inverse of `to_json`.

        Fields that have a default may be missing. Raises KeyError, TypeError or ValueError for anything that `to_json`
        does not write, unknown keys included.
        """
        data = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        checked = data | {f.name: _checked(str(f.type), data[f.name]) for f in fields(cls) if f.name in data}
        sizes = {
            when: data[when]
            | {name: number(data[when][name]) for name in MEASURED if name in data[when]}
            | {name: [*Interval.from_json(data[when][name])] for name in (RATIO, OUTPUT_ERROR) if name in data[when]}
            | {name: integer(data[when][name]) for name in ("parameters", "weight_bytes", "state_bytes")}
            for when in ("dense", "pruned")
        }
        return cls(
            **checked
            | sizes
            | {
                "layers": {name: layer_from_json(size) for name, size in data["layers"].items()},
                "proof": None if data["proof"] is None else Proof.from_json(data["proof"]),
            }
        )

    def to_json(self) -> str:
        """Return the content of report.json."""
        data = asdict(self) | {"proof": None if self.proof is None else self.proof.to_json()}
        return strict_json.dumps({"version": 1, **data}, indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write report.json atomically."""
        write_file(path, self.to_json())


def report_of(job: PruneJob, decision: Decision, outcome: Outcome) -> Report:
    """Build the report of a prune after the model was cut."""
    run, data, cut_graph = job.run, job.data, trace(job.model)
    method, scorers = job.recipe.method, job.run.jobs[0]
    search, cost = decision.search, outcome.damage
    if decision.one_size is not None and outcome.one_size is not None:
        kept_by_all = next(iter(decision.one_size.groups.values())).after
        search = search | {"one_size": {"kept": kept_by_all, **measured(outcome.one_size)}}
    return Report(
        scorer=scorers.label,
        basis=", ".join(dict.fromkeys(cls.basis for cls, _ in scorers.scorers.values())),
        options=scorers.options,
        axis=", ".join(run.axes),
        budget=decision.budget.to_json(),
        mode=method.mode,
        one_shot=job.one_shot,
        calibration={
            "source": data.source,
            "sequences": len(data.tokens),
            "seq_len": data.tokens.shape[1],
            "tokens": int(data.mask.sum()),
            "held_out_tokens": int(data.held_out_mask.sum()),
            "held_out_is_separate": data.held_out_is_separate,
            "unit": "steps" if data.tokens.is_floating_point() else "tokens",
        },
        dense=job.dense | ({"perplexity": cost.dense_perplexity} if isinstance(cost, Damage) else {}),
        pruned=model_size(job.model, cut_graph) | measured(cost),
        left_out="" if isinstance(cost, Damage) else f"perplexity and KL: {no_tokens(job.model)}",
        layers={
            name: {"before": group.units, "after": int(decision.kept[name][0].sum())}
            for name, group in run.groups.items()
            if not group.tensor
        },
        zero_scores=zero_scores(decision.scores),
        proof=outcome.proof,
        refit=_refit(method.refit, decision, outcome),
        search=search,
        target={**job.fit.to_json(), "rounded": job.rounded, "notes": job.fit.target.notes(cut_graph, job.model.config)}
        if job.fit
        else {},
        sparsity=sparsity_of(job.model, cut_graph, run.axes),
        continuation=outcome.continuation,
        seconds=job.clock.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        seed=method.seed,
        versions=versions(),
        base_model=hub_name(job.model),
        recipe=job.recipe.to_json(),
    )


def zero_scores(scores: Scores) -> dict[str, Any]:
    """Count the units whose importance is exactly 0, on axes where the scorer says what this means (`Scorer.zero`)."""
    found = {}
    for axis, what in strict_json.loads(scores.metadata.get("zero", "{}")).items():
        on_axis = {name: s for name, s in scores.importance.items() if axis_of(name) == axis}
        groups = {name: count for name, s in on_axis.items() if (count := int((s == 0).sum()))}
        if groups:
            units = sum(s.numel() for s in on_axis.values())
            found[axis] = {"what": what, "zero": sum(groups.values()), "units": units, "groups": groups}
    return found


def _refit(kind: str, decision: Decision, outcome: Outcome) -> dict[str, Any]:
    """Return what the report says about a refit, {} without one."""
    if not decision.errors:
        return {}
    layers = {path: asdict(layer) for path, layer in decision.layers.items()}
    found = {"kind": kind, "without": measured(outcome.without_refit), "errors": decision.errors}
    return found | ({"layers": layers} if layers else {})


def _checked(kind: str, value: Any) -> Any:
    """Return a field's value if it has the field's type; raise otherwise."""
    if value is None and kind.endswith("| None"):
        return None
    check = CHECKS.get(kind.partition("[")[0])
    return check(value) if check else value


def layer_from_json(data: Any) -> dict[str, int]:
    """Check the entry of one dependency group in a report: its units before and after."""
    return {when: integer(table(data)[when]) for when in ("before", "after")}


def model_size(model: nn.Module, graph: SSMGraph) -> dict[str, Any]:
    """Return parameters, bytes of weights in the model's dtype, and bytes of fp32 recurrent state per sequence."""
    return {
        "parameters": graph.parameters,
        "weight_bytes": graph.weight_bytes,
        "state_bytes": graph.state_bytes,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def measured(cost: Damage | OutputError | None) -> dict[str, Any]:
    """Return damage under the names that reports use; {} if it was not measured."""
    if cost is None:
        return {}
    if isinstance(cost, OutputError):
        return {OUTPUT_ERROR: [*cost.relative]}
    return {"perplexity": cost.pruned_perplexity, RATIO: [*cost.ratio], "kl_to_dense": cost.kl}


def sparsity_of(model: nn.Module, graph: SSMGraph, axes: Sequence[str]) -> dict[str, Any]:
    """Count the zeros among the single elements of some axes, in the model as it is, by tensor and in total.

    graph: traced after the cut. Axes of units are left out; {} without any axis of single elements.
    """
    parameters = {g.tensor: model.get_parameter(g.tensor) for g in graph.elements.values() if g.axis in axes}
    zeros = {name: int((parameter == 0).sum()) for name, parameter in parameters.items()}
    elements = sum(parameter.numel() for parameter in parameters.values())
    if not elements:
        return {}
    return {
        "elements": elements,
        "zeros": sum(zeros.values()),
        "sparsity": sum(zeros.values()) / elements,
        "tensors": {
            name: {"shape": list(p.shape), "zeros": zeros[name], "sparsity": zeros[name] / p.numel()}
            for name, p in parameters.items()
        },
    }
