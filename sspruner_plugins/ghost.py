"""GHOST: how much the mixer's output would change if one state were zero, from forward passes alone.

    S[g,n] = sqrt( (1/Z) sum_samples sum_t sum_{k in group g} sum_p  h_t[k,p,n]^2 C_t[g,n]^2 )

Source: Menezes & Kyrillidis, "GHOST", arXiv 2602.11408. h^2 stands for controllability, C^2 for (instantaneous)
observability; S^2 is exactly the mean squared change of y per token when state n of group g is zeroed. Z is the
number of tokens that are not padding.

Cost: about one more scan per layer and batch, in the memory of one chunk of steps: no states are stored.
Axes: state. Options: variant="joint" (default, the product inside the sum) or "means", the older
sqrt(E[h^2] E[C^2]), which loses the correlation of h and C; kept for comparison.
"""

import torch

import sspruner
from sspruner.calibrate.state import energy_sum


class Ghost(sspruner.Scorer):
    name, axes, needs = "ghost", {"state"}, "activations"

    def __init__(self, variant: str = "joint") -> None:
        if variant not in ("joint", "means"):
            raise sspruner.InputError(f"scorer 'ghost': variant={variant!r}; known: joint, means")
        self.variant = variant
        self.tokens = 0
        self.joint: torch.Tensor | float = 0.0  # (G, N)
        self.h2: torch.Tensor | float = 0.0  # (G, N)
        self.c2: torch.Tensor | float = 0.0  # (G, N)

    def observe(self, view: sspruner.SSMView) -> None:
        self.tokens += view.tokens
        if self.variant == "joint":
            self.joint = self.joint + view.ghost_sum
        else:
            self.h2 = self.h2 + energy_sum(view.projected, view.mask)
            c2 = view.C.double().square() * view.mask[..., None, None]  # (b, T, G, N)
            self.c2 = self.c2 + c2.sum((0, 1))

    def importance(self) -> torch.Tensor:
        total = self.joint if self.variant == "joint" else self.h2 * self.c2 / self.tokens
        return torch.sqrt(torch.as_tensor(total) / self.tokens)


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Ghost]
