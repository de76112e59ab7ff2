"""Runtime targets: which sizes a runtime supports, from the table in targets.toml, and the nearest supported sizes.

Arithmetic on sizes only. `sspruner.formats.fitting` checks whether a stock config can describe the whole model.
"""

from __future__ import annotations

import heapq
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspruner.errors import InputError, ModelError

if TYPE_CHECKING:  # torch is not needed to name a target
    from sspruner.graph.layout import Layout, Size
    from sspruner.graph.ssm_graph import SSMGraph

TABLE = Path(__file__).with_name("targets.toml")
MOST_TRIES = 200_000  # largest number of combinations of sizes that are tried
WAYS = "export --to hf-remote and --to sspruner write any cut"


@dataclass(frozen=True)
class Rule:
    """One condition on one quantity of every mixer. targets.toml documents the fields."""

    of: str
    why: str
    models: tuple[str, ...] = ()
    level: str = "must"
    one_of: tuple[int, ...] = ()
    most: int = 0
    multiple: int | str = 1
    twice: str = ""
    powers: int = 0
    shards: str = ""

    def holds(self, layout: Layout, tp: int) -> bool:
        """Return whether the mixer meets the condition, which is also the case if it lacks a quantity."""
        n, other = quantity(self.of, layout), self.twice or self.multiple
        beside = quantity(other, layout) if isinstance(other, str) else other
        if n is None or beside is None:
            return True
        return (
            (not self.one_of or n in self.one_of)
            and (not self.most or n <= self.most)
            and (n == 2 * beside if self.twice else n % beside == 0)
            and (not self.powers or (n >= self.powers and n & (n - 1) == 0))
            and (not self.shards or _splits(n, tp, self.shards))
        )

    def touches(self, axes: Sequence[str]) -> bool:
        """Return whether a cut of these axes changes the quantity."""
        return any(dim in axes for term in _quantities()[self.of][0] for dim in term)


@dataclass(frozen=True)
class Target:
    """A runtime with the sizes that it supports.

    models  config types that it serves
    writer  name of the export format that it reads
    shards  True if it can split a mixer over GPUs
    ran     True if its rules were tested by running it; False if they were read in its sources
    tp      number of GPUs that share a model
    """

    name: str
    models: tuple[str, ...]
    writer: str
    shards: bool
    ran: bool
    rules: tuple[Rule, ...]
    tp: int = 1

    def __str__(self) -> str:
        return f"{self.name} on {self.tp} GPUs" if self.tp > 1 else self.name

    def broken(self, model: str, layout: Layout, levels: Sequence[str] = ("must",)) -> list[Rule]:
        """Return the rules of some levels that a mixer of this size breaks. model: the type of its config."""
        rules = [r for r in self.rules if r.level in levels and (not r.models or model in r.models)]
        return [rule for rule in rules if not rule.holds(layout, self.tp)]

    def serves(self, graph: SSMGraph) -> str:
        """Return the reason why the target does not serve models of this kind, "" if it does."""
        if graph.family is None:
            return f"{self.name} reads models of transformers' families; {graph.model_class} is not known as one"
        if graph.family.name not in self.models:
            return f"{self.name} has no models of type {graph.family.name}; it has {', '.join(self.models)}"
        return ""

    def refuses(self, graph: SSMGraph) -> list[str]:
        """Describe the mandatory rules that the mixers break, without duplicates."""
        assert graph.family is not None
        name = graph.family.name
        messages = {said(r, site.layout): None for site in graph.layers for r in self.broken(name, site.layout)}
        return list(messages)

    def notes(self, graph: SSMGraph) -> list[str]:
        """Describe slower paths and other effects of these sizes in the target, without duplicates."""
        assert graph.family is not None
        name, levels = graph.family.name, ("fast", "note")
        messages = {said(r, site.layout): None for site in graph.layers for r in self.broken(name, site.layout, levels)}
        return list(messages)


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _quantities() -> dict[str, tuple[Size, str]]:
    """Return name -> (a sum of products of dimensions, description)."""
    return {name: (tuple(map(tuple, q["sizes"])), q["says"]) for name, q in _table()["quantities"].items()}


def quantity(name: str, layout: Layout) -> int | None:
    """Return a quantity of a mixer; None if it lacks one of the dimensions."""
    size, _ = _quantities()[name]
    return layout.stock_total(size) if all(dim in layout.sizes for term in size for dim in term) else None


def said(rule: Rule, layout: Layout) -> str:
    """Describe a rule that a mixer breaks."""
    return f"{_quantities()[rule.of][1]} {quantity(rule.of, layout)}: {rule.why}"


def _splits(n: int, tp: int, shards: str) -> bool:
    if shards == "none":
        return tp == 1
    return n % tp == 0 or (shards == "even or one" and n == 1) or (shards == "even or spread" and tp % n == 0)


def names() -> tuple[str, ...]:
    """Return the names of all targets in the table."""
    return tuple(name for name in _table() if name != "quantities")


def target(name: str, tp: int = 1) -> Target:
    """Return a target of the table.

    Raises InputError for an unknown name, and for tp > 1 if the target cannot split a mixer.
    """
    if name not in names():
        raise InputError(f"target {name!r}: unknown; known: {', '.join(names())}")
    row = _table()[name]
    if tp < 1:
        raise InputError(f"tp {tp}: must be at least 1")
    if tp > 1 and not row["shards"]:
        sharing = [other for other in names() if _table()[other]["shards"]]
        raise InputError(f"tp {tp}: {name} does not split a mixer over GPUs; tp is for {', '.join(sharing)}")
    rules_data: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}
        for rule in row["rules"]
    ]
    rules = tuple(Rule(**fields) for fields in rules_data)
    return Target(name, tuple(row["models"]), row["writer"], row["shards"], row["ran"], rules, tp)


def chosen(name: str | None, tp: int) -> Target | None:
    """Return the named target, None if no name is given. Raises InputError for tp without a target."""
    if name is None and tp != 1:
        raise InputError(f"tp {tp}: says over how many GPUs a target splits the model; name the target, too")
    return None if name is None else target(name, tp)


def expressible(graph: SSMGraph, writer: str = "hf") -> set[str]:
    """Return the axes whose size is a field of the model's stock config, and `block`, which every config counts.

    GGUF has a field for every size; which of them llama.cpp builds together is found by trying (formats/gguf.py).
    """
    if writer == "gguf":
        return {*graph.axes} - {"mixer"}
    sizes = graph.family.config_sizes.values() if graph.family else ()
    return {dim for size in sizes for term in size for dim in term} | {"block"}


@dataclass(frozen=True)
class Fit:
    """Rounding of an allocation's counts to sizes that a target supports, the same size in all layers."""

    target: Target
    graph: SSMGraph

    def to_json(self) -> dict[str, Any]:
        """Return the target's name and tp, as a budget records them."""
        return {"name": self.target.name, "tp": self.target.tp}

    def counts(self, counts: Mapping[str, int], options: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the nearest supported counts that still cut every axis that `counts` cuts; of two the larger.

        counts   dependency group -> number of units kept
        options  dependency group -> the counts that all other settings allow

        Raises ModelError for a model that the target does not serve and for axes that its config cannot express,
        InputError for layers that would differ and for a cut without a supported size.
        """
        groups, t = self.graph.groups, self.target
        if why := t.serves(self.graph):
            raise ModelError(f"target {t.name}: {why}")
        by_axis: dict[str, list[str]] = {}
        for name in counts:
            by_axis.setdefault(groups[name].axis, []).append(name)
        cut = {axis: n for axis, n in by_axis.items() if any(counts[name] < groups[name].units for name in n)}
        can_cut = expressible(self.graph, t.writer)
        for axis, named in cut.items():
            if axis not in can_cut:
                raise ModelError(
                    f"target {t.name}: no field of the config holds the size of axis {axis}, so that it cannot load "
                    f"such a cut; axes that it may: {', '.join(a for a in self.graph.axes if a in can_cut)}. {WAYS}"
                )
            sizes = {counts[name] for name in named}
            if len(sizes) > 1:
                raise InputError(
                    f"target {t.name}: takes one size for all layers; {axis} would keep {min(sizes)} to {max(sizes)}: "
                    "give --keep, or leave out ratios, ignore, floor and cap that set layers apart"
                )
        sized = [axis for axis in cut if axis != "block"]
        requested = {axis: counts[cut[axis][0]] for axis in sized}
        choices = {
            axis: sorted(
                set.intersection(*({n for n in options[name] if n < groups[name].units} for name in cut[axis]))
            )
            for axis in sized
        }
        rounded = nearest(choices, requested, lambda sizes: not any(True for _ in self._broken(sizes)))
        if rounded is None:
            why = "; ".join(dict.fromkeys(self._broken(requested))) or "no such size obeys the other options"
            if not requested:
                raise InputError(f"target {t}: does not take the sizes of this model: {why}. {WAYS}")
            described = ", ".join(f"{axis} {n}" for axis, n in requested.items())
            raise InputError(
                f"target {t}: takes no cut like {described}. {why}; nothing that it takes lies below. {WAYS}"
            )
        return dict(counts) | {name: n for axis, n in rounded.items() for name in cut[axis]}

    def _broken(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """Describe the rules that these sizes break: mandatory rules, and fast paths of the axes that are cut."""
        assert self.graph.family is not None
        name = self.graph.family.name
        for layout in self._layouts():
            after = layout.resized({axis: n for axis, n in sizes.items() if axis in layout.sizes})
            for rule in self.target.broken(name, after, ("must", "fast")):
                if rule.level == "must" or rule.touches(list(sizes)):
                    yield said(rule, after)

    def _layouts(self) -> list[Layout]:
        return list({tuple(site.layout.sizes.items()): site.layout for site in self.graph.layers}.values())

    def changes(self, asked: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
        """Describe what was rounded: one line per axis."""
        lines = {}
        for name, n in counts.items():
            group = self.graph.groups[name]
            if n != asked[name]:
                why = "; ".join(dict.fromkeys(self._broken({group.axis: asked[name]}))) or "the sizes of the other axes"
                layers = " in every layer" if group.axis != "hidden" else ""
                lines[group.axis] = f"{group.axis}: {asked[name]} -> {n} of {group.units}{layers}: {why}"
        return list(lines.values())

    def takes(self, axis: str) -> list[int]:
        """Return the supported sizes of one axis if only this axis is cut, equally in every layer."""
        groups = [group for group in self.graph.groups.values() if group.axis == axis]
        step = max(group.multiple_of for group in groups)
        candidates = range(step, min(group.units for group in groups), step)
        if axis not in expressible(self.graph, self.target.writer):
            return []
        return [n for n in candidates if axis == "block" or not any(True for _ in self._broken({axis: n}))]


def fit_to(graph: SSMGraph, name: str | None, tp: int) -> Fit | None:
    """Return the rounding for the named target, None if no name is given."""
    runtime = chosen(name, tp)
    return None if runtime is None else Fit(runtime, graph)


def nearest(
    choices: Mapping[str, Sequence[int]], wanted: Mapping[str, int], fits: Callable[[dict[str, int]], bool]
) -> dict[str, int] | None:
    """Return the sizes, one per axis, that fit and are nearest to those wanted; of equally near ones the larger.

    The distance is the sum over the axes of |size - wanted| / wanted. None if no combination of the choices fits.
    """
    axes = list(choices)
    order = {a: sorted(choices[a], key=lambda n, a=a: (abs(n - wanted[a]), -n)) for a in axes}  # type: ignore[misc]
    if not all(order.values()):
        return None

    def rank(at: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
        sizes = {a: order[a][i] for a, i in zip(axes, at, strict=True)}
        distance = sum(abs(n - wanted[a]) / wanted[a] for a, n in sizes.items())
        return round(distance, 12), -sum(n / wanted[a] for a, n in sizes.items()), at

    start = (0,) * len(axes)
    heap, seen = [rank(start)], {start}
    for _ in range(MOST_TRIES):
        if not heap:
            return None
        *_, at = heapq.heappop(heap)
        sizes = {a: order[a][i] for a, i in zip(axes, at, strict=True)}
        if fits(sizes):
            return sizes
        for k, axis in enumerate(axes):
            more = (*at[:k], at[k] + 1, *at[k + 1 :])
            if more[k] < len(order[axis]) and more not in seen:
                seen.add(more)
                heapq.heappush(heap, rank(more))
    return None
