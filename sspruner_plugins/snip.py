"""SNIP: first-order change of the loss when a unit's weights are scaled.

    S_ij = |w_ij g_ij|           g: gradient of the mean next-token loss over all calibration tokens
    other axes  S[g,u] = the sum of |w g| over all parameters of unit u

Source: Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", arXiv 1810.02340, section 4.1.
The paper divides all scores by their sum over the model; one constant changes no ranking and is left out. The paper
prunes before training; here the score ranks the weights of a trained model.

Cost: one forward and backward pass over the calibration; one fp32 gradient per parameter.
Axes: all of single tensors (not block, not mixer), weight, decay. Options: none.
"""

import torch

import sspruner


class Snip(sspruner.Scorer):
    """Scorer of SNIP."""

    name, needs, granularity = "snip", "gradients", "global"
    comparable = True
    axes = sspruner.AXES - {"block", "mixer"} | sspruner.ELEMENT_AXES

    def observe(self, view: sspruner.SSMView) -> None:
        parts = [(w * view.gradients[key]).abs().sum(-1) for key, w in view.weights.items()]  # (groups, units) each
        self.score = torch.stack(parts).sum(0)

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Snip]
