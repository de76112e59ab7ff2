"""Taylor: change of the loss when one unit is zeroed, from its gradient on the calibration text.

    first   S[u] = | sum_{w in u} w g |                        the first-order change, signs kept inside the sum
    second  S[u] = | -sum_{w in u} w g + 1/2 sum w^2 F |       with the diagonal empirical Fisher F as the Hessian
    fisher  S[u] = sum_{w in u} w^2 F                          SSM-Pruner's "second" form, summed instead of averaged

g is the gradient of the mean loss, F the mean over sequences of the squared gradient of one sequence. A unit includes
all elements removed with it, B and C rows together, each once. Sources: Molchanov et al., arXiv 1906.10771, section 3;
SSM-Pruner (Ghattas et al., arXiv 2502.18886), which ranks the states of Mamba2 this way, on the rows of B and C.

Cost: one backward pass over the calibration text; "second" and "fisher" one for each sequence.
Axes: all of tensors, and single elements. Options: order="first" (default), "second" or "fisher".
"""

from itertools import combinations

import torch

import sspruner


class Taylor(sspruner.Scorer):
    """Scorer of Taylor expansions of the loss."""

    name, axes, needs = "taylor", (sspruner.AXES - {"block", "mixer"}) | sspruner.ELEMENT_AXES, "gradients"
    comparable = True

    def __init__(self, order: str = "first") -> None:
        if order not in ("first", "second", "fisher"):
            raise sspruner.InputError(f"scorer 'taylor': order={order!r}; known: first, second, fisher")
        self.order, self.needs = order, "gradients" if order == "first" else "fisher"

    def observe(self, view: sspruner.SSMView) -> None:
        w = view.weights  # (groups, units, elements) each
        change: torch.Tensor | float = 0.0  # first order
        curvature: torch.Tensor | float = 0.0  # w^2 F
        if self.order != "fisher":
            change = -_over_units(view, {key: w[key] * g for key, g in view.gradients.items()})
        if self.order != "first":
            curvature = _over_units(view, {key: w[key].square() * F for key, F in view.fisher.items()})
        half = 1.0 if self.order == "fisher" else 0.5
        self.score = torch.as_tensor(change + half * curvature).abs()

    def importance(self) -> torch.Tensor:
        return self.score


def _over_units(view: sspruner.SSMView, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over all elements of a unit, each once: fp64 (groups, units)."""
    total = torch.stack([value.sum(-1, dtype=torch.float64) for value in values.values()]).sum(0)
    for a, b in combinations([m for m in view.group.members if m.counted], 2):
        if a.tensor == b.tensor and (a.dims, b.dims) == ((0,), (1,)):  # both the rows and the columns of a matrix
            rows = values[f"{view.group.key(a.tensor)}:{a.rows}"]
            rows = rows.reshape(*a.index.shape, -1)  # (groups, units, rows per unit, columns)
            columns = b.index[:, :, None].expand(-1, -1, a.index.shape[2], -1).to(rows.device)
            total = total - rows.gather(-1, columns).sum((-1, -2), dtype=torch.float64)  # (groups, units)
    return total


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [Taylor]
