"""REAP and the other published scores of whole experts, from one pass over the calibration text.

    reap               S[j] = 1/c_j  sum over X_j of  g_j(x) ||f_j(x)||      router-weighted expert activation
    ean                S[j] =        sum over X_j of  ||f_j(x)||             expert activation norm
    router-weight      S[j] =        sum over X_j of  g_j(x)
    expert-frequency   S[j] = c_j = |X_j|

X_j are the calibration tokens that the router sends to expert j, padding left out; f_j the expert's output; g_j the
weight that multiplies it in the model, after any renormalisation and scaling. With reduction="mean", ean and
router-weight are divided by c_j, too. An expert that got no token scores 0.

Source: Lasby et al., "REAP the Experts", arXiv 2510.13999, section 3 (github.com/CerebrasResearch/reap @1970473,
src/reap/pruning_metrics.py, which has the other three, too). There g is by default a softmax of the router's logits
computed anew; llm-compressor takes the weights that the model uses (vllm-project/llm-compressor @ab1ba3ef,
src/llmcompressor/modifiers/pruning/reap), as here: right for sigmoid routers as well.

Cost: one more forward of the chosen experts. Axes: expert. Options: reduction="sum" (default) or "mean", in ean and
router-weight.
"""

import torch

import sspruner


class Routed(sspruner.Scorer):
    """Base of the four: sums over the tokens of each expert."""

    axes, needs = {"expert"}, "activations"
    token_sums = ("tokens", "sum")
    zero = "experts that no calibration token reached"

    def __init__(self) -> None:
        self.tokens: torch.Tensor | float = 0.0  # c: (E,)
        self.sum: torch.Tensor | float = 0.0  # (E,)

    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = view.group.groups, view.group.units  # routing groups are runs of experts
        self.tokens = self.tokens + view.routing.tokens
        self.sum = self.sum + self.of(view)

    def of(self, view: sspruner.SSMView) -> torch.Tensor:
        """Return the sum of one batch: (E,)."""
        raise NotImplementedError

    def importance(self) -> torch.Tensor:
        return torch.as_tensor(self.sum).view(self.shape)

    def mean(self) -> torch.Tensor:
        """Return the mean over the tokens of each expert, 0 without any: (groups, units)."""
        return (torch.as_tensor(self.sum) / torch.as_tensor(self.tokens).clamp_min(1)).view(self.shape)


class Reap(Routed):
    """Scorer of REAP."""

    name = "reap"

    def of(self, view: sspruner.SSMView) -> torch.Tensor:
        return view.routing.weighted_norms

    def importance(self) -> torch.Tensor:
        return self.mean()


class _Reduced(Routed):
    def __init__(self, reduction: str = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise sspruner.InputError(f"scorer {self.name!r}: reduction={reduction!r}; known: sum, mean")
        super().__init__()
        self.reduction = reduction

    def importance(self) -> torch.Tensor:
        return self.mean() if self.reduction == "mean" else super().importance()


class Ean(_Reduced):
    """Scorer of the expert activation norm."""

    name = "ean"

    def of(self, view: sspruner.SSMView) -> torch.Tensor:
        return view.routing.norms


class RouterWeight(_Reduced):
    """Scorer of the weights that the router gives an expert."""

    name = "router-weight"

    def of(self, view: sspruner.SSMView) -> torch.Tensor:
        return view.routing.weights


class Frequency(Routed):
    """Scorer of the number of tokens that an expert gets."""

    name = "expert-frequency"

    def of(self, view: sspruner.SSMView) -> torch.Tensor:
        return view.routing.tokens


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Reap, Ean, RouterWeight, Frequency]
