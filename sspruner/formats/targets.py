"""Runtime targets: which sizes a runtime supports, from the table in targets.toml, and the nearest supported sizes.

Arithmetic on sizes only. `sspruner.formats.fitting` checks whether a stock config can describe the whole model.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sspruner.errors import InputError, ModelError
from sspruner.formats.rules import HOW, Rule, rules_of, said, table

if TYPE_CHECKING:  # torch is not needed to name a target
    from sspruner.graph.layout import Layout
    from sspruner.graph.site import Site
    from sspruner.graph.ssm_graph import SSMGraph

MOST_TRIES = 200_000  # largest number of combinations of sizes that are tried
WAYS = "export --to hf-remote and --to sspruner write any cut"


@dataclass(frozen=True)
class Target:
    """A runtime with what it supports.

    models    config types that it serves
    writer    name of the export format that it reads
    rules     its conditions on sizes and config fields
    shards    True if it can split a mixer over GPUs
    checked   version that was looked at
    how       run, read or claimed
    gone      config types that it does not serve, with the reason
    backend   device of the runtime that was chosen, "" for any
    tp        number of GPUs that share a model
    """

    name: str
    models: tuple[str, ...]
    writer: str
    rules: tuple[Rule, ...]
    shards: bool = False
    checked: str = ""
    how: str = "read"
    gone: Mapping[str, str] = field(default_factory=dict)
    backend: str = ""
    tp: int = 1

    def __str__(self) -> str:
        return f"{self.name} on {self.tp} GPUs" if self.tp > 1 else self.name

    @property
    def known(self) -> str:
        """Say how and in which version its rules were found, unless a rule says otherwise."""
        return f"{HOW[self.how]} {self.checked}"

    def broken(self, model: str, layout: Layout, levels: Sequence[str] = ("must",)) -> list[Rule]:
        """Return the rules of some levels that a module of this size breaks. model: the type of its config.

        Only rules that bind: those of every backend, or of the chosen one.
        """
        rules = [r for r in self.concerning(model, sizes=True) if r.level in levels and self._binds(r)]
        return [rule for rule in rules if not rule.holds(layout, self.tp)]

    def serves(self, graph: SSMGraph) -> str:
        """Return the reason why the target does not serve models of this kind, "" if it does."""
        if graph.family is None:
            return f"{self.name} reads models of transformers' families; {graph.model_class} is not known as one"
        if why := self.gone.get(graph.family.name):
            return why
        if graph.family.name not in self.models:
            return f"{self.name} has no models of type {graph.family.name}; it has {', '.join(self.models)}"
        return ""

    def misreads(self, graph: SSMGraph, config: Any) -> list[str]:
        """Describe the mandatory rules that the config breaks, whatever the sizes of the mixers."""
        rules = [r for r in self.concerning(_type(graph), sizes=False) if r.level == "must" and self._binds(r)]
        return [said(rule, config) for rule in rules if not rule.allows(config)]

    def refuses(self, graph: SSMGraph) -> list[str]:
        """Describe the mandatory rules that mixers and experts break, without duplicates."""
        name = _type(graph)
        messages = {said(r, site.layout): None for site in sized(graph) for r in self.broken(name, site.layout)}
        return list(messages)

    def notes(self, graph: SSMGraph, config: Any) -> list[str]:
        """Describe slower paths, other backends and other effects in the target, without duplicates."""
        broken = [
            (rule, site.layout)
            for site in sized(graph)
            for rule in self.concerning(_type(graph), sizes=True)
            if not rule.holds(site.layout, self.tp)
        ]
        whole = [(rule, config) for rule in self.concerning(_type(graph), sizes=False) if not rule.allows(config)]
        lines = [self._note(r, subject) for r, subject in broken + whole if r.level != "must" or not self._binds(r)]
        return list(dict.fromkeys(lines))

    def concerning(self, model: str, sizes: bool) -> list[Rule]:
        """Return the rules, on sizes or on the config, that concern a config type and the backend, if one is chosen."""
        return [
            r
            for r in self.rules
            if bool(r.of) == sizes
            and (not r.models or model in r.models)
            and (not r.backends or not self.backend or self.backend in r.backends)
        ]

    def _binds(self, rule: Rule) -> bool:
        """Return whether a rule holds for every way to use the target, or for the way that was chosen."""
        return rule.writer in ("", self.writer) and (not rule.backends or bool(self.backend))

    def lead(self, rule: Rule) -> str:
        """Return what breaking a rule means, and where: `slower on CUDA`."""
        on = [f"from a folder of --to {rule.writer}"] if rule.writer not in ("", self.writer) else []
        on += [f"on {', '.join(rule.backends)}"] if rule.backends else []
        lead = {"must": ["not"], "slow": ["slower"], "memory": ["memory"], "note": []}[rule.level]
        return " ".join([*lead, *on])

    def _note(self, rule: Rule, subject: Any) -> str:
        begin = self.lead(rule)
        return f"{begin}{': ' if begin else ''}{said(rule, subject)} ({rule.known})"


def sized(graph: SSMGraph) -> list[Site]:
    """Return the modules whose sizes rules are about: mixers and mixtures of experts."""
    return [site for site in graph.sites if site.family is not None or site.kind == "experts"]


def _type(graph: SSMGraph) -> str:
    assert graph.family is not None
    return graph.family.name


def names() -> tuple[str, ...]:
    """Return the names of all targets in the table."""
    return tuple(name for name in table() if name != "quantities")


def runtime_of(name: str) -> str:
    """Return the runtime of a target, without its backend: `vllm` of `vllm:cpu`."""
    return name.partition(":")[0]


def target(name: str, tp: int = 1) -> Target:
    """Return a target of the table: `vllm`, or one of its backends, `vllm:cpu`.

    Raises InputError for an unknown name or backend, and for tp > 1 if the target cannot split a mixer.
    """
    base, suffix = runtime_of(name), name.partition(":")[2]
    if base not in names():
        raise InputError(f"target {name!r}: unknown; known: {', '.join(names())}")
    row = table()[base]
    backends = {backend.lower(): backend for backend in row.get("backends", ())}
    if ":" in name and suffix.lower() not in backends:
        ways = ", ".join(f"{base}:{one}" for one in backends)
        raise InputError(f"target {name!r}: unknown; {f'known: {base}, {ways}' if ways else f'{base} has no backends'}")
    if tp < 1:
        raise InputError(f"tp {tp}: must be at least 1")
    if tp > 1 and not row["shards"]:
        sharing = [other for other in names() if table()[other]["shards"]]
        raise InputError(f"tp {tp}: {base} does not split a mixer over GPUs; tp is for {', '.join(sharing)}")
    return Target(
        name=name.lower(),
        models=tuple(row["models"]),
        writer=row["writer"],
        rules=rules_of(row),
        shards=row["shards"],
        checked=row["checked"],
        how=row["how"],
        gone=row.get("gone", {}),
        backend=backends.get(suffix.lower(), ""),
        tp=tp,
    )


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
    if graph.family is None:
        return {"block"}
    sizes, coupled = graph.family.config_sizes.values(), graph.family.couplings
    return {dim for size in sizes for term in size for dim in term} | {"block", *coupled}


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

        Sizes for which the target is slow are taken where there is no other.

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
        axes = [axis for axis in cut if axis != "block"]
        requested = {axis: counts[cut[axis][0]] for axis in axes}
        choices = {
            axis: sorted(
                set.intersection(*({n for n in options[name] if n < groups[name].units} for name in cut[axis]))
            )
            for axis in axes
        }
        rounded = nearest(choices, requested, self._fast) or nearest(choices, requested, self._runs)
        if rounded is None:
            why = "; ".join(dict.fromkeys(self._broken(requested))) or "no such size obeys the other options"
            if not requested:
                raise InputError(f"target {t}: does not take the sizes of this model: {why}. {WAYS}")
            described = ", ".join(f"{axis} {n}" for axis, n in requested.items())
            raise InputError(
                f"target {t}: takes no cut like {described}. {why}; nothing that it takes lies below. {WAYS}"
            )
        return dict(counts) | {name: n for axis, n in rounded.items() for name in cut[axis]}

    def _broken(self, sizes: Mapping[str, int], levels: Sequence[str] = ("must", "slow")) -> Iterator[str]:
        """Describe the rules that these sizes break: mandatory rules, and slow paths of the axes that are cut."""
        for layout in self._layouts():
            after = layout.resized({axis: n for axis, n in sizes.items() if axis in layout.sizes})
            for rule in self.target.broken(_type(self.graph), after, levels):
                if rule.level == "must" or rule.touches(list(sizes)):
                    yield said(rule, after)

    def _fast(self, sizes: Mapping[str, int]) -> bool:
        return not any(True for _ in self._broken(sizes))

    def _runs(self, sizes: Mapping[str, int]) -> bool:
        return not any(True for _ in self._broken(sizes, ("must",)))

    def slower(self, axis: str, sizes: Sequence[int]) -> list[str]:
        """Describe the slow paths on which each of these sizes of an axis is, and the present one is not."""
        rules = [r for r in self.target.concerning(_type(self.graph), sizes=True) if r.level == "slow"]
        lost = [
            rule
            for rule in rules
            if rule.touches([axis])
            for layout in self._layouts()
            if rule.holds(layout, self.target.tp)
            and not any(rule.holds(layout.resized({axis: n}), self.target.tp) for n in sizes)
        ]
        return [f"{axis}: every cut is {self.target.lead(rule)}: {rule.why}" for rule in dict.fromkeys(lost)]

    def _layouts(self) -> list[Layout]:
        return list({tuple(site.layout.sizes.items()): site.layout for site in sized(self.graph)}.values())

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
        """Return the sizes to which one axis alone can be cut, in every layer alike: the fast ones, if any."""
        runs = [n for n in self._candidates(axis) if axis == "block" or self._runs({axis: n})]
        return [n for n in runs if axis == "block" or self._fast({axis: n})] or runs

    def takes_none(self, axis: str) -> str:
        """Return why there is no size to which one axis alone can be cut; "" if the config has no field for it."""
        sizes = self._candidates(axis)
        return "; ".join(dict.fromkeys(self._broken({axis: sizes[-1]}, ("must",)))) if sizes else ""

    def _candidates(self, axis: str) -> list[int]:
        """Return the sizes to which an axis can be cut in every layer alike, whatever the rules."""
        if axis not in expressible(self.graph, self.target.writer):
            return []
        groups = [group for group in self.graph.groups.values() if group.axis == axis]
        return sorted(set.intersection(*({*group.counts()} for group in groups)))


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
