"""sspruner: structured pruning of state-space language models. The public names, and nothing else.

Names are loaded on first use, so that `import sspruner` and `sspruner --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sspruner.errors import InputError, ModelError, PlanError, PluginError, ProcessError, ProofError, SSPrunerError
from sspruner.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from sspruner.acceleration import accelerate, decelerate
    from sspruner.benchmark.measure import Bench, bench
    from sspruner.calibrate.sources import Calibration, calibration
    from sspruner.calibrate.view import SSMView
    from sspruner.comparison import compare
    from sspruner.curves import Sensitivity, sensitivity
    from sspruner.evaluate.result import Evaluation
    from sspruner.evaluation import evaluate_model
    from sspruner.graph.family import Family
    from sspruner.graph.fingerprint import fingerprint
    from sspruner.graph.ssm_graph import SSMGraph, trace
    from sspruner.io.export import export
    from sspruner.io.load import load
    from sspruner.io.save import save
    from sspruner.limits import Limits
    from sspruner.pipeline import Result, prune, score
    from sspruner.planning.decide import Choose, plan
    from sspruner.planning.plan import Plan
    from sspruner.planning.scores import Scores
    from sspruner.plugins.scorer import Scorer
    from sspruner.refitting import Refit, refit
    from sspruner.report.html import write_report
    from sspruner.surgery.apply import apply
    from sspruner.surgery.mask import masked, unmask

__version__ = "0.1.0"

#: The kinds of thing that can shrink (docs/graph.md).
AXES = {
    *("state", "head", "head_dim", "group", "channel", "dt_rank"),  # in a mixer
    *("attn_head", "mlp", "hidden", "block", "mixer"),  # around it
}

#: Axes of single elements: zeros in tensors that keep their size (docs/graph.md).
ELEMENT_AXES = {"weight", "decay"}

_HOME = {
    "Bench": "sspruner.benchmark.measure",
    "Calibration": "sspruner.calibrate.sources",
    "Choose": "sspruner.planning.decide",
    "Evaluation": "sspruner.evaluate.result",
    "Family": "sspruner.graph.family",
    "Limits": "sspruner.limits",
    "Plan": "sspruner.planning.plan",
    "Refit": "sspruner.refitting",
    "Result": "sspruner.pipeline",
    "SSMGraph": "sspruner.graph.ssm_graph",
    "SSMView": "sspruner.calibrate.view",
    "Scorer": "sspruner.plugins.scorer",
    "Scores": "sspruner.planning.scores",
    "Sensitivity": "sspruner.curves",
    "accelerate": "sspruner.acceleration",
    "apply": "sspruner.surgery.apply",
    "bench": "sspruner.benchmark.measure",
    "calibration": "sspruner.calibrate.sources",
    "compare": "sspruner.comparison",
    "decelerate": "sspruner.acceleration",
    "evaluate_model": "sspruner.evaluation",
    "export": "sspruner.io.export",
    "fingerprint": "sspruner.graph.fingerprint",
    "load": "sspruner.io.load",
    "masked": "sspruner.surgery.mask",
    "plan": "sspruner.planning.decide",
    "prune": "sspruner.pipeline",
    "refit": "sspruner.refitting",
    "save": "sspruner.io.save",
    "score": "sspruner.pipeline",
    "sensitivity": "sspruner.curves",
    "trace": "sspruner.graph.ssm_graph",
    "unmask": "sspruner.surgery.mask",
    "write_report": "sspruner.report.html",
}

__all__ = [
    "AXES",
    "Bench",
    "Calibration",
    "Choose",
    "ELEMENT_AXES",
    "Evaluation",
    "Family",
    "InputError",
    "Limits",
    "ModelError",
    "Plan",
    "PlanError",
    "PluginError",
    "ProcessError",
    "ProofError",
    "Refit",
    "Result",
    "SSMGraph",
    "SSMView",
    "SSPrunerError",
    "Scorer",
    "Scores",
    "Sensitivity",
    "accelerate",
    "apply",
    "bench",
    "calibration",
    "compare",
    "decelerate",
    "evaluate_model",
    "export",
    "fingerprint",
    "hookimpl",
    "load",
    "masked",
    "plan",
    "prune",
    "refit",
    "save",
    "score",
    "sensitivity",
    "trace",
    "unmask",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sspruner' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
