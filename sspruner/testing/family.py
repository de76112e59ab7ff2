"""check_family: test a family's description of a mixer on models that contain it."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.calibrate import scans
from sspruner.compute.forward import embedding, forward
from sspruner.errors import SSPrunerError
from sspruner.graph.family import Family
from sspruner.graph.known import installed_families
from sspruner.graph.layout import Layout
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plugins.manager import plugin_manager
from sspruner.surgery.proof import slice_with_proof
from sspruner.testing.examples import try_examples
from sspruner.testing.plans import directions, permute, random_plan, sizes

Scan = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]  # (mixer, y, z) -> the mixer's output


def check_family(
    family: Family,
    make_model: Callable[[int], nn.Module],
    *,
    scan_to_output: Scan | None = None,
    save: bool = True,
    max_examples: int = 5,
) -> None:
    """Check a family on your own models. Call it in a test; the family need not be registered.

    make_model      seed -> a small model in eval mode; the seed decides its values (and its sizes, if you like). Use
                    random values everywhere: a bias of 0 or a gain of 1 hides faults
    scan_to_output  computes the mixer's output from the scan's output y and the gate z, both as `project` returns them;
                    by default some part of the mixer must receive y or y * silu(z)
    save            whether the model can be saved and loaded, as a model that AutoModelForCausalLM can build

    Raises AssertionError: one sentence that says what broke, in which mixer or plan.
    """
    check = _Check(family, make_model, scan_to_output)

    with _registered(family):
        try_examples(lambda seed: check.model(seed, save), max_examples, st.integers(0, 2**10))


class _Check:
    """Checks of one family."""

    def __init__(self, family: Family, make_model: Callable[[int], nn.Module], scan_to_output: Scan | None) -> None:
        self.family, self.make, self.scan_to_output = family, make_model, scan_to_output

    def ours(self, family: Family | None) -> bool:
        """Return whether a family is of the checked class."""
        return type(family) is type(self.family)

    def fail(self, what: str, seed: int) -> None:
        """Raise AssertionError with the family, the fault and the seed."""
        raise AssertionError(f"family {self.family.name!r}: {what}; make_model({seed})")

    def model(self, seed: int, save: bool) -> None:
        """Run all checks on one model."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self._model(seed, save)

    def _model(self, seed: int, save: bool) -> None:
        model = self.make(seed)
        mixers = [path for path, module in model.named_modules() if self.family.recognises(module)]
        if not mixers:
            module_names = sorted({type(m).__name__ for m in model.modules()})
            self.fail(f"recognises no module of the model; it has {', '.join(module_names)}", seed)
        for path in mixers:
            self.layout(model.get_submodule(path), path, seed)
        try:
            graph = trace(model)
        except SSPrunerError as error:
            self.fail(f"cannot be traced: {error}", seed)
        for site in graph.sites:
            if site.family is None:
                self.filled(site.layout, model.get_submodule(site.path), site.path, seed)
        self.config(model, graph, seed)
        self.scan(model, mixers, seed)
        self.units(graph, seed)
        axes = [a for a in graph.axes if any(sizes(g) for g in graph.on_axis(a).values())]
        for axis in axes:
            self.cut(seed, random_plan(graph, (axis,), seed), f"a cut on axis {axis}")
        cut = self.cut(seed, random_plan(graph, tuple(axes), seed), "a cut on several axes")
        if not self.family.basis_refused and "state" in axes:
            self.cut(seed, directions(random_plan(graph, ("state",), seed), graph, seed), "a projection of the state")
        if save:
            self.save(cut, seed)

    def layout(self, mixer: nn.Module, path: str, seed: int) -> None:
        """Check that the rows fill their tensors, attributes match the module, and no value is read."""
        layout = self.family.layout(mixer)
        self.filled(layout, mixer, path, seed)
        try:
            empty = self.family.layout(copy.deepcopy(mixer).to("meta"))
        except Exception as error:
            self.fail(f"layout reads values: on the meta device it fails ({type(error).__name__}: {error})", seed)
        if _plain(empty) != _plain(layout):
            self.fail(f"layout of {path} on the meta device is another one", seed)

    def filled(self, layout: Layout, mixer: nn.Module, path: str, seed: int) -> None:
        """Check that the rows of a layout fill the tensors of its module, and that attributes match it."""
        tensors = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
        if not any(slot.tensor in tensors for slot in layout.slots):
            self.fail(f"layout names no tensor of {path}: it has {', '.join(tensors)}", seed)
        for slot in layout.slots:
            if slot.tensor not in tensors:
                continue
            shape = tensors[slot.tensor].shape
            rows = sum(layout.count(slot.outer + r.dims) for r in slot.rows)
            extent = math.prod(shape[d] for d in slot.tensor_dims) if max(slot.tensor_dims) < len(shape) else 0
            if rows != extent:
                runs = " + ".join(f"{r.name} {layout.count(slot.outer + r.dims)}" for r in slot.rows)
                self.fail(f"the runs {runs} do not fill dim {slot.dim} of {path}.{slot.tensor}, {tuple(shape)}", seed)
        for attribute, size in layout.attributes.items():
            value = _attribute(mixer, attribute)
            if value is not None and value != layout.total(size):
                self.fail(f"{path}.{attribute} is {value}, the layout's sizes make it {layout.total(size)}", seed)
        for axis, groups in layout.axes.items():
            if not {axis, *groups} <= set(layout.sizes):
                self.fail(f"axis {axis} of {path} has no size in the layout, or is nested in what has none", seed)

    def config(self, model: Any, graph: SSMGraph, seed: int) -> None:
        """Check that config fields with one value for all layers equal the layout's."""
        if not self.ours(graph.family):
            return
        for field, values in self.family.stock_sizes({site.path: site.layout for site in graph.sites}).items():
            value = getattr(text_config(model.config), field, None)
            if value is not None and len(values) == 1 and value not in values:
                self.fail(f"config.{field} is {value}, config_sizes make it {values.pop()}", seed)

    def scan(self, model: nn.Module, mixers: list[str], seed: int) -> None:
        """Check that y from `project` equals the mixer's own, and that padding adds nothing to the state."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(embedding(model).num_embeddings, (2, 19), generator=generator)
        for path in mixers:
            mixer, seen = model.get_submodule(path), _Seen(model.get_submodule(path))
            with seen:
                forward(model, ids, torch.ones_like(ids, dtype=torch.bool), use_cache=False)
            hidden, output = seen.hidden, seen.output
            mask = torch.ones(ids.shape, dtype=torch.bool)
            p = self.project(mixer, hidden, mask, path, seed)
            y = scans.scan_output(p).flatten(2)
            if self.scan_to_output:
                expected, candidates = "the mixer's output", {"": self.scan_to_output(mixer, y, p.z)}
                compared = [output]
            else:
                expected = "what any part of the mixer is fed"
                candidates = {"y": y, "y * silu(z)": y * F.silu(p.z.float())}
                compared = [t.reshape(y.shape) for t in seen.fed if t.numel() == y.numel()]
            error = min((_relative(t, c) for t in compared for c in candidates.values() if t.shape == c.shape),
                        default=math.inf)  # fmt: skip
            if not error < 1e-3:
                near = f"the nearest differs by {error:.2g} of the largest" if compared else "none has its shape"
                self.fail(
                    f"project is not what {path} computes: y of its x, dt, A, B, C, D, or y * silu(z), is not "
                    f"{expected}: {near}", seed
                )  # fmt: skip
            read = self.family.readout(mixer, y, p.z)
            if read is not None and not any(t.shape == read.shape and _relative(t, read) < 1e-3 for t in seen.fed):
                self.fail(f"readout is not what any linear layer of {path} is fed", seed)
            mask[1, 11:] = False
            padded = self.project(mixer, hidden, mask, path, seed)
            if (padded.x[~mask].abs().amax() * padded.B[~mask].abs().amax() * padded.dt[~mask].abs().amax()) > 0:
                self.fail(f"project does not zero padding in {path}: it would enter the state", seed)

    def project(self, mixer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, path: str, seed: int) -> Any:
        """Call `project` and check the shapes it returns."""
        try:
            p = self.family.project(mixer, hidden, mask)
        except Exception as error:
            self.fail(f"project fails on {path}: {type(error).__name__}: {error}", seed)
        sizes, b, T = self.family.layout(mixer).sizes, *mask.shape
        H, N = math.prod(p.x.shape[2:]), p.B.shape[-1]
        wrong = [n for n in ("x", "z", "dt", "B", "C") if getattr(p, n).shape[:2] != (b, T)]
        if wrong or p.B.shape != p.C.shape or p.z.shape[2:] != (H,) or sizes.get("state", N) != N:
            shapes = ", ".join(f"{n} {tuple(value.shape)}" for n, value in vars(p).items())
            self.fail(
                f"project gives shapes that do not fit {type(p).__name__} or the layout in {path}: {shapes}", seed
            )
        return p

    def units(self, graph: SSMGraph, seed: int) -> None:
        """Check that a permutation of the units of an axis does not change the model's outputs."""
        generator = torch.Generator().manual_seed(seed)
        for axis in graph.axes:
            model = self.make(seed)
            groups = [g for g in graph.on_axis(axis).values() if g.members]
            if not groups:
                continue
            before, tolerance = _logits(model), _tolerance(self.make(seed), [s.path for s in graph.layers])
            for group in groups:
                order = [torch.randperm(group.units, generator=generator) for _ in range(group.groups)]
                permute(model, group, torch.stack(order))
            error = _relative(_logits(model), before)
            if not error <= tolerance:
                self.fail(f"the units on axis {axis} are not interchangeable: after they changed places in every "
                          f"tensor the logits differ by {error:.2g} of the largest", seed)  # fmt: skip

    def cut(self, seed: int, plan: Plan, what: str) -> nn.Module:
        """Check with the engine's proof that masked = sliced, and that exactly the predicted parameters are removed."""
        model = self.make(seed)
        graph = trace(model)
        try:
            slice_with_proof(model, plan, graph, seed)
            after = trace(model)
        except SSPrunerError as error:
            sizes = ", ".join(f"{n} to {s.after} of {s.before}" for n, s in plan.groups.items())
            self.fail(f"{what} fails: {error} ({sizes})", seed)
        for site in after.layers:
            if self.ours(site.family):
                self.layout(model.get_submodule(site.path), site.path, seed)
        return model

    def save(self, model: Any, seed: int) -> None:
        """Check that a cut model is the same after saving and loading."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                sspruner.save(model, Path(folder) / "model")
                loaded, _ = sspruner.load(Path(folder) / "model")
            except Exception as error:
                self.fail(f"a cut model cannot be saved and loaded: {type(error).__name__}: {error}", seed)
            same = copy.deepcopy(loaded)  # weights mapped from a file lie unaligned: BLAS may round differently
            apart = _relative(_logits(same), _logits(model))
            if not apart <= 1e-5:
                self.fail(f"a cut model differs once saved and loaded: logits by {apart:.2g} of the largest", seed)


class _Seen:
    """Context manager that captures the mixer's input and output, and every tensor that a part of it receives."""

    def __init__(self, mixer: nn.Module) -> None:
        self.mixer, self.fed = mixer, list[torch.Tensor]()

    def __enter__(self) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [v.detach().float() for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            if module is self.mixer:
                self.hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            else:
                self.fed += [t.flatten(2) if t.ndim > 3 else t for t in tensors]

        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.output = (out[0] if isinstance(out, tuple) else out).detach().float()

        self.handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in self.mixer.modules()]
        self.handles.append(self.mixer.register_forward_hook(leave))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _registered(family: Family) -> Iterator[None]:
    """Context manager that registers a family that no plugin offers."""
    if type(installed_families().get(family.name)) is type(family):  # a hook makes new objects whenever it is called
        yield
        return
    hook = sspruner.hookimpl(lambda: [family])
    plugin = SimpleNamespace(sspruner_families=hook)
    plugin_manager().register(plugin, name=f"check_family {family.name}")
    try:
        yield
    finally:
        plugin_manager().unregister(plugin)


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def _plain(layout: Layout) -> object:
    values = dict(layout.sizes), dict(layout.axes), dict(layout.attributes), dict(layout.gains)
    return values, layout.slots, layout.state, layout.folds


def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(embedding(model).num_embeddings, (2, 19), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = forward(model, ids, torch.ones_like(ids, dtype=torch.bool), use_cache=False).logits.float()
    return logits


def _tolerance(model: nn.Module, mixers: list[str]) -> float:
    """Return the larger of 1e-4 and 32 times the effect of weight roundings on the logits."""
    before, generator = _logits(model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 2.0**-22 * torch.randn(parameter.shape, generator=generator))
    return max(1e-4, 32 * _relative(_logits(model), before))


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
