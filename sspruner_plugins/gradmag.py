"""Gradient-aware magnitude, for single weights under one threshold for the whole model.

    S(w) = |w| |g|^alpha         g: gradient of the mean next-token loss over all calibration tokens

Source: Shihab et al., arXiv 2505.08299 (unstructured pruning of Mamba), section 3: alpha = 1, and one global threshold
over all prunable weights. alpha = 0 is the magnitude, and needs no gradients; alpha = 1 is SNIP. The axis defines the
prunable weights: those of linear layers, never A_log, D, dt_bias, norms or convolutions.

Cost: one forward and backward pass over the calibration; one fp32 gradient per parameter; alpha = 0: none.
Axes: weight. Options: alpha=1.0, at least 0.
"""

import math

import torch

import sspruner


class GradMag(sspruner.Scorer):
    """Scorer of gradient-aware magnitude."""

    name, axes, needs, granularity = "gradmag", {"weight"}, "gradients", "global"
    comparable = True

    def __init__(self, alpha: float = 1.0) -> None:
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha < math.inf:
            raise sspruner.InputError(f"scorer 'gradmag': alpha={alpha!r}; must be a number, at least 0")
        self.alpha = alpha
        self.needs = "gradients" if alpha else "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        self.score = view.weights["weight"].abs()[..., 0].double()  # (out, in)
        if self.alpha:
            self.score = self.score * view.gradients["weight"].abs()[..., 0].double() ** self.alpha

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [GradMag]
