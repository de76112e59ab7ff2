"""Block influence: change of direction of the residual stream by a whole block.

    S[l] = 1 - E_t cos(h_t, block_l(h_t))

A block that hardly changes its input can be removed. Source: ShortGPT (Men et al., arXiv 2403.03853, eq. 1). The
cosine is taken per token and averaged over the tokens that are not padding.

Cost: one more forward of each block. Axes: block.
"""

import torch

import sspruner


class BlockInfluence(sspruner.Scorer):
    """Scorer of block influence."""

    name, axes, needs = "block-influence", {"block"}, "activations"
    comparable = True
    token_sums = ("sums", "tokens")

    def __init__(self) -> None:
        self.sums: dict[int, float] = {}
        self.tokens: dict[int, int] = {}

    def observe(self, view: sspruner.SSMView) -> None:
        before, after = view.hidden.double(), view.output.double()  # (b, T, hidden size)
        cosine = torch.cosine_similarity(before, after, dim=-1)[view.mask]  # (tokens,)
        assert view.unit is not None  # on this axis the engine shows whole blocks
        self.sums[view.unit] = self.sums.get(view.unit, 0.0) + float((1 - cosine).sum())
        self.tokens[view.unit] = self.tokens.get(view.unit, 0) + view.tokens

    def importance(self) -> torch.Tensor:
        return torch.tensor([[self.sums[unit] / self.tokens[unit] for unit in sorted(self.sums)]])


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [BlockInfluence]
