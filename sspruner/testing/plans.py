"""Random plans for any model, and helpers that permute or zero the units of a dependency group."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import nn

from sspruner.graph.group import DependencyGroup, Member, as_rows
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan, basis_refused
from sspruner.plans.reduction import Projection, Selection
from sspruner.surgery.slice import move_gain


def selection(groups: int, units: int, after: int, seed: int, safe: tuple[int, ...] = ()) -> Selection:
    """Return a selection of `after` units in every set, including the `safe` ones; the others are drawn set by set."""
    rng, free = random.Random(seed), [unit for unit in range(units) if unit not in safe]
    keep = [sorted([*safe, *rng.sample(free, after - len(safe))]) for _ in range(groups)]
    return Selection(units, tuple(map(tuple, keep)))


@st.composite
def plans(draw: st.DrawFn, graph: SSMGraph, axes: tuple[str, ...] = (), most: int = 5) -> Plan:
    """Draw a plan that cuts up to `most` dependency groups on some axes (default: all), each to its own size.

    One mixer and one attention layer stay where there are some, as check_plan requires.
    """
    staying = [draw(st.sampled_from(paths)) for paths in _must_stay(graph)]
    cuttable = _cuttable(graph, axes, staying)
    names = draw(st.lists(st.sampled_from(list(cuttable)), min_size=1, max_size=most, unique=True))
    chosen = {}
    for name in names:
        group, counts, safe = cuttable[name]
        whole = [group.units] if name != names[0] else []  # the others may also keep everything
        after = draw(st.sampled_from(counts + whole))
        seed = draw(st.integers(0, 2**16))
        chosen[name] = selection(group.groups, group.units, after, seed, safe)
    return Plan({name: chosen[name] for name in cuttable if name in chosen})


def random_plan(graph: SSMGraph, axes: tuple[str, ...], seed: int, most: int = 5, multiple_of: int = 1) -> Plan:
    """Return a random plan: up to `most` dependency groups, each with fewer units; where possible a multiple."""
    rng = random.Random(seed)
    cuttable = _cuttable(graph, axes, [rng.choice(paths) for paths in _must_stay(graph)])
    names = rng.sample(list(cuttable), min(len(cuttable), rng.randint(1, most)))
    counts = {name: [n for n in cuttable[name][1] if n % multiple_of == 0] or cuttable[name][1] for name in names}
    cut = {name: (*cuttable[name], rng.choice(counts[name]), rng.randrange(2**16)) for name in names}
    return Plan({n: selection(g.groups, g.units, after, order, safe) for n, (g, _, safe, after, order) in cut.items()})


def _cuttable(
    graph: SSMGraph, axes: tuple[str, ...], staying: list[str]
) -> dict[str, tuple[DependencyGroup, list[int], tuple[int, ...]]]:
    """Return the groups that can be cut: name -> (group, possible numbers of kept units, units that must stay)."""
    cuttable = {}
    for name, group in graph.groups.items():
        safe = tuple(i for i, b in enumerate(group.blocks) if any(f"{p}.".startswith(f"{b.path}.") for p in staying))
        counts = [n for n in sizes(group) if n >= len(safe)]
        if counts and (not axes or group.axis in axes):
            cuttable[name] = group, counts, safe
    assert cuttable, f"{graph.model_class} has nothing to cut on {axes}: draw a larger model"
    return cuttable


def directions(plan: Plan, graph: SSMGraph, seed: int) -> Plan:
    """Return the same plan, with projections to random directions in place of selections of states that allow it."""
    generator = torch.Generator().manual_seed(seed)
    projectable = {name: r for name, r in plan.groups.items() if not basis_refused(graph.groups[name], graph)}
    return Plan(
        plan.groups | {n: random_projection(r.sets, r.before, r.after, generator) for n, r in projectable.items()}
    )


def random_projection(sets: int, before: int, after: int, generator: torch.Generator) -> Projection:
    """Return a random projection that is neither orthogonal nor aligned with coordinates."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = (1 + 0.2 * normal(sets, after, 1)).clamp_min(0.5)
    encode = torch.linalg.qr(normal(sets, before, before)).Q[:, :after] * scale  # (sets, k, N)
    decode = torch.linalg.pinv(encode)  # (sets, N, k)
    beside = torch.eye(before, dtype=torch.float64) - decode @ encode  # projector onto the rest of the space
    return Projection(encode.float(), (decode + 0.3 * beside @ normal(*decode.shape)).float())


def sizes(group: DependencyGroup) -> list[int]:
    """Return the numbers of units that a cut may keep in every set."""
    return list(group.counts())


def _must_stay(graph: SSMGraph) -> list[list[str]]:
    """Return lists of paths, of which one path each must stay: all mixers, and all attention layers."""
    kinds = [graph.layers, [site for site in graph.sites if site.kind == "attention"]]
    return [[path for site in sites for path in (site.path, *site.aliases)] for sites in kinds if sites]


@torch.no_grad()
def permute(model: nn.Module, group: DependencyGroup, orders: torch.Tensor) -> None:
    """Move unit orders[g, i] to the place of unit i of set g, in every tensor. orders: int64 (groups, units).

    Factors that all sets share move, too, if the orders agree; else the matrix that reads the units takes them up.
    """
    if group.gain and bool((orders == orders[0]).all()):
        factors = _tensor(model, group.gain.tensor)
        factors.copy_(factors[orders[0]].clone())
    elif group.gain:
        move_gain(model, group.gain)
    for member in group.members:
        permute_rows(_tensor(model, member.tensor), member, orders)


def permute_rows(values: torch.Tensor, member: Member, orders: torch.Tensor) -> None:
    """Permute the units in one tensor, in place: the member's, or any other of that shape."""
    source = member.index.gather(1, orders[..., None].expand_as(member.index))
    _write(values, member, member.index, as_rows(values, member.dims)[source.flatten()].clone())


@torch.no_grad()
def zero_units(model: nn.Module, group: DependencyGroup, units: Sequence[int]) -> None:
    """Zero everything that these units own, in every set."""
    for member in group.members:
        values, index = _tensor(model, member.tensor), member.index[:, list(units)]
        _write(values, member, index, torch.zeros_like(as_rows(values, member.dims)[index.flatten()]))


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), leaf).data
    return value


def _write(values: torch.Tensor, member: Member, index: torch.Tensor, rows: torch.Tensor) -> None:
    front = values.movedim(member.dims, tuple(range(len(member.dims))))  # a view
    front[torch.unravel_index(index.flatten(), front.shape[: len(member.dims)])] = rows


def compatible_axes(axes: list[str], graph: SSMGraph) -> list[list[str]]:
    """Split the axes into rounds without nested axes, so that the axes of a round can be permuted together."""
    nested = {axis: {d for site in graph.sites for d in site.layout.axes.get(axis, ())} for axis in axes}
    rounds: list[list[str]] = []
    for axis in axes:
        free = (r for r in rounds if not any(axis in nested[other] or other in nested[axis] for other in r))
        suitable = next(free, None)
        if suitable is None:
            rounds.append([axis])
        else:
            suitable.append(axis)
    return rounds
