"""GHOST: change of the mixer's output when one unit is zeroed, from forward passes alone.

    S[g,n] = sqrt( (1/Z) sum_samples sum_t sum_{k in group g} sum_p  w_t[k,p] h_t[k,p,n]^2 C_t[g,n]^2 )

Source: Menezes & Kyrillidis, "GHOST", arXiv 2602.11408, where w = 1. h^2 stands for controllability, C^2 for
(instantaneous) observability; S^2 is then the mean squared change of y per token when state n of group g is zeroed. Z
is the number of tokens that are not padding. In Mamba1 the sum runs over channels instead of heads and p.

variant="output", ours, weights the change of y by its first-order effect on the mixer's output:

    w_t[k,p] = silu(z_t[k,p])^2 rms_t^-2 norm.weight[k,p]^2 ||W_out[:,(k,p)]||^2

with the mean square of the gated norm (one for each group; 1 where there is no norm) held constant, and without
products between channels. On heads, head channels, groups and Mamba1's channels S^2 is the energy of the unit's
contribution, sum w y^2. docs/scorers/ghost.md has the derivations.

Cost: about one more scan per layer and batch, in the memory of one chunk of steps; "output" on state computes the
states themselves, four steps at a time, in about four times the time of "joint". Axes: state, head, head_dim, group,
channel. Options: variant="joint" (default), "output", or "means", on state the older sqrt(E[h^2] E[C^2]), for
comparison.
"""

import torch

import sspruner
from sspruner.calibrate import scans


class Ghost(sspruner.Scorer):
    """Scorer of GHOST."""

    name, axes, needs = "ghost", {"state", "head", "head_dim", "group", "channel"}, "activations"
    token_sums = ("tokens", "change", "h2", "c2")

    def __init__(self, variant: str = "joint") -> None:
        if variant not in ("joint", "means", "output"):
            raise sspruner.InputError(f"scorer 'ghost': variant={variant!r}; known: joint, means, output")
        self.variant = variant
        self.tokens = 0
        self.change: torch.Tensor | float = 0.0  # summed squared change of y: (groups, units)
        self.h2: torch.Tensor | float = 0.0  # (G, N)
        self.c2: torch.Tensor | float = 0.0  # (G, N)

    def observe(self, view: sspruner.SSMView) -> None:
        self.tokens += view.tokens
        if self.variant == "output":
            self.change = self.change + _change_of_output(view, self.axis)
        elif self.axis != "state":
            self.change = self.change + view.by_unit(view.output_energy)
        elif self.variant == "joint":
            self.change = self.change + view.ghost_sum
        else:
            self.h2 = self.h2 + view.energy_sum
            c2 = view.C.double().square() * view.mask[..., None, None]  # (b, T, G, N)
            self.c2 = self.c2 + c2.sum((0, 1))

    def importance(self) -> torch.Tensor:
        means = self.axis == "state" and self.variant == "means"
        total = torch.as_tensor(self.h2 * self.c2 / self.tokens if means else self.change)
        return torch.sqrt(total / self.tokens)


def _change_of_output(view: sspruner.SSMView, axis: str) -> torch.Tensor:
    """Return the summed squared change of out_proj's output: fp64 (groups, units)."""
    w = view.output_weights
    if axis != "state":
        return view.by_unit((w * view.y.square() * view.mask[..., None, None]).sum((0, 1), dtype=torch.float64))
    return scans.weighted_ghost_sum(view.projected, w, view.mask)


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Ghost]
