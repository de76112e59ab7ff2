"""Roofline limit of a machine: its measured rates, and the minimal work of a decode step or a prefill."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from sspruner.benchmarking.footprint import Footprint, beside_the_text
from sspruner.compute.forward import embedding

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than the size of any cache
MATMUL = {"cpu": 512, "cuda": 8192}
UPDATE = 5  # operations per element of state and token: decay, outer product, its sum, the read-out and its sum


@dataclass(frozen=True)
class Rates:
    """Measured rates: bytes per second, and operations per second of a matrix product in the model's dtype."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Work:
    """Minimal work: bytes that must be moved, and operations that must be computed."""

    bytes: int
    operations: int

    def seconds(self, rates: Rates) -> float:
        """Return the shortest time in which both can be done concurrently."""
        return max(self.bytes / rates.bandwidth, self.operations / rates.flops)


def step_work(found: Footprint, operations: int, batch: int) -> Work:
    """Return the work of one decode step. operations: `token_operations` of the model."""
    return Work(found.step_bytes(batch), batch * (operations + attention_operations(found) * found.context))


def prefill_work(found: Footprint, operations: int, head: int, batch: int, prompt: int) -> Work:
    """Return the work of one forward over `prompt` tokens of each sequence, with the logits of the last.

    head: number of weights in the output head.
    """
    used = min(found.experts, batch * prompt * found.experts_per_token)
    weights = found.fixed_read_bytes + (found.expert_bytes // found.experts * used if found.experts else 0)
    written = found.state_bytes + found.conv_bytes + found.kv_bytes_per_token * prompt
    body = (operations - 2 * head) * prompt + 2 * head
    pairs = prompt * (prompt + 1) // 2  # of a token with itself and those before it
    return Work(weights + batch * written, batch * (body + attention_operations(found) * pairs))


def token_operations(model: Any, found: Footprint) -> int:
    """Return the multiplications and additions for one token, without attention: all weight matrices, and the state.

    Convolutions and the bases of projected states count like matrices.
    """
    table = embedding(model).weight
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = uses[id(table)] > 1
    total, beside = UPDATE * found.state_numbers, beside_the_text(model)
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.endswith("A_log") or (p is table and not tied) or id(p) in beside:
            continue
        if p.ndim == 3 and found.experts and p.shape[0] == found.experts:
            total += 2 * p.numel() * found.experts_per_token // found.experts
        else:
            total += 2 * p.numel() * (1 if p is table or "_adapter_list." in name else uses[id(p)])
    return total


def attention_operations(found: Footprint) -> int:
    """Return the fewest operations per token and attended token: one multiplication and addition per key and value.

    Heads of queries that share their keys do more; the fewest still give an upper limit of the speed.
    """
    return 2 * found.kv_bytes_per_token // (4 if found.dtype == "float32" else 2)


def head_weights(model: Any) -> int:
    """Return the number of weights in the output head's matrix."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


class Machine:
    """Best measured rates of a device so far: bytes per second, and operations per second by dtype."""

    def __init__(self, device: torch.device, dtypes: set[torch.dtype]) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
        self.device = device
        self.source = torch.ones(COPY_BYTES[kind] // 4, device=device)
        self.target = torch.empty_like(self.source)
        n, probed = MATMUL[kind], dtypes | {torch.float32}
        self.matrices = [torch.randn(n, n, device=device).to(dtype) for dtype in probed]
        self.bandwidth, self.reached = 0.0, dict.fromkeys(probed, 0.0)

    def sample(self) -> None:
        """Run each probe once: a copy (read and written), a sum (read), and a matrix product in each dtype."""
        size = self.source.numel() * 4
        copied = 2 * size / self._seconds(lambda: self.target.copy_(self.source))
        read = size / self._seconds(self.source.sum)
        self.bandwidth = max(self.bandwidth, copied, read)
        for matrix in self.matrices:
            done = 2 * matrix.shape[0] ** 3 / self._seconds(lambda matrix=matrix: matrix @ matrix)
            self.reached[matrix.dtype] = max(self.reached[matrix.dtype], done)

    def flops(self, dtype: torch.dtype) -> float:
        """Return the rate for a model in this dtype. Processors without arithmetic for it compute faster in float32."""
        return max(self.reached[dtype], self.reached[torch.float32])

    def _seconds(self, job: Any) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        job()
        synchronise(self.device)
        return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to finish; returns immediately on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
