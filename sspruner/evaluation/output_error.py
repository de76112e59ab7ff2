"""Output error of a cut: how far the cut model's outputs are from the dense model's, where there is no perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import forward, output_of
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.paired import Interval, rate
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.surgery.mask import masked


@dataclass(frozen=True)
class OutputError:
    """Squared error of the cut model's outputs over the energy of the dense model's.

    relative: sum |cut - dense|² / sum |dense|², with its 95 % interval over windows, on each of which both are run.
    """

    relative: Interval


@torch.no_grad()
def output_errors(
    model: nn.Module,
    plans: Sequence[Plan],
    graph: SSMGraph,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> list[OutputError]:
    """Return the output error of several plans; none if there is no window, or the dense model puts out zeros alone.

    batches: (inputs (b, T, ...), mask bool (b, T)). Padding does not count where the output has a value for each
    position. Raises ModelError if the dense model's outputs are not finite.
    """
    errors: list[list[torch.Tensor]] = [[] for _ in plans]  # by plan and batch: fp64 (b,)
    energies: list[torch.Tensor] = []
    with quick_on_cpu(model, next(model.parameters()).device):
        for inputs, mask in batches:
            run = partial(forward, model, inputs, mask, use_cache=False)
            dense = _counted(output_of(run()), mask)  # (b, values)
            if not bool(dense.isfinite().all()):
                refuse_not_finite(model, run)
            energies.append(dense.square().sum(1))
            for plan, found in zip(plans, errors, strict=True):
                with masked(model, plan, graph):
                    cut = _counted(output_of(run()), mask)
                found.append((cut - dense).square().sum(1))
    if not energies or not bool((energy := torch.cat(energies)).any()):
        return []
    energy = energy.clamp_min(torch.finfo(torch.float64).tiny)  # windows without energy count their error
    return [OutputError(rate(torch.cat(found), energy)) for found in errors]


def _counted(out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the outputs of each window, fp64 (b, values), zeros where padding."""
    values = out.double().cpu()
    if values.shape[:2] == mask.shape:  # one for each position: (b, T, ...)
        values = values * mask.cpu().view(*mask.shape, *[1] * (values.ndim - 2))
    return values.flatten(1)
