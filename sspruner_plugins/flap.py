"""FLAP: fluctuation of a unit's output, weighted by the layer that reads it; removed units are replaced by their mean.

    metric_j = Var_t(y_j) sum_o W_out[o,j]^2           y: input of the Linear that reads the units, W_out its weight
    S[u]     = mean over the channels j of u of (metric_j - mean) / std        mean and std over the layer
    bias    += W_out[:, dropped] E_t[y_dropped]        the mean of dropped units still reaches the output

A channel that hardly varies can be replaced by its mean: with the bias, the squared error of the layer's output is
that of the fluctuations alone. The z-score makes layers comparable, for budgets distributed by score. Sources: An et
al., FLAP, arXiv 2312.11983, section 3; on heads of Mamba2 SSM-FLAP in Ghattas et al., arXiv 2502.18886.

Var is the population variance over all tokens that are not padding, from fp64 sums of y minus its first value, so that
a constant has variance 0, also where fp32 rounding alone varies it. A layer whose metrics are all equal scores 0. Needs
two tokens.
Cost: one more forward of each block. Axes: head, head_dim, channel, mlp. Options: none.
"""

from collections.abc import Callable
from typing import Any

import torch

import sspruner

ROUNDING = 1e-6  # relative: some roundings of fp32


class Flap(sspruner.Scorer):
    """Scorer of FLAP."""

    name, axes, needs = "flap", {"head", "head_dim", "channel", "mlp"}, "activations"
    comparable = True

    def __init__(self) -> None:
        self.tokens = 0
        self.first: torch.Tensor | float = 0.0  # y of the first token: (in features,)
        self.sum: torch.Tensor | float = 0.0  # of y - first
        self.squares: torch.Tensor | float = 0.0
        self.key = ""

    def observe(self, view: sspruner.SSMView) -> None:
        # The last Linear that reads the units: out_proj or down_proj. In Mamba1 x_proj also reads them, earlier.
        reader = [m for m in view.group.members if m.dims == (1,)][-1]
        key = view.group.key(reader.tensor)
        y = view.inputs[key].double()  # (tokens, in features)
        if not self.key:
            self.key, self.weight = key, view.tensor(key).double()  # (out features, in features)
            self.first = self.weight.new_zeros(self.weight.shape[1])
            self.columns = reader.index.to(y.device)  # (groups, units, channels)
            bias = self.key.removesuffix("weight") + "bias"
            self.bias_key, self.bias = bias, view.tensor(bias).double() if view.has(bias) else None
        if not self.tokens and len(y):
            self.first = y[0]
        y = y - self.first
        self.tokens += len(y)
        self.sum, self.squares = self.sum + y.sum(0), self.squares + y.square().sum(0)

    def combine(self, total: Callable[[Any], Any]) -> None:
        # Use one origin, the mean of the first values in fp32, so that a constant keeps variance 0.
        sampled = total(float(self.tokens > 0))  # processes that saw a token
        origin = torch.as_tensor(total(self.first) / max(sampled, 1)).float().double()
        shift = self.first - origin if self.tokens else 0.0
        squares = self.squares + 2 * shift * self.sum + self.tokens * shift * shift
        self.sum, self.squares = total(self.sum + self.tokens * shift), total(squares)
        self.first, self.tokens = origin, total(self.tokens)

    def importance(self) -> torch.Tensor:
        if self.tokens < 2:
            raise sspruner.InputError(f"a variance needs at least 2 calibration tokens, not {self.tokens}")
        variance = torch.as_tensor(self.squares - self.sum * self.sum / self.tokens).clamp_min(0) / self.tokens
        mean = torch.as_tensor(self.first + self.sum / self.tokens)  # (in features,)
        variance = variance * (variance > (ROUNDING * mean).square())  # rounding of a constant is no fluctuation
        metric = (variance * self.weight.square().sum(0))[self.columns]  # (groups, units, channels)
        spread, deviation = metric.std(correction=0), metric - metric.mean()
        rounding = 1e-12 * metric.max()
        score = deviation / spread if spread > rounding else torch.zeros_like(deviation)
        return score.mean(-1)  # (groups, units)

    def reduce(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        keep = choose(self.importance())
        dropped = self.columns[~keep.to(self.columns.device)].flatten()
        mean = torch.as_tensor(self.first + self.sum / self.tokens)  # (in features,)
        bias = self.weight[:, dropped] @ mean[dropped]  # (out features,)
        return keep, {self.bias_key: (bias if self.bias is None else self.bias + bias).float()}


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Flap]
