"""Magnitude: the size of the weights that a unit owns.

    state       S[g,n] = ||W_B[g,n]||_2 * ||W_C[g,n]||_2        rows of in_proj (Mamba1: of x_proj)
    other axes  S[g,u] = L2 norm of everything that unit u owns

One ranking for B and C together, because they are cut together. The published baseline of the state-pruning
papers (GHOST, arXiv 2602.11408; SSM-Pruner, arXiv 2502.18886, which ranked B and C apart: a fault). The product
writes a state times reads it; elsewhere the norm is the common group magnitude (Torch-Pruning, arXiv 2301.12900).

On single elements S = |w|, compared within a tensor.

Cost: none; no forward pass. Axes: all, and single elements.
"""

import torch

import sspruner


class Magnitude(sspruner.Scorer):
    name, axes, needs = "magnitude", sspruner.AXES | sspruner.ELEMENT_AXES, "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        if self.axis == "state":  # the projections that make B and C: linear weights, before any convolution
            made = {rows: [w for key, w in view.weights.items() if "proj" in key and key.endswith(rows)]
                    for rows in (":B", ":C")}  # fmt: skip
            write, read = (torch.cat(parts, -1) for parts in made.values())  # (G, N, elements)
            self.score: torch.Tensor = write.norm(dim=-1) * read.norm(dim=-1)  # (G, N)
        else:
            self.score = view.norms  # (groups, units)

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Magnitude]
