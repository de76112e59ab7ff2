"""Optimal split of a budget over layers with known damage curves, by exact dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

Curve = Mapping[int, float]  # units kept -> damage of cutting only this layer to that size
NONE = 1e-9  # damage that does not exceed rounding


def damage_at(curve: Curve, kept: Sequence[int], units: int) -> torch.Tensor:
    """Interpolate a measured curve: fp64 (len(kept),), never smaller for fewer units.

    Noise by which fewer units would cost less is removed by a running maximum. Between two points damage is a power of
    the units kept, c k^-p, so that equal ratios of sizes cost equal ratios of damage; next to almost no damage, such as
    that of the whole layer, it is linear. Below the smallest point the last piece is extrapolated.
    """
    points = dict(sorted({**curve, units: 0.0}.items(), reverse=True))  # from the whole layer down
    sizes = torch.tensor(list(points), dtype=torch.float64)
    costs = torch.tensor(list(points.values()), dtype=torch.float64).clamp_min(0).cummax(0).values
    targets = torch.tensor(kept, dtype=torch.float64)
    if len(points) == 1:
        return torch.zeros_like(targets)
    right = torch.searchsorted(-sizes, -targets).clamp(1, len(sizes) - 1)  # sizes[right] <= target, except for the last
    larger, smaller, least, most = sizes[right - 1], sizes[right], costs[right - 1], costs[right]
    linear = least + (most - least) * (larger - targets) / (larger - smaller)
    steepness = (most / least.where(least > NONE, 1.0)).log() / (larger / smaller).log()
    interpolated = linear.where(least <= NONE, least * (larger / targets) ** steepness)
    return interpolated.maximum(least).minimum(
        most.where(targets >= smaller, torch.inf)
    )  # clamp: rounding must not exceed the ends


def best_split(
    options: Mapping[str, Sequence[int]], costs: Mapping[str, torch.Tensor], sets: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Return the sizes, one per layer, with the least total damage whose total number of units is within the budget.

    options  layer -> sizes that it may have
    costs    layer -> the damage of each size
    sets     layer -> number of sets (such as B/C groups) that have this size

    If even the smallest sizes exceed the budget, they are returned. Of equal splits, one with more units.
    """
    unit = math.gcd(*(sets[name] * size for name, sizes in options.items() for size in sizes))
    weights = {name: torch.tensor([sets[name] * size // unit for size in sizes]) for name, sizes in options.items()}
    least = sum(int(w.min()) for w in weights.values())
    room = max(int(budget / unit + 1e-9), least)
    total = torch.full((room + 1,), torch.inf, dtype=torch.float64)  # least damage with exactly so many units
    total[0] = 0
    choices = []
    for name in options:
        ways = torch.full((len(weights[name]), room + 1), torch.inf, dtype=torch.float64)
        for row, (weight, cost) in enumerate(zip(weights[name].tolist(), costs[name].tolist(), strict=True)):
            ways[row, weight:] = total[: max(room + 1 - weight, 0)] + cost
        total, chosen = ways.min(0)
        choices.append(chosen)
    at = room - int(total.flip(0).argmin())  # of equal totals the larger
    split: dict[str, int] = {}
    for name, chosen in zip(reversed(list(options)), reversed(choices), strict=True):
        row = int(chosen[at])
        split[name] = options[name][row]
        at -= int(weights[name][row])
    return {name: split[name] for name in options}
