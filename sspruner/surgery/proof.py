"""The proof of a cut: masked and sliced models give equal logits, and exactly the predicted bytes are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError, ProofError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan
from sspruner.surgery.mask import masked
from sspruner.surgery.slice import slice_model

#: Largest |sliced - masked| logit allowed, relative to the largest |masked| logit, in fp32. Right cuts reach 1e-6; a
#: model that is itself more sensitive than this to one rounding of its embeddings is allowed SLACK times what that
#: rounding does (over 2,500 random tiny models, right cuts stayed below 2 times; wrong ones are 1e-2 and more).
TOLERANCE = 1e-5
ROUNDING = 2.0**-22
SLACK = 8
PROBE_SHAPE = (2, 80)  # sequences x tokens: longer than one chunk and not a multiple of it


@dataclass(frozen=True)
class Proof:
    """What was compared. error is relative to the largest masked logit; bytes of state are per sequence."""

    error: float
    tolerance: float
    parameters_removed: int
    state_bytes_removed: int


@torch.no_grad()
def slice_with_proof(model: nn.Module, plan: Plan, graph: SSMGraph, seed: int = 0) -> Proof:
    """Slice `model` and prove it on a probe of random tokens, in fp32 whatever the model's dtype.

    Raises ProofError if masked and sliced logits differ by more than rounding explains, or if parameters or the state
    bytes measured in the model's own cache did not shrink by what the graph predicts. The model is then unusable.
    """
    removed = [(graph.groups[n], len(s.keep) * (s.before - s.after)) for n, s in plan.groups.items()]
    parameters = sum(units * group.parameters_per_unit for group, units in removed)
    state = sum(units * group.state_bytes_per_unit for group, units in removed)

    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randint(vocabulary, PROBE_SHAPE, generator=generator).to(next(model.parameters()).device)
    before = _parameters(model), measured_state_bytes(model, probe)
    with _in_fp32(model):
        with masked(model, plan, graph):
            reference = _logits(model, probe)
            rounding = _relative(_rounded_logits(model, probe, generator), reference)
        slice_model(model, plan, graph)
        result = _logits(model, probe)
    after = _parameters(model), measured_state_bytes(model, probe)

    error, tolerance = _relative(result, reference), max(TOLERANCE, SLACK * rounding)
    if not error <= tolerance:  # also catches NaN
        raise ProofError(f"proof failed: sliced and masked logits differ by {error:.1e}, more than {tolerance:.0e}")
    for what, i, expected in (("parameters", 0, parameters), ("state bytes per sequence", 1, state)):
        if before[i] - after[i] != expected:
            raise ProofError(f"proof failed: {before[i] - after[i]:,} {what} are gone, the plan predicts {expected:,}")
    return Proof(error, tolerance, parameters, state)


def measured_state_bytes(model: nn.Module, probe: torch.Tensor) -> int:
    """Bytes of recurrent state per sequence in the cache that the model itself allocates. probe: int64 (b, T)."""
    out = _forward(model, probe, use_cache=True)
    cache = next((out[key] for key in ("cache_params", "past_key_values") if out.get(key) is not None), None)
    if cache is None:
        raise ModelError(f"{type(model).__name__}: forward returns no cache, so its state cannot be measured")
    total = 0
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None) or []
        for state in states.values() if isinstance(states, dict) else states:
            total += state.numel() * state.element_size() if state is not None else 0
    return total // len(probe)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _logits(model: nn.Module, probe: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    logits: torch.Tensor = _forward(model, probe, use_cache=False, **inputs).logits.float()
    return logits


def _rounded_logits(model: nn.Module, probe: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The logits after a random relative change of the embeddings, by about one rounding of fp32."""
    embeddings = model.get_input_embeddings()(probe)  # type: ignore[operator]
    noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
    return _logits(model, inputs_embeds=embeddings * (1 + ROUNDING * noise))


def _relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result - reference).abs().max() / reference.abs().max())


def _forward(model: nn.Module, probe: torch.Tensor | None, use_cache: bool, **inputs: Any) -> Any:
    training = model.training
    model.eval()
    try:
        return model(input_ids=probe, use_cache=use_cache, **inputs)
    finally:
        model.train(training)


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Narrow parameters as fp32 inside the block, and back: exact both ways, so that the comparison is sharp."""
    narrow = {name: p.dtype for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for name in narrow:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, dtype in narrow.items():
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
