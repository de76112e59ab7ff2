"""One epsilon for all norms: GGUF has a single field where a cut gives norms epsilons of their own.

RMSNorm(s x; e) = RMSNorm(x; e / s^2), so a norm gets any epsilon if what it reads can be scaled:
- The residual stream is read by norms alone. Scaling the embedding and everything that is added to the stream by s
  changes nothing else.
- The norms on dt, B and C of Mamba1-type mixers read rows of x_proj; those on queries and keys, and on the narrow
  vector of latent attention, rows of their projections.
The norms after the scan of Mamba2 and of delta rules read a product behind nonlinear functions, which cannot be scaled:
they define the one epsilon. Where these differ among themselves, the model is computed with the one epsilon and
compared. So it is for delta rules where the one epsilon is not the 1e-6 with which transformers normalises queries and
keys: llama.cpp takes the one epsilon there, too.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sspruner.compute.forward import forward
from sspruner.errors import ModelError
from sspruner.formats.gguf_blocks import DELTA, Parts

BOUND = 1e-2  # largest difference of logits, relative to the largest logit, with which a file is written
SEQUENCES, LENGTH = 2, 64  # random tokens on which the difference is measured
NO_LIMIT = (0.0, math.inf)
QUERIES_AND_KEYS = 1e-6  # l2norm of transformers' delta rules


@dataclass(frozen=True)
class Epsilons:
    """The one epsilon of the file, and the factor of the residual stream."""

    one: float
    stream: float = 1.0

    def rows(self, epsilon: float) -> float:
        """Return the factor of what a norm reads that gives it this epsilon."""
        return math.sqrt(self.one / epsilon) if epsilon > 0 and self.one > 0 else 1.0


def epsilon_of(norm: Any) -> float:
    """Return the epsilon of an RMS norm."""
    return float(getattr(norm, _name(norm)))


def epsilons(model: Parts) -> Epsilons:
    """Choose the one epsilon: that of the norms after the scan, else that of the residual norms."""
    residual = _middle([epsilon_of(norm) for norm in model.residual_norms])
    scan = [epsilon_of(norm) for norm in model.mixer_norms]
    if not scan:
        return Epsilons(residual)
    one = Epsilons(_middle(scan))
    return Epsilons(one.one, one.rows(residual))


def inexact(model: Parts, chosen: Epsilons) -> list[str]:
    """Describe what llama.cpp computes otherwise: norms with another epsilon, and limits of dt."""
    residual = [epsilon_of(norm) for norm in model.residual_norms]
    scan = [epsilon_of(norm) for norm in model.mixer_norms]
    found = []
    if unlike := [e for e in residual if not math.isclose(e * chosen.stream**2, chosen.one, rel_tol=1e-6)]:
        found.append(f"{len(unlike)} norms of the residual stream have other epsilons")
    if unlike := [e for e in scan if not math.isclose(e, chosen.one, rel_tol=1e-6)]:
        found.append(f"{len(unlike)} of {len(scan)} norms after the scan have other epsilons")
    if model.kind in DELTA and not math.isclose(chosen.one, QUERIES_AND_KEYS, rel_tol=1e-6):
        found.append(f"queries and keys are normalised with {QUERIES_AND_KEYS:g}, not {chosen.one:.1e}")
    limits = {tuple(m.time_step_limit) for m in model.mixers if hasattr(m, "time_step_limit")} - {NO_LIMIT}
    return found + [f"dt is limited to {list(limit)}" for limit in sorted(limits)]


@torch.no_grad()
def difference(model: Any, described: Parts, chosen: Epsilons) -> float:
    """Return the largest difference in logits of the model as llama.cpp computes it, relative to the largest logit."""
    vocabulary = described.embedding.weight.shape[0]
    ids = torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    exact = forward(model, ids, use_cache=False).logits.float()
    with _as_llama(described, chosen):
        found = forward(model, ids, use_cache=False).logits.float()
    return float((found - exact).abs().max() / exact.abs().max())


def check_difference(model: Any, described: Parts, chosen: Epsilons) -> str:
    """Return a remark on what llama.cpp computes otherwise, "" if nothing. Raises ModelError if it is too much."""
    reasons = inexact(described, chosen)
    if not reasons:
        return ""
    found = difference(model, described, chosen)
    limits = " and no limits of dt" if any("dt" in reason for reason in reasons) else ""
    said = f"llama.cpp has one epsilon{limits}: {'; '.join(reasons)}"
    if not found <= BOUND:  # NaN is too much, too
        said += f"; the logits would differ by {found:.1e} of the largest, above {BOUND:g}"
        padded = "; --to gguf-padded pads to sizes with the epsilon of before" if described.kind in DELTA else ""
        raise ModelError(f"gguf: {said}{padded}")
    return f"{said}; written all the same: the logits differ by {found:.1e} of the largest, of {BOUND:g} allowed"


@contextmanager
def _as_llama(model: Parts, chosen: Epsilons) -> Iterator[None]:
    """Context manager that gives norms and mixers the epsilons and limits with which llama.cpp computes."""
    values: list[tuple[Any, str, Any]] = []
    values += [(norm, _name(norm), chosen.one / chosen.stream**2) for norm in model.residual_norms]
    values += [(norm, _name(norm), chosen.one) for norm in model.mixer_norms]
    values += [(mixer, "time_step_limit", NO_LIMIT) for mixer in model.mixers if hasattr(mixer, "time_step_limit")]
    if model.kind in DELTA:
        code = sys.modules[type(model.mixers[0]).__module__]
        values.append((code, "l2norm", partial(_normalised, epsilon=chosen.one)))
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    try:
        for module, name, value in values:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _normalised(x: torch.Tensor, dim: int = -1, eps: float = 0.0, *, epsilon: float) -> torch.Tensor:
    """Divide vectors by their length with this epsilon, in place of another one."""
    return x * (x.square().sum(dim, keepdim=True) + epsilon).rsqrt()


def _name(norm: Any) -> str:
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def _middle(values: list[float]) -> float:
    return statistics.median_low(values)
