"""Head merging: merge similar heads, or whole B/C groups, into one. Merging happens in reduce; the score only selects.

Units of one set are clustered by their normalised rows of in_proj: those of x on the axis head; x, B and C on group.
Of every cluster one unit stays, with

    rows that produce a unit (z, x, B, C, dt, conv, A_log, D, ...) the mean over the cluster
    columns of out_proj, W, with the gated norm's weight w         W' w' = sum_i W_i w_i,  w'^2 = mean w_i^2

so that merging equal units changes nothing. On the axis head a gated RMS norm averages over the heads of a set. With
K' of K heads it sees K'/K of the energy (a slice is made equal to that mask), so w' takes the factor sqrt(K'/K): exact
for equal heads in clusters of equal size, up to the norm's epsilon.

Importance: the distance of a unit from those before it in farthest-first order, starting at the medoid (Gonzalez,
Theor. Comput. Sci. 38, 1985). The first K' of that order start the clusters. Source of merging: Ghattas et al., "On
Pruning State-Space LLMs", arXiv 2502.18886.

Cost: distances of all pairs in a set; no forward pass. Axes: head, group. Options: method="mean" (default), clusters of
nearly equal size, nearest pairs first; or "kmeans", Lloyd's iterations, clusters of any size. The seed breaks ties.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import sspruner
from sspruner.graph.group import as_rows

MADE_BY = {"head": ("x",), "group": ("x", "B", "C")}  # rows of in_proj that produce a unit
ITERATIONS = 100


class HeadMerge(sspruner.Scorer):
    """Scorer that merges similar heads or groups."""

    name, axes, needs = "head-merge", {"head", "group"}, "weights"

    def __init__(self, method: str = "mean") -> None:
        if method not in ("mean", "kmeans"):
            raise sspruner.InputError(f"scorer 'head-merge': method={method!r}; known: mean, kmeans")
        self.method = method

    def observe(self, view: sspruner.SSMView) -> None:
        if "in_proj.weight:x" not in view.weights:
            raise sspruner.InputError(
                "head-merge: not for delta rules, whose heads cannot stand for each other: use ghost"
            )
        producing_rows = [view.weights[f"in_proj.weight:{rows}"].double().cpu() for rows in MADE_BY[self.axis]]
        self.rows = F.normalize(torch.cat(producing_rows, -1), dim=-1)  # (groups, units, elements)
        self.members = [(view.group.key(m.tensor), m) for m in view.group.members if m.counted]
        self.tensors = {key: view.tensor(key).double().cpu() for key, _ in self.members}
        generator = torch.Generator().manual_seed(self.seed)
        orders = [_farthest_first(rows, generator) for rows in self.rows]
        self.orders = [order for order, _ in orders]
        self.score = torch.stack([score for _, score in orders])  # (groups, units)

    def importance(self) -> torch.Tensor:
        return self.score

    def reduce(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        keep = torch.zeros_like(choose(self.score))
        new = {key: tensor.clone() for key, tensor in self.tensors.items()}
        for g, count in enumerate(choose(self.score).sum(-1).tolist()):
            for cluster in self._clusters(self.rows[g], self.orders[g], count):
                keep[g, cluster[0]] = True
                self._merge(new, g, cluster, count)
        return keep, {key: tensor.float() for key, tensor in new.items()}

    def _clusters(self, rows: torch.Tensor, order: list[int], count: int) -> list[list[int]]:
        """Return `count` clusters of units, each in the given order: its first unit is the one that stays."""
        label = (_balanced if self.method == "mean" else _kmeans)(rows, order[:count])
        return [[unit for unit in order if label[unit] == c] for c in range(count)]

    def _merge(self, new: dict[str, torch.Tensor], g: int, cluster: list[int], count: int) -> None:
        """Write the merged values of a cluster into the elements of its first unit."""
        norm: torch.Tensor | None = None
        for key, member in self.members:
            if key == "norm.weight":
                norm = self.tensors[key][member.index[g, cluster]]  # (cluster, channels)
        for key, member in self.members:
            index = member.index[g, cluster]  # (cluster, rows per unit)
            values = as_rows(self.tensors[key], member.dims)[index]  # (cluster, rows per unit, ...)
            merged = values.mean(0)
            if key == "norm.weight":
                merged = _gain(values)
                if self.axis == "head":
                    merged = merged * (count / self.score.shape[1]) ** 0.5
            elif member.dims == (1,):  # out_proj reads the units
                merged = values.sum(0)
                if norm is not None:
                    gain = _gain(norm)[:, None]  # (channels, 1)
                    merged = torch.where(gain != 0, (values * norm[..., None]).sum(0) / gain, merged)
            as_rows(new[key], member.dims)[index[0]] = merged  # of one dimension: a view


def _gain(norm: torch.Tensor) -> torch.Tensor:
    """Return the root mean square over a cluster, with the sign of the sum. (cluster, n) -> (n,)."""
    return torch.copysign(norm.square().mean(0).sqrt(), norm.sum(0))


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the distances of all pairs of rows: (len(a), len(b)); exactly 0 for equal rows."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _farthest_first(rows: torch.Tensor, generator: torch.Generator) -> tuple[list[int], torch.Tensor]:
    """Return the units in farthest-first order, and each unit's distance from those before it: (units,).

    The first unit scores 2, the largest distance that unit vectors can have.
    """
    shuffled = torch.randperm(len(rows), generator=generator)  # decides between equals
    distances = _distances(rows, rows)[shuffled][:, shuffled]
    score = torch.full((len(rows),), 2.0, dtype=rows.dtype)
    unit = int(distances.sum(1).argmin())
    order, nearest = [unit], distances[unit].clone()
    while len(order) < len(rows):
        nearest[order] = -1.0
        unit = int(nearest.argmax())
        score[shuffled[unit]] = nearest[unit]
        order.append(unit)
        nearest = torch.minimum(nearest, distances[unit])
    return shuffled[order].tolist(), score


def _balanced(rows: torch.Tensor, first: list[int]) -> dict[int, int]:
    """Assign units to clusters whose sizes differ by at most 1, nearest pairs of unit and first unit first."""
    smallest, larger = divmod(len(rows), len(first))  # `larger` clusters have one unit more
    label, sizes = {unit: c for c, unit in enumerate(first)}, [1] * len(first)
    for pair in _distances(rows, rows[first]).flatten().argsort(stable=True).tolist():
        unit, c = divmod(pair, len(first))
        if unit in label or sizes[c] > smallest or (sizes[c] == smallest and not larger):
            continue
        larger -= sizes[c] == smallest
        label[unit], sizes[c] = c, sizes[c] + 1
    return label


def _kmeans(rows: torch.Tensor, first: list[int]) -> dict[int, int]:
    """Assign units to clusters by Lloyd's iterations from the units `first`; no cluster is empty."""
    centres, label = rows[first], torch.full((len(rows),), -1)
    for _ in range(ITERATIONS):
        distances = _distances(rows, centres)
        before, label = label, distances.argmin(1)
        for c in range(len(first)):
            if not (label == c).any():  # an empty cluster takes the unit farthest from its centre, but no single one
                alone = torch.bincount(label, minlength=len(first))[label] == 1
                label[distances.gather(1, label[:, None])[:, 0].masked_fill(alone, -1.0).argmax()] = c
        if torch.equal(before, label):
            break
        centres = torch.stack([rows[label == c].mean(0) for c in range(len(first))])
    return dict(enumerate(label.tolist()))


@sspruner.hookimpl
def sspruner_scorers() -> list[type[sspruner.Scorer]]:
    return [HeadMerge]
