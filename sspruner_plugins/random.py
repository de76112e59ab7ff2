"""Random scores, the baseline for every other scorer: a permutation seeded by the run's seed and the layer.

Cost: none; no forward pass. Axes: all, and single elements.
"""

import hashlib

import torch

import sspruner


class Random(sspruner.Scorer):
    """Scorer of random permutations."""

    name, axes, needs = "random", sspruner.AXES | sspruner.ELEMENT_AXES, "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        digest = hashlib.sha256(f"{self.seed}:{view.layer}:{self.axis}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.rand(view.group.groups, view.group.units, generator=generator)  # (groups, units)
        self.score = order if self.axis in sspruner.ELEMENT_AXES else order.argsort(-1).float()

    def importance(self) -> torch.Tensor:
        return self.score


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Random]
