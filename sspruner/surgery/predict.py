"""What a plan removes, computed from the graph before anything is touched: the proof compares it with what has gone."""

from __future__ import annotations

from math import prod

from torch import nn

from sspruner.graph.layout import state_bytes
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan
from sspruner.surgery.mask import tensor
from sspruner.surgery.slice import cut_layout, rows_to_drop


def removed_parameters(model: nn.Module, plan: Plan, graph: SSMGraph) -> int:
    """Number of parameters that `plan` removes; one that several modules share counts once."""
    gone = dropped_modules(plan, graph)
    used = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not _inside(n, gone)}
    left = {id(p): p.numel() if id(p) in used else 0 for p in model.parameters()}
    for name, cuts in rows_to_drop(plan, graph).items():
        parameter = tensor(model, name)
        if left.get(id(parameter)):
            extents = {dims: prod(parameter.shape[d] for d in dims) for dims in cuts}
            kept = prod(extents[dims] - len(rows) for dims, rows in cuts.items())
            left[id(parameter)] = parameter.numel() * kept // prod(extents.values())  # whole: each cut is even
    return sum(p.numel() - left[id(p)] for p in model.parameters())


def removed_state_bytes(plan: Plan, graph: SSMGraph) -> int:
    """Bytes of recurrent state per sequence that `plan` removes."""
    gone = dropped_modules(plan, graph)
    return sum(
        site.state_bytes - (0 if _inside(f"{site.path}.", gone) else state_bytes(cut_layout(site, plan, graph)))
        for site in graph.layers
    )


def dropped_modules(plan: Plan, graph: SSMGraph) -> list[str]:
    """Paths of the modules that go as a whole."""
    paths = []
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        for unit in selection.dropped(0) if group.blocks else ():
            paths += [group.blocks[unit].path, *group.blocks[unit].extras]
    return paths


def _inside(name: str, paths: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
