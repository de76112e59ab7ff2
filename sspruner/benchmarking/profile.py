"""Profile a decode step by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from sspruner.benchmarking.run import prefilled

STEPS = 4


def profiled(model: Any, ids: torch.Tensor, steps: int = STEPS) -> list[dict[str, Any]]:
    """Return [{"operation", "ms", "calls"}] of one decode step after `ids`, slowest first, by self time.

    On a GPU the time is that of its kernels, else of the processor.
    """
    step = prefilled(model, ids)
    step()  # warm
    cuda = ids.device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    rows = []
    for event in seen.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
        rows.append({"operation": event.key, "ms": spent / 1000 / steps, "calls": event.count / steps})
    return sorted((row for row in rows if row["ms"] > 0), key=lambda row: -row["ms"])
