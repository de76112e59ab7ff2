"""Run one model: a prompt into a cache, and decode steps from it, on the code path of generate()."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from sspruner.benchmarking import resident
from sspruner.benchmarking.ceiling import synchronise
from sspruner.compute.forward import accepted, cache_in, call
from sspruner.compute.kernels import KERNELS
from sspruner.errors import InputError


@dataclass(frozen=True)
class Times:
    """Seconds of the prefill, mean seconds of one decode step, and peak bytes of both, if measured."""

    prefill: float
    step: float
    prefill_peak: int | None
    step_peak: int | None


@torch.no_grad()
def run_once(model: Any, ids: torch.Tensor, generate: int, *, cuda_graph: bool = False, memory: bool = False) -> Times:
    """Run a prefill of `ids`, (b, prompt), then `generate` greedy decode steps.

    cuda_graph: capture one step and replay it, with the same token each time; models without attention only.
    memory: also measure peak bytes on the CPU, which makes the times meaningless; on a GPU they cost nothing.
    """
    device = ids.device
    watch = _Peak(model, device, memory)
    start = _now(device)
    out = _call(model, ids, 0, {})
    cache, token = cache_in(out), out.logits[:, -1:].argmax(-1)
    del out
    prefill, prefill_peak = _now(device) - start, watch.bytes()
    watch = _Peak(model, device, memory, cache_bytes(cache))
    if cuda_graph:
        step = _replayed(model, token, ids.shape[1], cache, generate)
        return Times(prefill, step, prefill_peak, watch.bytes())
    start = _now(device)
    for t in range(generate):
        out = _call(model, token, ids.shape[1] + t, cache)
        cache, token = cache_in(out), out.logits[:, -1:].argmax(-1)
    step = (_now(device) - start) / generate
    return Times(prefill, step, prefill_peak, watch.bytes())


@torch.no_grad()
def prefilled(model: Any, ids: torch.Tensor) -> Any:
    """Return a function that runs one decode step after `ids` at each call."""
    out = _call(model, ids, 0, {})
    cache, token = cache_in(out), out.logits[:, -1:].argmax(-1)
    position = ids.shape[1]

    @torch.no_grad()
    def step() -> None:
        nonlocal position
        _call(model, token, position, cache)
        position += 1

    return step


def path_of(model: Any, device: torch.device, accelerated: bool, cuda_graph: bool) -> str:
    """Describe which code runs: the kernels that transformers uses (whatever can be imported), and what replaces it."""
    kernels = [name for name in KERNELS if _importable(name)] if device.type == "cuda" else []
    path = f"{' and '.join(kernels)} kernels" if kernels else "transformers, torch operations"
    if any(hasattr(module, "state_encode") for module in model.modules()):
        path += ", projected state"
    if accelerated and device.type == "cpu":
        path += ", sspruner.accelerate"
    return path + (", CUDA graph" if cuda_graph else "")


def cache_bytes(cache: dict[str, Any]) -> int:
    """Return the bytes of the states, keys and values in a cache."""
    total = 0
    for held in cache.values():
        for layer in held.layers:
            for name in ("conv_states", "recurrent_states"):
                states = getattr(layer, name, None) or {}
                parts = states.values() if isinstance(states, dict) else states
                total += sum(part.numel() * part.element_size() for part in parts if part is not None)
            for name in ("keys", "values"):
                part = getattr(layer, name, None)
                total += part.numel() * part.element_size() if isinstance(part, torch.Tensor) else 0
    return total


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except Exception:  # like transformers, ignore a package that cannot be imported for any reason
        return False
    return True


def _call(model: Any, ids: torch.Tensor, position: int, cache: dict[str, Any]) -> Any:
    positions = torch.arange(position, position + ids.shape[1], device=ids.device).expand(len(ids), -1)
    options = {"use_cache": True, "position_ids": positions, "logits_to_keep": 1, **cache}
    taken = accepted(model)
    return call(model, ids, {name: value for name, value in options.items() if name in taken})


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def _replayed(model: Any, token: torch.Tensor, position: int, cache: dict[str, Any], generate: int) -> float:
    """Return the seconds of one replay of a captured step."""
    device = token.device
    if device.type != "cuda":
        raise InputError(f"cuda_graph: there is none on {device}")
    if any(isinstance(getattr(layer, "keys", None), torch.Tensor) for c in cache.values() for layer in c.layers):
        raise InputError(f"cuda_graph: {type(model).__name__} has attention, whose cache grows; measure it without")
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            _call(model, token, position, cache)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _call(model, token, position, cache)
    graph.replay()
    start = _now(device)
    for _ in range(generate):
        graph.replay()
    return (_now(device) - start) / generate


class _Peak:
    """Peak bytes since its creation: this model's weights, its cache and its allocations, without other models.

    On the CPU it is the growth of the process's resident memory, and measured only if `memory` is set.
    """

    def __init__(self, model: Any, device: torch.device, memory: bool, held: int = 0) -> None:
        self.device = device
        self.others: int | None = None  # bytes that are not this model's
        if device.type == "cpu" and memory:
            before = resident.start()
            self.others = None if before is None else before - held - _weight_bytes(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.others = torch.cuda.memory_allocated(device) - held - _weight_bytes(model)

    def bytes(self) -> int | None:
        """Return the peak bytes so far, None if they are not measured."""
        if self.others is None:
            return None
        highest = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident.peak()
        return highest - self.others


def _weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
