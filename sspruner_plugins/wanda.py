"""Wanda: magnitude of a weight times the RMS of its input.

    S_ij = |W_ij| sqrt(mean_t x_tj^2)                     W (out, in) of a linear layer, x its input
    single elements   S_ij itself; they compete within their row, as in the paper
    other axes        S[g,u] = reduction of S_ij over the rows and columns that unit u owns in all linear layers

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, section 3;
the structured form is ours. Means are over the tokens that are not padding.

On other axes only linear layers count: convolutions, A_log, D, dt_bias, biases, norms and routers have no input x.
On the axes expert, expert_mlp and latent, each expert's matrices count, with the tokens that this expert gets; neurons
of an expert that gets none are ranked by their weights alone. On the axis hidden experts do not count, and layers are
observed in every mixer, attention and MLP; embeddings and the head do not count.

Cost: one more forward of each observed block and one pass over its inputs; an fp32 copy of the weights that are scored.
Axes: all of single tensors (not block, not mixer), and weight.
Options: reduction="sum" (default), "mean" or "max", on other axes than weight.
"""

import torch

import sspruner

EXPERTS = {"experts.gate_up_proj", "experts.up_proj", "experts.down_proj"}
REDUCTIONS = ("sum", "mean", "max")


class Wanda(sspruner.Scorer):
    """Scorer of Wanda."""

    name, needs, granularity = "wanda", "activations", "row"
    axes = sspruner.AXES - {"block", "mixer"} | {"weight"}
    token_sums = ("energy", "tokens")

    def __init__(self, reduction: str = "sum") -> None:
        if reduction not in REDUCTIONS:
            raise sspruner.InputError(f"scorer 'wanda': reduction={reduction!r}; known: {', '.join(REDUCTIONS)}")
        self.reduction = reduction
        self.size: dict[str, torch.Tensor] = {}  # |W|: fp32 (out, in), of experts (E, out, in)
        self.energy: dict[str, torch.Tensor] = {}  # sum_t x^2: fp64 (in,), of experts (E, 1, in)
        self.tokens: dict[str, torch.Tensor | int] = {}  # of experts (E, 1, 1)

    def observe(self, view: sspruner.SSMView) -> None:
        self.group = view.group
        owned = self._owned()
        for key in sorted(owned & EXPERTS):
            energy, tokens = view.routing.energy[key.removeprefix("experts.")], view.routing.tokens
            self._add(view, key, energy[:, None], tokens[:, None, None])
        for key in owned & set(view.inputs) if self.axis not in ("expert", "expert_mlp") else ():
            x = view.inputs[key]  # (tokens, in)
            self._add(view, key, x.double().square().sum(0), len(x))

    def _add(self, view: sspruner.SSMView, key: str, energy: torch.Tensor, tokens: torch.Tensor | int) -> None:
        if key not in self.size:
            self.size[key], self.energy[key], self.tokens[key] = view.tensor(key).abs(), torch.zeros_like(energy), 0
        self.energy[key] = self.energy[key] + energy
        self.tokens[key] = self.tokens[key] + tokens

    def importance(self) -> torch.Tensor:
        if not any(bool(torch.as_tensor(tokens).any()) for tokens in self.tokens.values()):
            raise sspruner.InputError("no linear layer of these units was given a token; choose another scorer")
        tokens = {key: torch.as_tensor(count, device=self.energy[key].device) for key, count in self.tokens.items()}
        rms = {key: (energy / tokens[key].clamp_min(1)).sqrt() for key, energy in self.energy.items()}  # (in,)
        if self.axis == "expert_mlp":
            rms = {key: torch.where(tokens[key] > 0, size, 1.0) for key, size in rms.items()}
        owned = self.group.gather({key: self.size[key] * rms[key] for key in rms})
        scores = torch.cat([s.double() for s in owned.values()], -1)  # (groups, units, elements)
        if self.reduction == "max":
            return scores.amax(-1)
        return scores.sum(-1) if self.reduction == "sum" else scores.mean(-1)

    def _owned(self) -> set[str]:
        """Return the keys of the tensors in which the units own elements."""
        return {self.group.key(name) for name in (self.group.tensor, *(m.tensor for m in self.group.members))}


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Wanda]
