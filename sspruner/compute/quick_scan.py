"""Quick scans for training and scoring: Mamba2's is several times quicker than the model's own fallback on a CPU.

Mamba2 runs in its quadratic form; Mamba1, under autograd, as one recurrence with a gradient of its own. Results differ
from those of the model's code by rounding only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.compute.constant import Once

QUADRATIC = 128  # longest piece, in steps, that runs in the quadratic form: Q^2 numbers for each head


@dataclass(frozen=True)
class Wanted:
    """What is trained of a mixer: names of rows, as in its layout, and channels of its convolution.

    channels: int64 (channels,). once: store of what depends on nothing that is trained.
    """

    rows: frozenset[str]
    channels: torch.Tensor
    once: Once = field(default_factory=Once)

    @property
    def of_state(self) -> bool:
        """True if what is trained enters with B, C or A (k, q): then x, z and dt depend on nothing that is trained."""
        return self.rows <= {"A", "B", "C", "k", "q"}


@contextmanager
def quick_scans(mixer: nn.Module, wanted: Wanted) -> Iterator[None]:
    """Context manager that replaces the scans in the code of a mixer's class, where it has those of transformers.

    No gradient is computed for what does not depend on anything that is trained.
    """
    code = sys.modules.get(type(mixer).__module__)  # None for a class that was made elsewhere
    stock = {name: getattr(code, name) for name in SCANS if hasattr(code, name)}
    for name, scan in stock.items():
        setattr(code, name, partial(SCANS[name], scan, wanted))
    try:
        yield
    finally:
        for name, scan in stock.items():
            setattr(code, name, scan)


@contextmanager
def quick_streams(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager for a CPU: where no gradient is recorded, mixers of Mamba2's type run in the quadratic form."""
    name = "mamba2_chunk_scan"
    code = {sys.modules.get(type(module).__module__) for module in model.modules()} if device.type == "cpu" else set()
    stock = {module: getattr(module, name) for module in code if hasattr(module, name)}
    for module, scan in stock.items():
        setattr(module, name, partial(_without_gradients, scan))
    try:
        yield
    finally:
        for module, scan in stock.items():
            setattr(module, name, scan)


def _without_gradients(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return stock(*args, **kwargs) if torch.is_grad_enabled() else chunk_scan(stock, ALL, *args, **kwargs)


def causal_conv(
    stock: Callable[..., Any],
    wanted: Wanted,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute what transformers' `causal_conv1d_fn` does, with gradients of the trained channels alone.

    x: (b, C, T). The other channels are computed once for each window.
    """
    if not wanted.of_state:
        return stock(x, weight, bias, **kwargs)
    some = wanted.channels.to(x.device)
    out = wanted.once("causal_conv", lambda: stock(x, weight, bias, **kwargs))  # (b, C, T)
    if not len(some):
        return out
    return out.index_copy(1, some, stock(x[:, some], weight[some], None if bias is None else bias[some], **kwargs))


def chunk_scan(
    stock: Callable[..., Any], wanted: Wanted, x: torch.Tensor, dt: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Compute what transformers' `mamba2_chunk_scan` does, for a sequence from its start without a final state.

    x: (b, T, H, P), dt: (b, T, H), before bias and softplus. Anything else is left to `stock`.
    """
    A, B, C = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate("ABC"))
    if any(kwargs.get(name) is not None for name in ("initial_states", "z")) or kwargs.get("return_final_states"):
        return stock(x, dt, *args, **kwargs)
    dt = _step(dt, kwargs.get("dt_bias"), bool(kwargs.get("dt_softplus")))
    dt = dt.clamp(*kwargs.get("dt_limit", (0.0, float("inf")))).float()
    y = quadratic_scan(_frozen(x.float(), wanted), _frozen(dt, wanted), A.float(), B.float(), C.float())
    D = kwargs.get("D")
    return y if D is None else y + D[:, None] * x.float()


def quadratic_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    """Compute y_t = sum_{s<=t} (C_t . B_s) exp(cum_t - cum_s) dt_s x_s, in pieces of QUADRATIC steps.

    x (b, T, H, P), dt (b, T, H) after softplus, A (H,), B and C (b, T, G, N) -> y (b, T, H, P). cum is the sum of dt A.
    Source: the dual form in Dao & Gu, Transformers are SSMs, arXiv 2405.21060, section 5.
    """
    b, T, H, P = x.shape
    G = B.shape[2]
    x = x.view(b, T, G, H // G, P).permute(0, 2, 3, 1, 4)  # (b, G, K, T, P)
    dt = dt.view(b, T, G, H // G).permute(0, 2, 3, 1)  # (b, G, K, T)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (b, G, T, N)
    outputs, state = [], None
    for start in range(0, T, QUADRATIC):
        at = slice(start, start + QUADRATIC)
        cum = (dt[..., at] * A.view(1, G, H // G, 1)).cumsum(-1)  # (b, G, K, Q)
        Q = cum.shape[-1]
        future = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
        weight = (cum[..., :, None] - cum[..., None, :]).masked_fill(future, -torch.inf).exp()
        weight = weight * dt[..., None, at]  # (b, G, K, Q, Q)
        y = ((C[:, :, at] @ B[:, :, at].mT)[:, :, None] * weight) @ x[..., at, :]
        if state is not None:
            y = y + cum.exp()[..., None] * (C[:, :, None, at] @ state.mT)
        if start + Q < T:
            entered = (x[..., at, :] * weight[..., -1, :, None]).mT @ B[:, :, None, at]  # (b, G, K, P, N)
            state = entered if state is None else entered + cum[..., -1, None, None].exp() * state
        outputs.append(y)
    return torch.cat(outputs, -2).permute(0, 3, 1, 2, 4).reshape(b, T, H, P).contiguous()  # callers take a view


def selective_scan(
    stock: Callable[..., Any], wanted: Wanted, x: torch.Tensor, dt: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Compute what transformers' `mamba_selective_scan` does, without a final state.

    x and dt: (b, D, T), dt before bias and softplus. A last state is left to `stock`. States that no token writes or
    reads, those that were cut, are left out.
    """
    if kwargs.get("return_last_state"):
        return stock(x, dt, *args, **kwargs)
    A, B, C = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate("ABC"))  # (D, N), (b, N, T)
    bias = kwargs.get("delta_bias")
    dt = _step(dt, None if bias is None else bias[..., None], bool(kwargs.get("delta_softplus"))).float()
    inputs, dt = _frozen(x.float(), wanted), _frozen(dt, wanted)
    live = (B.ne(0) | C.ne(0)).any(0).any(-1).nonzero().flatten()  # (N',)
    write, read = (rows.float()[:, live].permute(2, 0, 1)[:, :, None] for rows in (B, C))  # (T, b, 1, N')
    step = dt.permute(2, 0, 1)[..., None]  # (T, b, D, 1)
    entering = step * inputs.permute(2, 0, 1)[..., None] * write  # (T, b, D, N')
    h = Recurrence.apply((step * A.float()[:, live]).exp(), entering)  # type: ignore[no-untyped-call]
    y = (h * read).sum(-1).permute(1, 2, 0)  # (b, D, T)
    D, z = kwargs.get("D"), kwargs.get("z")
    y = y if D is None else y + D[:, None] * x
    return y if z is None else y * F.silu(z)


class Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + u_t over the first dimension, in place, with the adjoint recurrence as its gradient."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return h, in the shape of a and u: (T, ...)."""
        h = u.clone()
        for t in range(1, len(h)):
            h[t].addcmul_(a[t], h[t - 1])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of a and u: g_t = dL/dh_t + a_{t+1} g_{t+1}, which is u's; a's is g_t h_{t-1}."""
        a, h = ctx.saved_tensors
        g = gradients[0].clone()
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        return torch.cat([torch.zeros_like(a[:1]), g[1:] * h[:-1]]), g


def _step(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """Return the step sizes as the mixers' code computes them."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _frozen(value: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Return x or dt, without a gradient if only the rows of the state are trained."""
    return value.detach() if wanted.of_state else value


ALL = Wanted(frozenset({"x", "dt", "A", "B", "C"}), torch.empty(0, dtype=torch.long))
SCANS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "mamba2_chunk_scan": chunk_scan,
    "mamba_selective_scan": selective_scan,
}
