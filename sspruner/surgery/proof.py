"""Proof of a cut: the sliced and the masked model give equal logits, and exactly the predicted bytes were removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sspruner.compute.forward import cache_in, embedding, forward, output_of, predicts_tokens
from sspruner.compute.inputs import example_values, reads_tokens
from sspruner.compute.precision import in_fp32
from sspruner.errors import ModelError, ProofError
from sspruner.files.fields import integer, number, table
from sspruner.graph.layout import STATE_ITEMSIZE
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.surgery.mask import masked
from sspruner.surgery.predict import added_parameters, removed_parameters, removed_state_bytes, zeros_left
from sspruner.surgery.project import project_states
from sspruner.surgery.record import fields, record
from sspruner.surgery.restore import restored_on_error
from sspruner.surgery.slice import slice_model
from sspruner.surgery.tensors import new_biases, tensor, write_for_good

#: Largest |sliced - masked| logit allowed, relative to the largest |masked| logit, in fp32. Correct cuts reach 1e-6. A
#: model that is more sensitive to roundings of its embeddings and mixers is allowed SLACK times their effect: in random
#: models of a few channels, correct cuts were up to 12 times above the effect, wrong ones at 1e-2 and more.
TOLERANCE = 1e-5
ROUNDING = 2.0**-22
SLACK = 32
PROBE_SHAPE = (2, 80)  # sequences x tokens: longer than one chunk and not a multiple of it


@dataclass(frozen=True)
class Proof:
    """Measurements of a proof. error is relative to the largest masked logit; bytes of state are per sequence.

    parameters_removed  number of parameters removed, including those removed from added ones
    parameters_added    parameters of new biases and of the bases of projected states
    zeros               elements zeroed by the plan's masks and not removed by a cut, each verified to be zero
    """

    error: float
    tolerance: float
    parameters_removed: int
    state_bytes_removed: int
    parameters_added: int = 0
    zeros: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Proof:
        """Parse a JSON object from `to_json`. Raises KeyError, TypeError or ValueError if it is malformed."""
        checked: dict[str, Any] = {
            name: number(value) if name in ("error", "tolerance") else integer(value)
            for name, value in table(data).items()
        }
        return cls(**checked)


@torch.no_grad()
def slice_with_proof(model: nn.Module, plan: Plan, graph: SSMGraph, seed: int = 0) -> Proof:
    """Slice `model`, record the cut in its config, and prove it on random tokens, in fp32 whatever its dtype.

    Raises ProofError if masked and sliced logits differ by more than rounding explains, if parameters or the state
    bytes measured in the model's own cache did not shrink by the predicted amount, or if new values or zeros are not in
    place. After any error the model is what it was, to the bit.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = random_inputs(model, generator).to(next(model.parameters()).device)
    before = _parameters(model), measured_state_bytes(model, probe)
    with masked(model, plan, graph), in_fp32(model):
        reference, limit = _reference(model, probe, graph, generator)
    with restored_on_error(model, plan, graph):
        result, expected = _sliced(model, plan, graph, probe)
        after = _parameters(model), measured_state_bytes(model, probe)
        error = relative(result, reference)
        if not error <= limit:  # also catches NaN
            raise ProofError(f"proof failed: sliced and masked logits differ by {error:.1e}, more than {limit:.0e}")
        for quantity, i, more, gone in (
            ("parameters", 0, expected.added, expected.parameters),
            ("state bytes per sequence", 1, 0, expected.state_bytes),
        ):
            removed = before[i] + more - after[i]
            if removed != gone:
                raise ProofError(f"proof failed: {removed:,} {quantity} are gone, the plan predicts {gone:,}")
        for name, zero in expected.zeros.items():
            count = int((tensor(model, name)[zero.to(probe.device)] == 0).sum())
            if count != int(zero.sum()):
                raise ProofError(
                    f"proof failed: {name} has {count:,} zeros where the plan predicts {int(zero.sum()):,}"
                )
    zeros = sum(int(zero.sum()) for zero in expected.zeros.values())
    return Proof(error, limit, expected.parameters, expected.state_bytes, expected.added, zeros)


class _Expected(NamedTuple):
    """What a plan predicts: numbers removed, numbers added, and where zeros stay."""

    parameters: int
    state_bytes: int
    added: int
    zeros: dict[str, torch.Tensor]


def _sliced(model: nn.Module, plan: Plan, graph: SSMGraph, probe: torch.Tensor) -> tuple[torch.Tensor, _Expected]:
    """Slice the model and record the cut. Returns the cut model's logits in fp32, and what the plan predicts."""
    added, biases = added_parameters(model, plan, graph), new_biases(model, plan.updates)
    config = getattr(model, "config", None)
    fields_before = fields(config)
    graph = write_for_good(model, plan, graph)
    _check_written(model, plan, graph)
    state = removed_state_bytes(plan, graph)
    rest, projected = project_states(model, plan, graph)  # the rest of the plan cuts rows, those of the bases, too
    parameters, zeros = removed_parameters(model, rest, projected), zeros_left(model, rest, projected)
    with in_fp32(model):
        try:
            slice_model(model, rest, projected)
            result = _logits(model, probe)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as fault:
            raise ProofError(f"proof failed: the cut model does not run ({type(fault).__name__}: {fault})") from fault
    record(config, fields_before, plan, graph, biases)
    return result, _Expected(parameters, state, added, zeros)


@torch.no_grad()
def check_same(model: nn.Module, other: nn.Module, graph: SSMGraph, seed: int = 0) -> float:
    """Return the largest difference of two models' logits on random tokens, in fp32, relative to the largest logit.

    graph: that of `model`. Raises ProofError if the difference is more than rounding explains.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = random_inputs(model, generator)
    with in_fp32(model), in_fp32(other):
        reference, limit = _reference(model, probe, graph, generator)
        error = relative(_logits(other, probe), reference)
    if not error <= limit:
        raise ProofError(f"proof failed: the logits of two models differ by {error:.1e}, more than {limit:.0e}")
    return error


def random_inputs(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Return random tokens, int64 PROBE_SHAPE; or as many sequences of normal values, in the shape of the example."""
    if reads_tokens(model):
        return torch.randint(embedding(model).num_embeddings, PROBE_SHAPE, generator=generator)
    return torch.randn(PROBE_SHAPE[0], *example_values(model).shape[1:], generator=generator)


def _reference(
    model: nn.Module, probe: torch.Tensor, graph: SSMGraph, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Return a model's logits, and how far an equal model's logits may be from them, relative to the largest."""
    reference = _logits(model, probe)
    # Measure the effect of rounding errors in the embeddings and in the outputs of the mixers.
    first = [embedding(model)] if reads_tokens(model) else []
    with roundings([*first, *(model.get_submodule(site.path) for site in graph.layers)], generator):
        rounded = _logits(model, probe)
    return reference, tolerance(rounded, reference)


def tolerance(rounded: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the allowed difference from an equal model's logits, relative to the largest.

    rounded: the logits with random roundings, whose effect scales the allowance.
    """
    return max(TOLERANCE, SLACK * relative(rounded, reference))


def _check_written(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Raise ProofError unless every new value is in its place, except for elements that the plan zeroes."""
    masks = {id(tensor(model, graph.elements[key].tensor)): keep for key, keep in plan.elements.items()}
    for name, value in plan.updates.items():
        parameter = tensor(model, name)
        expected = value.to(parameter.device, parameter.dtype)
        if id(parameter) in masks:
            expected = expected * masks[id(parameter)].to(parameter.device)
        if not torch.equal(parameter, expected):
            raise ProofError(f"proof failed: {name} does not hold the new value of the plan")


def measured_state_bytes(model: Any, probe: torch.Tensor) -> int:
    """Return the bytes of recurrent state per sequence in the cache that the model allocates. probe: (b, T, ...).

    The fp64 states of Mamba1 in fp64 count as fp32, like all bytes of state here.
    """
    if hasattr(model, "allocate_inference_cache"):  # mamba_ssm: layer -> (conv state, state); attention: one tensor
        layers = model.allocate_inference_cache(len(probe), probe.shape[1]).values()
        return sum(int(c[1].numel()) * STATE_ITEMSIZE for c in layers if isinstance(c, tuple)) // len(probe)
    cache = _cache(model, probe[:1])
    if cache is None:
        raise ModelError(f"{type(model).__name__}: forward returns no cache, so its state cannot be measured")
    total = 0
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None) or []
        for state in states.values() if isinstance(states, dict) else states:
            total += state.numel() * min(state.element_size(), STATE_ITEMSIZE) if state is not None else 0
    return total


def _cache(model: Any, probe: torch.Tensor) -> Any:
    """Return the cache that a model fills, or that a model inside it does; None if there is none. probe: (1, T, ...).

    A model of token ids inside one that reads values is run on a token instead.
    """
    token = torch.zeros(1, probe.shape[1], dtype=torch.long, device=probe.device)
    for each in (m for m in model.modules() if m is model or hasattr(m, "get_input_embeddings")):
        out = forward(each, token if reads_tokens(each) else probe, use_cache=True)
        if found := cache_in(out):
            return next(iter(found.values()))
    return None


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _logits(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    """Return what the model puts out, in fp32. Classifiers get one sequence at a time, since they look for padding."""
    parts = [probe] if predicts_tokens(model) else [*probe[:, None]]
    return torch.cat([output_of(forward(model, part, use_cache=False)).float() for part in parts])


@contextmanager
def roundings(modules: Iterable[nn.Module], generator: torch.Generator) -> Iterator[None]:
    """Context manager that perturbs the outputs of modules by random relative errors of about one fp32 rounding."""

    def rounded(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        first = first * (1 + ROUNDING * torch.randn(first.shape, generator=generator).to(first))
        return (first, *out[1:]) if isinstance(out, tuple) else first

    handles = [module.register_forward_hook(rounded) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit."""
    return float((result - reference).abs().max() / reference.abs().max())
