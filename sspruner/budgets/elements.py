"""Select single elements of a tensor: by row, by tensor, over all tensors, or n of every m."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sspruner.budgets.budget import parse_pattern
from sspruner.errors import InputError
from sspruner.graph.group import DependencyGroup

FLOOR = 0.05  # fraction of its elements that every tensor keeps if all tensors compete (docs/methods.md)


def check_pattern(group: DependencyGroup, pattern: str) -> None:
    """Raise InputError if the rows of a tensor cannot be divided by the pattern."""
    _, m = parse_pattern(pattern)
    if group.units % m:
        raise InputError(f"{group.name}: rows of {group.units} elements; pattern {pattern} needs a multiple of {m}; "
                         f"leave it out with ignore")  # fmt: skip


def competing(group: DependencyGroup, runs: tuple[str, ...]) -> torch.Tensor:
    """Return the rows that compete, bool (rows,): all, or the named runs; none for a tensor without such a run."""
    if not runs:
        return torch.ones(group.groups, dtype=torch.bool)
    rows = torch.zeros(group.groups, dtype=torch.bool)
    for run in runs:
        rows[(group.runs or {}).get(run, torch.zeros(0, dtype=torch.long))] = True
    return rows


def choose(
    scores: torch.Tensor, rows: torch.Tensor, sparsity: float, pattern: str | None, granularity: str
) -> torch.Tensor:
    """Return the elements to keep of a tensor, or of some of its columns: bool, the shape of `scores` (rows, columns).

    rows: bool (rows,), those that compete; the others are kept whole. Of equal scores the first are kept.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    candidates = scores[rows]
    if pattern:
        n, m = parse_pattern(pattern)
        if scores.shape[1] % m:
            raise InputError(f"{scores.shape[1]} columns at once; pattern {pattern} needs a multiple of {m}")
        keep[rows] = _best(candidates.reshape(-1, m), n).view_as(candidates)
    elif granularity == "row":
        keep[rows] = _best(candidates, round(candidates.shape[1] * (1 - sparsity)))
    else:
        keep[rows] = _best(candidates.reshape(1, -1), round(candidates.numel() * (1 - sparsity))).view_as(candidates)
    return keep


def choose_globally(
    scores: Mapping[str, torch.Tensor], rows: Mapping[str, torch.Tensor], sparsity: float
) -> dict[str, torch.Tensor]:
    """Select elements by one threshold over all tensors, each keeping a minimum of its best. Shapes as in `choose`."""
    keep = {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}
    candidates = {name: s[rows[name]] for name, s in scores.items()}  # (competing rows, columns)
    safe = {
        n: _best(a.reshape(1, -1), round(a.numel() * min(FLOOR, 1 - sparsity))).view_as(a)
        for n, a in candidates.items()
    }
    total, kept = sum(a.numel() for a in candidates.values()), sum(int(s.sum()) for s in safe.values())
    pool = torch.cat([a[~safe[n]] for n, a in candidates.items()])
    best = _best(pool[None], max(0, round(total * (1 - sparsity)) - kept))[0]
    for name in candidates:
        stays, rest = safe[name].clone(), ~safe[name]
        stays[rest], best = best[: int(rest.sum())], best[int(rest.sum()) :]
        keep[name][rows[name]] = stays
    return keep


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` highest elements of every row, bool (rows, columns); of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
