"""LAST: worst-case gain of each state, relative to the stronger states of its layer.

    e_n = ||C_n||^2 ||B_n||^2 / (1 - |lambda_n|)^2          squared H-infinity norm of one state of a diagonal system
    S_n = e_n / sum_{j: e_j >= e_n} e_j                     over all states of the layer, in (0, 1]

Source: Gwak et al., "Layer-Adaptive State Pruning for Deep State Space Models", arXiv 2411.02824. S falls with e, so
within a layer it ranks as e does; between layers it is a share, so that one threshold for all layers
(--allocation global --one-shot) gives each layer a size of its own.

The paper is about systems that do not change with time (S4, S5). Carried over to selective ones by us: B, C and the
decay differ by token, so with the discretised input dt B

    ||B_n||^2 -> mean_t (dt_t B_t[n])^2,   ||C_n||^2 -> mean_t C_t[n]^2,   lambda_n -> mean_t exp(dt_t A)

for each head (Mamba2) or channel (Mamba1), and e of state n is the sum over the heads or channels of its group. This is
no gain of the real system any more. In Mamba2 a head's decay is the same for all its states: it weighs the heads, and
hardly changes how states rank within a layer. With input="weights" no forward pass runs: B and C are replaced by the
rows of their projections (without convolution, activation and norms), and dt = softplus(its bias).
A decay that fp32 cannot distinguish from 1 counts as 1 - 1.2e-7. States without energy have S = 0.

Cost: no scan; tokens x D x N (Mamba1), tokens x H x N (Mamba2). Axes: state.
Options: input="activations" (default) or "weights".
"""

import torch
import torch.nn.functional as F

import sspruner
from sspruner.graph.family import DeltaProjected


class Last(sspruner.Scorer):
    """Scorer of LAST."""

    name, axes, needs = "last", {"state"}, "activations"
    comparable = True
    token_sums = ("tokens", "b2", "c2", "lost")

    def __init__(self, input: str = "activations") -> None:
        if input not in ("activations", "weights"):
            raise sspruner.InputError(f"scorer 'last': input={input!r}; known: activations, weights")
        self.needs = input
        self.tokens = 0
        self.b2: torch.Tensor | float = 0.0  # sums over tokens of (dt B)^2: (G, K, N), K heads or channels of a group
        self.c2: torch.Tensor | float = 0.0  # of C^2: (G, 1, N)
        self.lost: torch.Tensor | float = 0.0  # of 1 - lambda: (G, K, N), or (G, K, 1) if the states of a head share it

    def observe(self, view: sspruner.SSMView) -> None:
        weighed = self.needs == "weights"
        if not any(k.endswith(":B") for k in view.weights) if weighed else isinstance(view.projected, DeltaProjected):
            raise sspruner.InputError(
                "last: not for delta rules, whose states have no gain of their own: use ghost or rrqr"
            )
        if weighed:
            self._observe_weights(view)
            return
        counted, G = view.mask, view.group.groups
        B, C = view.B[counted].double(), view.C[counted].double()  # (tokens, G, N)
        dt = view.dt[counted].double().flatten(1)
        dt = dt.reshape(len(dt), G, dt.shape[1] // G)  # (tokens, G, K): heads in runs, by group
        A = view.A.double().reshape(G, dt.shape[-1], -1)  # (G, K, N), or (G, K, 1)
        lost = [-torch.expm1(dt * a).sum(0) for a in A.unbind(-1)]  # one state at a time: tokens x K, never x N
        self.tokens += view.tokens
        self.b2 = self.b2 + torch.einsum("tgk,tgn->gkn", dt.square(), B.square())
        self.c2 = self.c2 + C.square().sum(0)[:, None]
        self.lost = self.lost + torch.stack(lost, -1)

    def _observe_weights(self, view: sspruner.SSMView) -> None:
        if not view.has("A_log"):
            raise sspruner.InputError(
                "last: the decay depends on the token here, and no weight holds it: use magnitude"
            )
        G, N = view.group.groups, view.group.units
        rows_of = {
            rows: torch.cat([w for key, w in view.weights.items() if "proj" in key and key.endswith(rows)], -1).double()
            for rows in (":B", ":C")
        }  # (G, N, elements)
        bias = next(key for key in ("dt_bias", "dt_proj.bias", "dt_proj_bias") if view.has(key))
        dt = F.softplus(view.tensor(bias).double()).reshape(G, -1, 1)  # (G, K, 1)
        decay = view.tensor("A_log").double().exp()
        decay = decay.reshape(G, -1, 1) if decay.ndim == 1 else decay.reshape(G, -1, N)
        self.tokens = 1
        self.b2 = dt.square() * rows_of[":B"].square().sum(-1)[:, None]
        self.c2 = rows_of[":C"].square().sum(-1)[:, None]
        self.lost = -torch.expm1(-dt * decay)

    def importance(self) -> torch.Tensor:
        tokens = max(self.tokens, 1)
        gap = torch.as_tensor(self.lost / tokens).clamp_min(torch.finfo(torch.float32).eps)
        energy = torch.as_tensor(self.b2 / tokens * (self.c2 / tokens) / gap.square()).sum(1)  # (G, N)
        return share(energy.flatten()).view(energy.shape)


def share(energy: torch.Tensor) -> torch.Tensor:
    """Return e_n / sum_{j: e_j >= e_n} e_j, 0 where all energies are 0: (n,)."""
    at_least = energy[None] >= energy[:, None]  # (n, n): row n marks what is not smaller than n
    total = at_least.to(energy.dtype) @ energy
    return torch.where(total > 0, energy / total, 0.0)


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Last]
