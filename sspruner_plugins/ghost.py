"""GHOST: how much the mixer's output would change if one unit were zero, from forward passes alone.

    S[g,n] = sqrt( (1/Z) sum_samples sum_t sum_{k in group g} sum_p  h_t[k,p,n]^2 C_t[g,n]^2 )

Source: Menezes & Kyrillidis, "GHOST", arXiv 2602.11408. h^2 stands for controllability, C^2 for (instantaneous)
observability; S^2 is exactly the mean squared change of y per token when state n of group g is zeroed. Z is the
number of tokens that are not padding. In Mamba1 the sum runs over channels instead of heads and p (docs/methods.md).

On heads, head channels, groups and Mamba1's channels the same criterion, ours: S^2 is the mean squared change of y
per token when the unit is zeroed, which there is the energy of what the unit adds, sum y^2.

Cost: about one more scan per layer and batch, in the memory of one chunk of steps: no states are stored.
Axes: state, head, head_dim, group, channel. Options: variant="joint" (default, the product inside the sum) or
"means", on the axis state: the older sqrt(E[h^2] E[C^2]), which loses the correlation of h and C; for comparison.
"""

import torch

import sspruner


class Ghost(sspruner.Scorer):
    name, axes, needs = "ghost", {"state", "head", "head_dim", "group", "channel"}, "activations"

    def __init__(self, variant: str = "joint") -> None:
        if variant not in ("joint", "means"):
            raise sspruner.InputError(f"scorer 'ghost': variant={variant!r}; known: joint, means")
        self.variant = variant
        self.tokens = 0
        self.change: torch.Tensor | float = 0.0  # summed squared change of y: (G, N), or (H, P) of what is added
        self.h2: torch.Tensor | float = 0.0  # (G, N)
        self.c2: torch.Tensor | float = 0.0  # (G, N)

    def observe(self, view: sspruner.SSMView) -> None:
        self.tokens += view.tokens
        self.shape = view.group.groups, view.group.units
        if self.axis != "state":
            self.change = self.change + view.output_energy
        elif self.variant == "joint":
            self.change = self.change + view.ghost_sum
        else:
            self.h2 = self.h2 + view.energy_sum
            c2 = view.C.double().square() * view.mask[..., None, None]  # (b, T, G, N)
            self.c2 = self.c2 + c2.sum((0, 1))

    def importance(self) -> torch.Tensor:
        means = self.axis == "state" and self.variant == "means"
        total = torch.as_tensor(self.h2 * self.c2 / self.tokens if means else self.change)
        # Heads and groups are runs of channels, in the order of memory: a unit's energy is the sum over its run.
        return torch.sqrt(total.reshape(*self.shape, -1).sum(-1) / self.tokens)


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Ghost]
