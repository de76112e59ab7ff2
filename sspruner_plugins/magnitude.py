"""Magnitude: norm of a unit's weights.

    state       S[g,n] = ||W_B[g,n]||_p * ||W_C[g,n]||_p        rows of in_proj (Mamba1: of x_proj; delta rules: k, q)
    other axes  S[g,u] = p-norm of all parameters of unit u

One ranking for B and C together, because they are cut together. The published baseline of the state-pruning
papers (GHOST, arXiv 2602.11408; SSM-Pruner, arXiv 2502.18886, which wrongly ranked B and C separately). On the state
it is the write norm times the read norm; elsewhere the common group magnitude (Torch-Pruning, arXiv 2301.12900).
With a reduction, on every axis of tensors, S is that of the p-norms of the unit's members, each tensor by itself.
On single elements S = |w|, compared within a tensor.

Cost: none; no forward pass. Axes: all, and single elements. Options: p=2 (default) or 1; reduction=None (default, as
above), "sum", "mean" or "max". Whole modules (block, mixer) have p=2 and no reduction.
"""

import torch

import sspruner

REDUCTIONS = (None, "sum", "mean", "max")


class Magnitude(sspruner.Scorer):
    """Scorer of magnitudes."""

    name, axes, needs = "magnitude", sspruner.AXES | sspruner.ELEMENT_AXES, "weights"

    def __init__(self, p: int = 2, reduction: str | None = None) -> None:
        if p not in (1, 2):
            raise sspruner.InputError(f"scorer 'magnitude': p={p!r}; known: 1, 2")
        if reduction not in REDUCTIONS:
            raise sspruner.InputError(f"scorer 'magnitude': reduction={reduction!r}; known: sum, mean, max")
        self.p, self.reduction = p, reduction

    def observe(self, view: sspruner.SSMView) -> None:
        if view.group.blocks:
            if (self.p, self.reduction) != (2, None):
                raise sspruner.InputError("whole modules have their L2 norm only; leave out p and reduction")
            self.score: torch.Tensor = view.norms  # (1, units)
        elif self.reduction:
            sizes = torch.stack([w.norm(self.p, dim=-1) for w in view.weights.values()])  # (members, groups, units)
            self.score = sizes.amax(0) if self.reduction == "max" else getattr(sizes, self.reduction)(0)
        elif self.axis == "state":  # the linear projections of B and C, before any convolution
            rows_of = [[w for key, w in view.weights.items() if "proj" in key and key.endswith(rows)]
                    for rows in ((":B", ":k"), (":C", ":q"))]  # fmt: skip
            write, read = (torch.cat(parts, -1) for parts in rows_of)  # (G, N, elements)
            self.score = write.norm(self.p, dim=-1) * read.norm(self.p, dim=-1)  # (G, N)
        elif self.p == 2:
            self.score = view.norms  # (groups, units)
        else:
            self.score = torch.cat(list(view.weights.values()), -1).abs().sum(-1)  # (groups, units)

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Magnitude]
