"""Perplexity drop: repeatedly remove the block or mixer whose removal increases the calibration loss least.

    removed = [];  repeat:  u = argmin over the rest of loss(model without removed and u);  removed += [u]
    S[u] = the step at which u was removed, so that the last one is the most important

Source: Mamba-Shedder (Muñoz et al., arXiv 2501.17088): training-free removal, evaluated at every step. Later steps take
earlier removals into account, which a score of single blocks (block-influence) does not.

A loss that is NaN or infinite is the worst. Of equal losses the unit is removed whose removal alone costs less, then
the first. Cost: U (U + 1) / 2 forward passes of the whole model over the calibration text, for U units. stop=k: only k
steps are taken, and the others are ranked by the loss without each of them alone: U + (U - 1) + ... passes, k terms.
Axes: block, mixer. Options: stop (default: all but the last one).
"""

import math
from collections.abc import Sequence

import torch

import sspruner


class PerplexityDrop(sspruner.Scorer):
    """Scorer of iterative block removal."""

    name, axes, needs = "perplexity-drop", {"block", "mixer"}, "loss"
    comparable = True

    def __init__(self, stop: int | None = None) -> None:
        if stop is not None and (not isinstance(stop, int) or isinstance(stop, bool) or stop < 0):
            raise sspruner.InputError(f"scorer 'perplexity-drop': stop={stop!r}; a number of units, 0 or more")
        self.stop = stop

    def observe(self, view: sspruner.SSMView) -> None:
        def loss(units: Sequence[int]) -> float:
            value = view.loss(sorted(units))
            return value if math.isfinite(value) else math.inf

        units = view.group.units
        steps = units - 1 if self.stop is None else min(self.stop, units - 1)
        alone = [loss([u]) for u in range(units)]
        rest, removed = list(range(units)), list[int]()
        for step in range(steps):
            losses = {u: loss([*removed, u]) for u in rest} if step else dict(enumerate(alone))
            least = min(rest, key=lambda u: (losses[u], alone[u]))
            rest.remove(least)
            removed.append(least)
        order = removed + sorted(rest, key=lambda u: alone[u])
        self.score = torch.empty(1, units)
        self.score[0, order] = torch.arange(units, dtype=torch.float32)

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [PerplexityDrop]
