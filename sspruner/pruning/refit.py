"""Refit: after a cut, solve for new values of the remaining weights in closed form, block by block.

A block's linear layers that add to the residual stream (out_proj, down_proj, o_proj) get new values, so that the output
of the cut block approaches that of the dense one on calibration text. Nothing is trained.

    output   out_proj <- out_proj + argmin over change of sum_t |e_t - change u_t|^2 + lambda |change|^2
    bias     bias     <- bias + mean of e_t

u_t is the input of the cut layer, e_t the dense layer's output minus the cut layer's. Dense and cut block run on the
same input, the output of the cut and refitted blocks before them. Where whole modules or parts of the residual stream
are removed (axes hidden, block, mixer), there is no such dense block: then the dense model runs beside the cut one, and
the last of a block's layers also corrects the error of the residual stream that enters the block.

lambda is chosen on a quarter of the sequences, which are held out at first. A block keeps its new values only if they
bring its output, in the model's own code and dtype, nearer to the dense one's, and on text that the model itself has
written not further from it. So no block's error rises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sspruner.axes import WHOLE_MODEL
from sspruner.calibrate.regression import Moments, ridge
from sspruner.calibrate.replay import Flow, Replay
from sspruner.calibrate.sample import own_text
from sspruner.calibrate.seen import with_seen
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.compute.device import check_whole, resolve_device
from sspruner.compute.quick import quick_on_cpu
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError, ModelError
from sspruner.files.journal import Journal
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.site import Site, within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, check_plan, part_of
from sspruner.pruning.reconstruct import Place, check_windows, own_windows, reconstruct
from sspruner.pruning.reconstruct_notes import Layer
from sspruner.recipes.parts import REFITS, Reconstruction
from sspruner.surgery.mask import masked
from sspruner.surgery.predict import dropped_modules
from sspruner.surgery.tensors import lacks, tensor

LEFT_OUT = 4  # every fourth sequence is held out to choose the ridge
OWN_LENGTH = 128  # tokens in a window of the model's own text, which are sampled one by one
TINY = 1e-30  # energy of a block that adds nothing


@dataclass(frozen=True)
class Refit:
    """A plan with new values of the remaining weights, and the errors before and after.

    errors   refitted block -> (before, after), the squared error of what it adds to the residual stream divided by the
             energy of the same in the dense block, on calibration tokens; of a reconstruction: cut module -> such
             errors of its output, on held-out text
    layers   of a reconstruction: cut module -> how its training went
    """

    plan: Plan
    kind: str
    errors: dict[str, tuple[float, float]]
    layers: dict[str, Layer] = field(default_factory=dict)


@dataclass
class _Writer:
    """A linear layer that adds to the residual stream. calls: every path at which its module is called."""

    weight: str
    calls: tuple[str, ...]
    fitted: Moments | None = None
    other: Moments | None = None  # of the held-out sequences, which choose the ridge

    @property
    def bias(self) -> str:
        return f"{self.weight.removesuffix('weight')}bias"


@dataclass(frozen=True)
class _Streams:
    """The dense and the cut model on the same text. fitted: batches to solve on; those after them only guard."""

    dense: Replay
    cut: Replay
    fitted: int


@undisturbed
@torch.no_grad()
def refit(
    model: nn.Module,
    plan: Plan,
    kind: str = "output",
    *,
    calibration: Calibration,
    settings: Reconstruction | None = None,
    device: str | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Refit:
    """Return `plan` with new values of the remaining weights, from `calibration.tokens`. The model is not changed.

    kind: "output" solves for the weights of the layers that write to the residual stream, and adds no parameter;
    "bias" solves for their biases, and adds them where there are none; "reconstruct" trains what stays of each cut
    module to put out what the dense one does. settings: how long it trains, and on how much of the text. journal: notes
    each block that is reconstructed, and goes on after those that it holds.
    Raises InputError for an unknown kind, for fewer tokens than unknowns, and if there is nothing to solve for;
    PlanError if the plan does not fit the model.
    """
    if kind not in REFITS[1:]:
        raise InputError(f"refit {kind!r}: must be {' or '.join(REFITS[1:])}")
    graph = trace(model)
    check_plan(plan, graph, fingerprint(model), model)
    settings, compute = settings or Reconstruction(), resolve_device(device)
    if kind == "reconstruct":
        check_windows(model, plan.groups, graph, calibration, settings)
        own = _own_text(model, calibration, settings, compute)
        place = Place(compute, journal, progress)
        new, layers = reconstruct(model, plan, graph, calibration, own, settings, place)
        return _result(new, kind, {path: layer.error for path, layer in layers.items()}, layers, calibration)
    check_whole(model, f"refit {kind}")
    follow = any(axis in WHOLE_MODEL for axis in plan.axes)
    writers = _writers(model, plan, graph, kind, follow)
    _check_tokens(model, [writer.weight for writer in writers], kind, calibration)
    batches, refitted, errors = list(calibration.batches()), plan, {}
    own = _own_text(model, calibration, settings, compute)
    guard = [] if own is None else [(own, torch.ones_like(own, dtype=torch.bool))]
    with quick_on_cpu(model, compute):
        dense = Replay(model, graph, batches + guard, compute)
        with masked(model, plan, graph):  # embeddings are cut on the axis hidden
            cut = Replay(model, graph, batches + guard, compute)
        streams = _Streams(dense, cut, len(batches))
        for number, block in enumerate(cut.blocks):
            if progress:
                progress(f"refitting {block}", number, len(cut.blocks))
            if not follow:
                dense.hidden = cut.hidden
            here = [writer for writer in writers if any(within(call, block) for call in writer.calls)]
            refitted, error = _refit_block(model, refitted, graph, kind, here, block, streams)
            if here:
                errors[block] = error
        if progress:
            progress("refitting", len(cut.blocks), len(cut.blocks))
    return _result(refitted, kind, errors, {}, calibration)


def _result(
    plan: Plan, kind: str, errors: dict[str, tuple[float, float]], layers: dict[str, Layer], text: Calibration
) -> Refit:
    """Return the result, with a plan that says how, and on which text, it was refitted."""
    made_by = with_seen(plan.made_by | {"refit": kind}, text.seen)
    return Refit(replace(plan, made_by=made_by), kind, errors, layers)


def _own_text(
    model: nn.Module, calibration: Calibration, settings: Reconstruction, device: torch.device
) -> torch.Tensor | None:
    """Return text of the model's own, to hold out beside the calibration text; None if that is its own, too."""
    if calibration.source == "self":
        return None
    count, seq_len = own_windows(calibration, settings), min(calibration.tokens.shape[1], OWN_LENGTH)
    return own_text(model, count, seq_len, calibration.seed, device)


def _refit_block(
    model: nn.Module,
    plan: Plan,
    graph: SSMGraph,
    kind: str,
    writers: Sequence[_Writer],
    block: str,
    streams: _Streams,
) -> tuple[Plan, tuple[float, float]]:
    """Return the plan with this block's new values, and its error before and after on the calibration text.

    Moves both replays past the block.
    """
    dense, cut, fitted = streams.dense, streams.cut, streams.fitted
    weights = {tensor(model, writer.weight): writer.weight for writer in writers}
    outputs: list[dict[str, torch.Tensor]] = []  # output of each writer in the dense block: (b, T, O)
    target: list[Flow] = []
    with dense.on_device(block):
        for batch in range(len(dense.masks)):
            inputs, flow = dense.given(block, batch, weights)
            outputs.append({name: _linear(model, name, u).cpu() for name, u in inputs.items()})
            target.append(tuple(h.cpu() for h in flow))
    lacking = [_stream(d) - _stream(c) for d, c in zip(dense.hidden, cut.hidden, strict=True)]
    energy = _distance(dense.hidden[:fitted], target[:fitted], cut.masks[:fitted])
    dense.hidden = target
    before = _run(model, plan, graph, cut, block)
    refitted = plan
    order = list(outputs[0])  # the order in which the block calls them
    if missing := [writer.weight for writer in writers if writer.weight not in order]:
        raise ModelError(f"{missing[0]}: what it is given was not seen (a fused kernel?); leave refit out")
    for writer in sorted(writers, key=lambda w: order.index(w.weight)):
        with masked(model, part_of(refitted, graph, block), graph), cut.on_device(block):
            _observe(model, writer, block, cut, outputs[:fitted], lacking if writer.weight == order[-1] else None)
            if within(writer.calls[-1], block):  # the last call of a shared module: its sums are complete
                refitted = replace(refitted, updates={**refitted.updates, **_solve(model, writer, kind)})
    after = before if refitted is plan else _run(model, refitted, graph, cut, block)
    parts = (slice(fitted), slice(fitted, None))  # calibration text, and the model's own
    errors, others = ([_distance(f[part], target[part], cut.masks[part]) for f in (before, after)] for part in parts)
    if errors[1] > errors[0] or others[1] > others[0]:
        refitted, after, errors[1] = plan, before, errors[0]
    cut.hidden = after
    return refitted, (errors[0] / max(energy, TINY), errors[1] / max(energy, TINY))


def _observe(
    model: nn.Module,
    writer: _Writer,
    block: str,
    cut: Replay,
    outputs: list[dict[str, torch.Tensor]],
    lacking: list[torch.Tensor] | None,
) -> None:
    """Add a writer's moments of one call. lacking: error of the residual stream before the block, to be corrected."""
    first = 0  # index of the batch's first sequence: the same sequences are held out whatever the batch size
    for batch, mask in enumerate(cut.masks[: len(outputs)]):
        inputs, _ = cut.given(block, batch, {tensor(model, writer.weight): writer.weight})
        u = inputs[writer.weight]  # (b, T, D)
        lack = outputs[batch][writer.weight].to(u.device) - _linear(model, writer.weight, u)  # (b, T, O)
        # Not where the stream is several copies, nor for a shared expert, whose output a gate scales.
        if lacking is not None and lacking[batch].shape == lack.shape:
            lack = lack + lacking[batch].to(lack)
        left_out = torch.arange(first, first + len(mask)) % LEFT_OUT == LEFT_OUT - 1  # (b,)
        for part, which in (("fitted", ~left_out), ("other", left_out)):
            rows = (mask & which[:, None]).reshape(u.shape[:-1]).to(u.device)  # (b, T), or (b T) in a shared expert
            sums, more = getattr(writer, part), Moments.of(u[rows], lack[rows])
            setattr(writer, part, more if sums is None else sums + more)
        first += len(mask)


def _solve(model: nn.Module, writer: _Writer, kind: str) -> dict[str, torch.Tensor]:
    """Return new values by name from a writer's moments.

    The model is masked, so that removed units are zero in them.
    """
    fitted, other = writer.fitted, writer.other
    assert fitted is not None
    assert other is not None
    weight = tensor(model, writer.weight)
    if kind == "output":
        return {writer.weight: _as(weight, weight.double() + ridge(fitted, other).mT)}
    moments = fitted + other
    bias = torch.zeros_like(weight[:, 0]) if lacks(model, writer.bias) else tensor(model, writer.bias)
    return {writer.bias: _as(weight, bias.double() + moments.lack_sum / moments.tokens)}


def _writers(model: nn.Module, plan: Plan, graph: SSMGraph, kind: str, follow: bool) -> list[_Writer]:
    """Return the layers to solve for: of modules that the plan cuts, or of all that stay, in the order of the blocks.

    Raises InputError if there are none.
    """
    zeroed = {graph.elements[name].tensor for name in plan.elements} if kind == "output" else set()
    dropped = dropped_modules(plan, graph)
    cut = {name.rpartition(":")[0] for name in plan.groups}
    cut |= {
        site.path for site in graph.sites for name in plan.elements if within(graph.elements[name].tensor, site.path)
    }
    writers = [
        _Writer(name, (site.path, *site.aliases))
        for site in graph.sites
        if (follow or site.path in cut)
        and site.kind != "experts"
        and not any(within(site.path, path) for path in dropped)
        for name in _written(model, site)
        if name not in zeroed
    ]
    if not writers:
        raise InputError(
            f"refit {kind}: nothing to solve for on axis {', '.join(plan.axes)}: leave --refit out"
            + (", or try --refit bias" if zeroed else "")
        )
    return writers


def _written(model: nn.Module, site: Site) -> Iterator[str]:
    """Yield the weights of a module's linear layers that add to the residual stream."""
    for slot in site.layout.slots:
        path = f"{site.path}.{slot.tensor}"
        out = slot.tensor.endswith(".weight") and slot.dim == 0 and any(rows.name == "out" for rows in slot.rows)
        if out and isinstance(model.get_submodule(path.removesuffix(".weight")), nn.Linear):
            yield path


def check_calibration(
    model: nn.Module,
    graph: SSMGraph,
    groups: Iterable[str],
    kind: str,
    calibration: Calibration,
    settings: Reconstruction,
) -> None:
    """Raise InputError if the calibration text is too short to refit any module of these groups.

    Runs before any work.
    """
    if kind == "reconstruct":
        check_windows(model, groups, graph, calibration, settings)
        return
    paths = {name.rpartition(":")[0] for name in groups}
    weights = [name for site in graph.sites if site.path in paths for name in _written(model, site)]
    narrowest = min(weights, key=lambda name: tensor(model, name).shape[1], default=None)
    _check_tokens(model, [narrowest] if narrowest else [], kind, calibration)


def _check_tokens(model: nn.Module, weights: list[str], kind: str, calibration: Calibration) -> None:
    """Raise InputError if the calibration text has too few tokens or sequences to solve for these weights."""
    tokens = int(calibration.mask.sum())
    widths = {name: tensor(model, name).shape[1] for name in weights} if kind == "output" else {}
    widest = max(widths, key=lambda name: widths[name], default="it")
    unknowns = widths.get(widest, 1)
    if kind == "output" and len(calibration.tokens) < LEFT_OUT:
        raise InputError(
            f"refit output: {len(calibration.tokens)} calibration sequences; it wants {LEFT_OUT} or more, a quarter of "
            "which chooses the ridge: give more samples, or refit bias"
        )
    if tokens < unknowns:
        raise InputError(
            f"refit {kind}: {tokens:,} calibration tokens for {unknowns:,} unknowns in each row of "
            f"{widest}: give more samples{', or refit bias' if kind == 'output' else ''}"
        )


def _run(model: nn.Module, plan: Plan, graph: SSMGraph, replay: Replay, block: str) -> list[Flow]:
    """Return the output of a block under the mask of a plan, batch by batch, on the CPU."""
    with masked(model, part_of(plan, graph, block), graph), replay.on_device(block):
        return [tuple(h.cpu() for h in replay.run(block, i, flow)) for i, flow in enumerate(replay.hidden)]


def _linear(model: nn.Module, weight: str, u: torch.Tensor) -> torch.Tensor:
    """Return the output of a linear layer with its present weights, in fp32: (b, T, O)."""
    layer = model.get_submodule(weight.removesuffix(".weight"))
    bias = layer.bias.float() if isinstance(layer.bias, torch.Tensor) else None
    return nn.functional.linear(u.float(), tensor(model, weight).float(), bias)


def _as(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a new value on the CPU, in the dtype of the parameter that it replaces."""
    return value.to("cpu", like.dtype)


def _stream(flow: Flow) -> torch.Tensor:
    """Return the residual stream in fp32 (b, T, D). mamba_ssm carries it in two parts, the second None at first."""
    parts = [h.float() for h in flow if h is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _squared(difference: torch.Tensor, mask: torch.Tensor) -> float:
    return float(difference[mask].double().square().sum())


def _distance(flows: list[Flow], target: list[Flow], masks: list[torch.Tensor]) -> float:
    return sum(_squared(_stream(f) - _stream(t), m) for f, t, m in zip(flows, target, masks, strict=True))
