"""SparseSSM: sensitivity of the loss to zeroing an entry of A_log, by the energy of its state.

    decay   S[d,n] = A_log[d,n]^2 sum_t h_t[d,n]^2           h: the states of the scan, t: tokens that are not padding
    state   S[g,n] = sum_{d in g} A_log[d,n]^2 sum_t h_t[d,n]^2

Source: Tuo & Wang, "SparseSSM", arXiv 2506.09613: the Optimal-Brain-Surgeon saliency w^2 H of A_log with the diagonal
of the Hessian summed over time, in which only h^2 varies; the structured form sums columns. In the paper time steps
then vote on the entries; we rank by the sum alone.

A zero in A_log is a decay rate of -exp(0) = -1, not a missing state: the tensor keeps its size and the scan its cost.
A_log is initialised to log(1), log(2), ..., so entries near 0 score low. That is right on `decay` (zeroing them changes
nothing) and misleading on `state` (the slowest states look the least important).

Cost: one scan per layer and batch. Axes: state, decay; Mamba1-type mixers only. Options: none.
"""

import torch

import sspruner
from sspruner.calibrate.selective import energy_by_channel
from sspruner.graph.family import SelectiveProjected


class SparseSSM(sspruner.Scorer):
    """Scorer of SparseSSM."""

    name, axes, needs = "sparsessm", {"state", "decay"}, "activations"
    token_sums = ("energy",)

    def __init__(self) -> None:
        self.energy: torch.Tensor | float = 0.0  # sum_t h_t^2: fp64 (G, P, N), P channels of each group

    def observe(self, view: sspruner.SSMView) -> None:
        if not isinstance(view.projected, SelectiveProjected):
            raise sspruner.InputError(
                "sparsessm: only Mamba1-type mixers, whose states have decays of their own: use ghost or magnitude"
            )
        self.energy = self.energy + energy_by_channel(view.projected, view.mask)
        self.shape = view.group.groups, view.group.units
        self.a_log = view.tensor("A_log").double()  # (D, N), or (G, P, N)

    def importance(self) -> torch.Tensor:
        energy = torch.as_tensor(self.energy)
        saliency = self.a_log.reshape(energy.shape).square() * energy  # (G, P, N)
        return saliency.reshape(self.shape) if self.axis == "decay" else saliency.sum(1)


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [SparseSSM]
