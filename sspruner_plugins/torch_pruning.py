"""Torch-Pruning: the importance classes of that library, applied to our dependency groups.

With w_i a unit's slice of the i-th member of the group, dw_i its gradient of the mean calibration loss:

    tp:magnitude   MagnitudeImportance   s_i = sum |w_i|^p        the classic baseline
    tp:lamp        LAMPImportance        the same, normalised as in LAMP (Lee et al., arXiv 2010.07611):
                                         S[u] / (sum of all S[v] >= S[u] of the set)
    tp:fpgm        FPGMImportance        s_i = the summed distances of |w_i|^p to those of all other units
                                         (He et al., arXiv 1811.00250): low = redundant. Signs do not count
    tp:taylor      TaylorImportance      s_i = sum |w_i dw_i|     (Molchanov et al., arXiv 1906.10771)
                   multivariable=true    s_i = |sum w_i dw_i|     the first-order change of the loss itself
    tp:hessian     HessianImportance     s_i = sum w_i^2 h_i      Optimal Brain Damage (LeCun et al., 1989), with the
                                         square of the one mean gradient as h: no curvature is measured

    S = normalizer(group_reduction of all s_i), within each set of the group

Source: torch-pruning 1.6 (Fang et al., "DepGraph", arXiv 2301.12900); the numbers are its own, not a re-implementation.
Cost: none; tp:fpgm takes units^2 distances; tp:taylor and tp:hessian one forward and backward pass.
Axes: all of single tensors (not block, not mixer).
Options, with torch-pruning's names and defaults:
    group_reduction   "mean" (default), "sum", "max", "prod", "first": the first member alone
    normalizer        "mean" (default), "sum", "max", "standarization" (to 0..1), "gaussian" (z-score), "lamp",
                      "sentinel_0.5" (by the median; any fraction), null. Always "lamp" in tp:lamp
    p                 2; tp:magnitude, tp:lamp, tp:fpgm
    bias              false; true counts biases (dt_bias too). Not in tp:fpgm
    multivariable     false; tp:taylor
    unwrapped         false; true counts A_log and D, the bare parameters that torch-pruning would not count either

Limits. A normaliser acts within one set, so it never changes which units of a set are removed, only how sets and layers
compare; that holds for LAMP, too, which was designed to compare single weights across layers. Norm weights, embeddings
and depthwise convs count as any weight; of these, torch-pruning itself counts LayerNorms alone. Where one tensor has
several kinds of rows in a group (in_proj: B and C), each is a separate member. "prod" underflows in fp32 for tiny
scores. A set of one unit, or whose scores are all 0, is not normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any, ClassVar

import torch
from torch import nn

import sspruner

REDUCTIONS = ("mean", "sum", "max", "prod", "first")
NORMALIZERS = ("mean", "sum", "max", "standarization", "gaussian", "lamp", None)


def _is_normalizer(value: Any) -> bool:
    kind, _, fraction = value.partition("_") if isinstance(value, str) else ("", "", "")
    if kind == "sentinel":
        return fraction.replace(".", "", 1).isdecimal() and float(fraction) < 1
    return value in NORMALIZERS


KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "p": (lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v > 0, "any number above 0"),
    "group_reduction": (lambda v: v in REDUCTIONS, ", ".join(REDUCTIONS)),
    "normalizer": (_is_normalizer, f"{', '.join(filter(None, NORMALIZERS))}, sentinel_0.5 (any fraction), null"),
    **{name: (lambda v: isinstance(v, bool), "true, false") for name in ("bias", "multivariable", "unwrapped")},
}


class TorchPruning(sspruner.Scorer):
    """Scorer that passes torch-pruning a group of Linears, one per member, whose output channels are the units."""

    axes = sspruner.AXES - {"block", "mixer"}
    importance_class: ClassVar[str]
    signature: ClassVar[Signature]

    def __init__(self, **options: Any) -> None:
        bound = self.signature.bind(**options)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            accepts, known = KNOWN[name]
            if not accepts(value):
                raise sspruner.InputError(f"scorer {self.name!r}: {name}={value!r}; known: {known}")
        self.options = bound.arguments
        self.unwrapped = self.options.pop("unwrapped")

    def observe(self, view: sspruner.SSMView) -> None:
        names = sorted(filter(self._counts, view.weights), key=_is_bias)  # "first" is never a bias
        gradients = view.gradients if self.needs == "gradients" else None
        self.score = torch.stack(
            [
                self._score([_linear(view.weights[n][g], gradients[n][g] if gradients else None) for n in names])
                for g in range(view.group.groups)
            ]
        )

    def importance(self) -> torch.Tensor:
        return self.score

    def _counts(self, name: str) -> bool:
        bare = _tensor(name).rpartition(".")[2] in ("A_log", "D")
        return self.unwrapped if bare else self.options.get("bias", False) or not _is_bias(name)

    def _score(self, layers: list[nn.Linear]) -> torch.Tensor:
        """Compute torch-pruning's importance of one set, whose members have weights (units, elements): (units,)."""
        tp: Any = import_module("torch_pruning")  # imported late, so that listing the scorers stays fast
        prune, every = tp.pruner.function.prune_linear_out_channels, list(range(layers[0].out_features))
        nodes = [tp.dependency.Node(layer, grad_fn=None) for layer in layers]
        group = tp.Group()
        for i, node in enumerate(nodes):
            group.add_dep(tp.dependency.Dependency(prune, prune, source=nodes[0], target=node), [*every])
            group[i].root_idxs = every
        importance = getattr(tp.importance, self.importance_class)(**self.options)
        if self.importance_class == "HessianImportance":
            importance.accumulate_grad(nn.ModuleList(layers))
        if len(every) == 1:
            importance.normalizer = None
        score: torch.Tensor = importance(group)
        if not score.isfinite().all():  # 0/0, as in an expert that no token reached
            importance.normalizer = None
            score = importance(group)
        return score


def _linear(weight: torch.Tensor, gradient: torch.Tensor | None) -> nn.Linear:
    """Return a Linear around a weight (units, elements), without copying it or drawing random numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight.grad = gradient
    return layer


def _tensor(name: str) -> str:
    return name.rpartition(":")[0]


def _is_bias(name: str) -> bool:
    return _tensor(name).endswith("bias")


def _scorer(name: str, importance_class: str, needs: str, **defaults: Any) -> type[TorchPruning]:
    signature = Signature([Parameter(n, Parameter.KEYWORD_ONLY, default=v) for n, v in defaults.items()])
    namespace = {"name": name, "needs": needs, "importance_class": importance_class, "signature": signature}
    return type(importance_class, (TorchPruning,), {**namespace, "__signature__": signature, "__module__": __name__})


GROUP = {"group_reduction": "mean", "normalizer": "mean"}
ALL = {"bias": False, "unwrapped": False}
SCORERS = [
    _scorer("tp:magnitude", "MagnitudeImportance", "weights", p=2, **GROUP, **ALL),
    _scorer("tp:lamp", "LAMPImportance", "weights", p=2, group_reduction="mean", **ALL),
    _scorer("tp:fpgm", "FPGMImportance", "weights", p=2, **GROUP, unwrapped=False),
    _scorer("tp:taylor", "TaylorImportance", "gradients", **GROUP, multivariable=False, **ALL),
    _scorer("tp:hessian", "HessianImportance", "gradients", **GROUP, **ALL),
]


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [*SCORERS]
