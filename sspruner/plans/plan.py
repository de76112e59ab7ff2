"""Plan: one reduction per dependency group, as frozen data with a JSON form. Surgery takes nothing else."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from sspruner.axes import WHOLE_MODEL, axis_of
from sspruner.errors import PlanError
from sspruner.files import strict_json
from sspruner.files.fields import integer, table, versioned
from sspruner.files.output import atomic_file
from sspruner.graph.group import DependencyGroup
from sspruner.graph.site import within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.reduction import Projection, Reduction, check_fits, check_reduction, from_json, tensors_of
from sspruner.plans.tensors import digest, pack, read_tensors, unpack

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Units that stay in each dependency group, elements that stay in single tensors, and new values of parameters.

    groups    `<module path>:<axis>` -> Selection or Projection
    model     identifies the model, by its fingerprint among others
    made_by   records how the plan was made
    elements  `<module path>:<axis>` of single elements -> bool (rows, cols), True for elements that stay
    updates   full name of a parameter -> its new value in the size before the cut; may add a bias to a linear layer

    New values are written first, then units and elements are removed.
    """

    groups: dict[str, Reduction]
    model: dict[str, str] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    elements: dict[str, torch.Tensor] = field(default_factory=dict)
    updates: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that the plan cuts, in order of first appearance."""
        return tuple(dict.fromkeys(axis_of(name) for name in (*self.groups, *self.elements)))

    @property
    def drops(self) -> bool:
        """True if the plan removes any unit or element."""
        units = any(s.after < s.before for s in self.groups.values())
        return units or not all(bool(keep.all()) for keep in self.elements.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = (self.groups, self.model, self.made_by) == (other.groups, other.model, other.made_by)
        return same and _same(self.elements, other.elements) and _same(self.updates, other.updates)

    def to_json(self, digest: bool = True) -> dict[str, Any]:
        """Return the content of plan.json. Tensors are represented by their shapes and a digest.

        digest=False omits the digest: a config's record has the values among the weights.
        """
        return self._json(self._packed() if digest else {})

    def _packed(self) -> dict[str, torch.Tensor]:
        """Return the tensors for the file beside plan.json."""
        return pack(self.elements, {**self.updates, **tensors_of(self.groups)})

    def _json(self, packed: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        data: dict[str, Any] = {
            "version": VERSION,
            "model": self.model,
            "axis": ",".join(self.axes),
            "groups": {name: reduction.to_json() for name, reduction in self.groups.items()},
            "made_by": self.made_by,
        }
        if packed:
            data["tensors"] = digest(packed)
        return data | {key: recorded for key, recorded in self._shapes().items() if recorded}

    def _shapes(self) -> dict[str, dict[str, Any]]:
        """Return the shapes of masks and new values, as plan.json records them."""
        return {
            "elements": {n: {"shape": list(k.shape), "kept": int(k.sum())} for n, k in self.elements.items()},
            "updates": {name: list(value.shape) for name, value in self.updates.items()},
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "plan", tensors: Mapping[str, torch.Tensor] | None = None) -> Plan:
        """Parse the content of plan.json. tensors: the content of the file beside it.

        Raises PlanError that names the first malformed field.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise PlanError(f"{where}: not a plan of version {VERSION}")
        if _has_tensors(data) and tensors is None:
            raise PlanError(f"{where}: its tensors lie in a file beside it; read it with Plan.load")
        try:
            if _has_tensors(data) and data.get("tensors") != digest(tensors or {}):
                raise PlanError(f"{where}: the tensors in its .safetensors file are not those of this plan")
            groups = {str(name): from_json(str(name), g, tensors or {}) for name, g in data["groups"].items()}
            elements = {
                str(name): unpack((tensors or {})[name], tuple(map(integer, m["shape"])))
                for name, m in data.get("elements", {}).items()
            }
            updates = {str(name): (tensors or {})[name] for name in data.get("updates", {})}
            plan = cls(groups, dict(data.get("model", {})), dict(data.get("made_by", {})), elements, updates)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise PlanError(f"{where}: malformed plan ({type(error).__name__}: {error})") from error
        for name, reduction in plan.groups.items():
            check_reduction(f"{where}: {name}", reduction)
        for key, stated in plan._shapes().items():
            if stated != data.get(key, {}):
                raise PlanError(f"{where}: malformed plan ({key!r} are not those in the file beside it)")
        return plan

    def save(self, path: str | Path, tensors: str | Path | None = None) -> None:
        """Write plan.json atomically, with one line per dependency group, so that plans can be compared with diff.

        Element masks, new values and projections go to `tensors`, by default the file of the same name with the suffix
        .safetensors.
        """
        packed = self._packed()
        data = self._json(packed)
        parts = {key: data.pop(key) for key in ("groups", "elements", "updates") if key in data}
        text = strict_json.dumps(data, indent=2).removesuffix("\n}")
        for key, part in parts.items():
            lines = [f"    {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in part.items()]
            text += f',\n  "{key}": {{\n' + ",\n".join(lines) + "\n  }"
        with ExitStack() as files:  # both are written before either is renamed into place
            if packed:
                beside = tensors or Path(path).with_suffix(".safetensors")
                files.enter_context(atomic_file(beside)).write_bytes(to_bytes(packed))
            files.enter_context(atomic_file(path)).write_text(text + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read plan.json and, if it has tensors, the file with them. Raises PlanError if one is missing or wrong."""
        try:
            data = strict_json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path}: cannot be read ({type(error).__name__}: {error})") from error
        tensors = read_tensors(Path(path)) if _has_tensors(data) else None
        return cls.from_json(data, f"plan {path}", tensors)

    def __str__(self) -> str:
        shown = {name: f"{s.before} -> {s.after}" for name, s in self.groups.items()}
        for name, keep in self.elements.items():
            zeros = 1 - int(keep.sum()) / keep.numel()
            shown[name] = f"{' x '.join(map(str, keep.shape))}, {100 * zeros:.1f} % zeros"
        width = max(map(len, shown), default=0)
        lines = [f"plan on {', '.join(self.axes)}", *(f"  {name:<{width}}  {text}" for name, text in shown.items())]
        if self.updates:
            lines.append(f"  new values for {len(self.updates)} parameter{'s' * (len(self.updates) > 1)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PlanSummary:
    """Content of plan.json without its tensors: units before and after by dependency group, and its origin."""

    layers: dict[str, dict[str, int]]
    made_by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Any) -> PlanSummary:
        """Read the parsed content of plan.json. Raises KeyError, TypeError or ValueError if it is malformed."""
        fields = versioned(data, VERSION)
        sizes = {name: table(group) for name, group in table(fields["groups"]).items()}
        layers = {name: {when: integer(size[when]) for when in ("before", "after")} for name, size in sizes.items()}
        return cls(layers, table(fields.get("made_by", {})))


def part_of(plan: Plan, graph: SSMGraph, block: str) -> Plan:
    """Return the part of a plan that changes one block, plus its cuts of axes of the whole model.

    The rest of the plan need not be applied while only this block runs.
    """
    sites = {path: site for site in graph.sites for path in (site.path, *site.aliases) if within(path, block)}
    here = {site.path for site in sites.values()}
    groups = {n: r for n, r in plan.groups.items() if n.rpartition(":")[0] in here or axis_of(n) in WHOLE_MODEL}

    def touches(name: str) -> bool:
        return within(name, block) or any(within(name, path) for path in here)

    return replace(
        plan,
        groups=groups,
        elements={n: keep for n, keep in plan.elements.items() if touches(graph.elements[n].tensor)},
        updates={n: value for n, value in plan.updates.items() if touches(n)},
    )


def check_plan(plan: Plan, graph: SSMGraph, fingerprint: str | None = None, model: nn.Module | None = None) -> None:
    """Raise PlanError unless every reduction of `plan` fits `graph` and, if both are known, the fingerprints agree.

    A plan that removes nothing is an error, too, since the caller expects a smaller model. New values are compared with
    the parameters of `model`, if given.
    """
    made_for = plan.model.get("fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise PlanError(
            f"the plan was made for another model (fingerprint {made_for}, this model has {fingerprint}); "
            "make a plan for this one"
        )
    for name, reduction in plan.groups.items():
        group = _find(name, graph.groups, "dependency group")
        check_reduction(name, reduction)
        check_fits(name, reduction, group)
        if isinstance(reduction, Projection) and (why := basis_refused(group, graph)):
            raise PlanError(f"{name}: cannot be projected: {why}")
        if reduction.after % group.multiple_of and reduction.after < reduction.before:
            near = min([*group.counts(), group.units], key=lambda n: abs(n - reduction.after))
            raise PlanError(
                f"{name}: keeps {reduction.after} units; the model's code needs a multiple of {group.multiple_of}; the "
                f"nearest is {near}"
            )
        if reduction.after == 0:
            raise PlanError(f"{name}: keeps nothing; at least 1 unit has to stay (to drop whole layers: axis block)")
        if reduction.after < min(group.least, reduction.before):
            sets = f" in each of {group.groups} sets" if group.groups > 1 else ""
            raise PlanError(
                f"{name}: keeps {reduction.after} units; at least {group.least} have to stay{sets}: {group.why_least}"
            )
    for name, keep in plan.elements.items():
        check_mask(keep, _find(name, graph.elements, "tensor to zero elements of"))
    check_updates(plan.updates, model, graph)
    if not plan.drops:
        raise PlanError("the plan keeps every unit: nothing would be removed; remove something with sparsity or keep")
    _check_modules(plan, graph)


def basis_refused(group: DependencyGroup, graph: SSMGraph) -> str:
    """Return the reason why a dependency group cannot be projected to another basis, "" if it can."""
    if group.axis != "state":
        return "only the state of Mamba2-type mixers can have another basis"
    return next(site.family.basis_refused for site in graph.layers if site.path == group.layer and site.family)


def check_mask(keep: torch.Tensor, group: DependencyGroup) -> None:
    """Raise PlanError unless `keep` is a mask of the group's elements."""
    if keep.dtype != torch.bool:
        raise PlanError(f"{group.name}: a mask of {keep.dtype}; it must be bool, True for what stays")
    if keep.shape != (group.groups, group.units):
        raise PlanError(
            f"{group.name}: the plan's mask is {tuple(keep.shape)}, the model's tensor {(group.groups, group.units)}; "
            "make a plan for this model"
        )


def check_updates(updates: Mapping[str, torch.Tensor], model: nn.Module | None, graph: SSMGraph) -> None:
    """Raise PlanError unless every new value fits its parameter, or a bias that a described linear layer lacks."""
    parameters = dict(model.named_parameters(remove_duplicate=False)) if model is not None and updates else {}
    name_of: dict[tuple[int, bool], str] = {}
    for name, value in updates.items():
        dtype = value.dtype
        if model is not None:
            new = name not in parameters
            like = _weight_beside(name, model, graph) if new else parameters[name]
            shape, dtype = like.shape[:1] if new else like.shape, like.dtype
            if value.shape != shape:
                raise PlanError(f"{name}: its new value is {tuple(value.shape)}, the parameter {tuple(shape)}")
            first = name_of.setdefault((id(like), new), name)
            if first != name:
                raise PlanError(f"{name}: is the same parameter as {first}; give one new value")
        if not value.is_floating_point() or not bool(value.to(dtype).isfinite().all()):
            raise PlanError(f"{name}: its new value is not finite in {str(dtype).removeprefix('torch.')}")


def _weight_beside(name: str, model: nn.Module, graph: SSMGraph) -> torch.Tensor:
    """Return the weight of the linear layer to which a bias would be added.

    The graph must describe the bias: another one could not be cut with its rows, and some kernels do not read it.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if leaf != "bias" or not isinstance(module, nn.Linear):
        near = difflib.get_close_matches(name, [n for n, _ in model.named_parameters()], n=1, cutoff=0)
        raise PlanError(f"{name}: the model has no such parameter; the nearest is {near[0]}")
    for site in graph.sites:
        for place in (site.path, *site.aliases):
            if any(f"{place}.{slot.tensor}" == name for slot in site.layout.slots):
                return module.weight
    raise PlanError(f"{name}: the model has no such bias, and none can be added there")


def _find(name: str, groups: Mapping[str, DependencyGroup], what: str) -> DependencyGroup:
    if name not in groups:
        near = difflib.get_close_matches(name, groups, n=1, cutoff=0) or [""]
        raise PlanError(f"{name}: the model has no such {what}; the nearest is {near[0]}")
    return groups[name]


def _check_modules(plan: Plan, graph: SSMGraph) -> None:
    """Raise PlanError if whole-module axes remove every mixer or every attention layer.

    Without mixers it is no state-space model, and the caches of hybrids count tokens in an attention layer.
    """
    removed = [
        graph.groups[name].blocks[unit].path
        for name, selection in plan.groups.items()
        for unit in (selection.dropped(0) if graph.groups[name].blocks else ())
    ]
    kinds = {"mixer": graph.layers, "attention layer": [s for s in graph.sites if s.kind == "attention"]}
    for kind, sites in kinds.items() if removed else ():
        paths = [path for site in sites for path in (site.path, *site.aliases)]
        removed_around = [next((g for g in removed if path == g or path.startswith(f"{g}.")), None) for path in paths]
        if paths and all(removed_around):
            raise PlanError(
                f"the plan drops every {kind}; one has to stay: leave it alone with ignore {removed_around[-1]!r}"
            )


def _has_tensors(data: Any) -> bool:
    return isinstance(data, dict) and any(data.get(key) for key in ("elements", "updates", "tensors"))


def _same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        t.dtype == two[name].dtype and torch.equal(t.cpu(), two[name].cpu()) for name, t in one.items()
    )
