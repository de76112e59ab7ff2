"""Magnitude: the size of the weights that write a state times the size of those that read it.

    S[g,n] = ||W_B[g,n]||_2 * ||W_C[g,n]||_2        rows of in_proj

One ranking for B and C together, because they are cut together. The published baseline of the state-pruning
papers (GHOST, arXiv 2602.11408; SSM-Pruner, arXiv 2502.18886, which ranked B and C apart: a fault).

Cost: none; no forward pass. Axes: state.
"""

import torch

import sspruner


class Magnitude(sspruner.Scorer):
    name, axes, needs = "magnitude", {"state"}, "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        write, read = view.weights["in_proj.weight:B"], view.weights["in_proj.weight:C"]  # (G, N, hidden)
        self.score: torch.Tensor = write.norm(dim=-1) * read.norm(dim=-1)  # (G, N)

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Magnitude]
