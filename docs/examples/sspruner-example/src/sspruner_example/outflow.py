"""Outflow: what a head or a channel sends on to the residual stream.

    S[u]^2 = 1/Z sum_t sum_{c in u} (y_t[c] silu(z_t[c]))^2 ||W_out[:, c]||^2

y is the scan's output, z its gate, W_out the projection that reads them. It differs from `ghost` on these axes by the
gate and by W_out. The norm that some families have before W_out is left out. Z is the number of tokens that count.

Cost: one scan per layer and batch. Axes: head, head_dim, channel. Options: gate=false leaves silu(z) out.
"""

import torch
import torch.nn.functional as F

import sspruner


class Outflow(sspruner.Scorer):
    name, axes, needs = "outflow", {"head", "head_dim", "channel"}, "activations"
    token_sums = ("energy", "tokens")

    def __init__(self, gate: bool = True) -> None:
        self.gate, self.tokens = gate, 0
        self.energy: torch.Tensor | float = 0.0  # (channels,)

    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = view.group.groups, view.group.units
        (columns,) = (w for key, w in view.weights.items() if key.endswith("_proj.weight:y"))  # out_proj, or o_proj
        self.columns = columns.double()  # (groups, units, channels of a unit * hidden size)
        sent = view.y.flatten(2).double()  # (b, T, channels)
        if self.gate:
            sent = sent * F.silu(view.z.double())
        self.energy = self.energy + sent[view.mask].square().sum(0)
        self.tokens += view.tokens

    def importance(self) -> torch.Tensor:
        energy = torch.as_tensor(self.energy).reshape(*self.shape, -1)  # units are runs of channels, in their order
        columns = self.columns.reshape(*energy.shape, -1).square().sum(-1)  # (groups, units, channels of a unit)
        return ((energy * columns).sum(-1) / self.tokens).sqrt()


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Outflow]
