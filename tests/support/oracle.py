"""Plain fp64 recurrences: the slow reference for every fast path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sspruner.graph.family import DeltaProjected, Projected, SelectiveProjected


def states(p: Projected) -> torch.Tensor:
    """Return h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t, one step at a time: fp64 (b, T, H, P, N)."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    x, dt, A = p.x.double(), p.dt.double(), p.A.double()
    B = p.B.double().repeat_interleave(H // G, 2)  # (b, T, H, N)
    h = torch.zeros(b, H, P, N, dtype=torch.float64)
    steps = []
    for t in range(T):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (b, H, 1, 1)
        h = decay * h + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        steps.append(h)
    return torch.stack(steps, 1)


def output(p: Projected) -> torch.Tensor:
    """Return y_t = C_t . h_t + D x_t: fp64 (b, T, H, P)."""
    C = p.C.double().repeat_interleave(p.x.shape[2] // p.C.shape[2], 2)  # (b, T, H, N)
    return torch.einsum("bthpn,bthn->bthp", states(p), C) + p.D.double()[:, None] * p.x.double()


def state_energy(p: Projected) -> torch.Tensor:
    """Return sum_p h^2: fp64 (b, T, H, N)."""
    return states(p).square().sum(3)


def ghost_sum(p: Projected, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over samples, tokens, heads of the group and p of h^2 C^2: fp64 (G, N)."""
    b, T, H, _ = p.x.shape
    G, N = p.B.shape[2:]
    q = state_energy(p).view(b, T, G, H // G, N) * mask[..., None, None, None]
    return (q.sum(3) * p.C.double().square()).sum((0, 1))


def gramian(p: Projected, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over samples, tokens, heads of the group and p of h h^T: fp64 (G, N, N)."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    h = states(p).view(b, T, G, H // G, P, N) * mask[..., None, None, None, None]
    return torch.einsum("btgkpn,btgkpm->gnm", h, h)


def selective_output(p: SelectiveProjected) -> torch.Tensor:
    """Return Mamba1's output, one step at a time, y_t = C_t . h_t + D x_t: fp64 (b, T, G, P)."""
    x, dt, A, B, C = (tensor.double() for tensor in (p.x, p.dt, p.A, p.B, p.C))
    h, steps = torch.zeros(*x.shape[:1], *A.shape, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None, :]
        steps.append(torch.einsum("bgpn,bgn->bgp", h, C[:, t]))
    return torch.stack(steps, 1) + p.D.double() * x


def mamba2_mixer(mixer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute a whole Mamba2-type mixer from its parameters: fp64 (b, T, hidden size).

    Sizes come from the tensors' shapes; of the module only n_groups, the norm's epsilon and the multipliers are read.
    transformers clamps dt in prefill, as here, but not in its one-token step.
    """
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    T, G, H = hidden.shape[1], mixer.n_groups, len(w["A_log"])
    D, (channels, _, taps) = w["out_proj.weight"].shape[1], w["conv1d.weight"].shape
    rows = hidden.double() * getattr(mixer, "ssm_in_multiplier", 1.0)
    rows = F.linear(rows, w["in_proj.weight"], w.get("in_proj.bias"))
    rows = rows * getattr(mixer, "mup_vector", torch.ones(())).double()
    z, xBC, dt = rows.split([D, channels, H], -1)
    padded = F.pad(xBC, (0, 0, taps - 1, 0))
    xBC = sum(padded[:, i : i + T] * w["conv1d.weight"][:, 0, i] for i in range(taps)) + w.get("conv1d.bias", 0.0)
    x, B, C = F.silu(xBC).split([D, (channels - D) // 2, (channels - D) // 2], -1)
    p = Projected(
        x=x.unflatten(-1, (H, -1)),
        z=z,
        dt=F.softplus(dt + w["dt_bias"]).clamp(*mixer.time_step_limit),
        A=-w["A_log"].exp(),
        B=B.unflatten(-1, (G, -1)),
        C=C.unflatten(-1, (G, -1)),
        D=w["D"],
    )
    return F.linear(gated(mixer, output(p).flatten(2), z), w["out_proj.weight"], w.get("out_proj.bias"))


def gated(mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Apply the gate and, if the mixer has one, the RMS norm over each group's channels: fp64 (b, T, D)."""
    y, gate, norm = y.double(), F.silu(z.double()), mixer.norm
    if not hasattr(norm, "weight"):
        return y * gate
    after = getattr(norm, "norm_before_gate", False)
    y = (y if after else y * gate).unflatten(-1, (mixer.n_groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()).flatten(2) * norm.weight.double()
    return y * gate if after else y


def delta_states(p: DeltaProjected) -> torch.Tensor:
    """Return every state of a delta rule, one step at a time: fp64 (b, T, H, V, K)."""
    k, v, beta, a = p.k.double(), p.v.double(), p.beta.double(), p.decay.double().exp()
    a = a[..., None, :] if a.ndim == 4 else a[..., None, None]  # by key channel, or one for all
    k = k.repeat_interleave(v.shape[2] // k.shape[2], 2)  # (b, T, H, K)
    S, steps = v.new_zeros(*v[:, 0].shape, k.shape[-1]), []
    for t in range(v.shape[1]):
        S = a[:, t] * S
        wrong = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhv,bhk->bhvk", beta[:, t, :, None] * wrong, k[:, t])
        steps.append(S)
    return torch.stack(steps, 1)


def delta_output(p: DeltaProjected) -> torch.Tensor:
    """Compute y_t = S_t^T q_t: fp64 (b, T, H, V)."""
    q = p.q.double().repeat_interleave(p.v.shape[2] // p.q.shape[2], 2)  # (b, T, H, K)
    return torch.einsum("bthvk,bthk->bthv", delta_states(p), q)


def delta_mixer(mixer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute a whole gated delta net from its parameters, one key head after another: fp64 (b, T, hidden size).

    Sizes come from the tensors' shapes and the number of key heads. Source: shared notes on the layouts.
    """
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    G, H, x = mixer.num_k_heads, len(w["A_log"]), hidden.double()
    norm, out = ("o_norm", "o_proj") if "o_proj.weight" in w else ("norm", "out_proj")
    V, width = len(w[f"{norm}.weight"]), w["conv1d.weight"].shape[0]
    K, R = (width - H * V) // (2 * G), H // G
    rows = _delta_rows(w, G, R, K, V)
    taps = w["conv1d.weight"].shape[2]
    heads = []
    for g in range(G):
        at = {"q": g * K, "k": G * K + g * K, "v": 2 * G * K + g * R * V}
        convolved = {}
        for name, first in at.items():
            part = x @ rows[name][g].T  # (b, T, rows)
            padded = F.pad(part, (0, 0, taps - 1, 0))
            weight = w["conv1d.weight"][first : first + part.shape[-1], 0]
            convolved[name] = F.silu(sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(taps)))
        q, k = (c / (c.square().sum(-1, keepdim=True) + 1e-6).sqrt() for c in (convolved["q"], convolved["k"]))
        for r in range(R):
            head = g * R + r
            strength = (x @ rows["b"][g][r]).sigmoid() * (2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0)
            p = DeltaProjected(
                q=(q / K**0.5)[:, :, None], k=k[:, :, None], v=convolved["v"][..., None, r * V : (r + 1) * V],
                z=(x @ rows["z"][g][r * V : (r + 1) * V].T), beta=strength[..., None],
                decay=-(w["A_log"][head].exp() * F.softplus(x @ rows["a"][g][r] + w["dt_bias"][head]))[..., None],
            )  # fmt: skip
            y = delta_output(p)[:, :, 0]  # (b, T, V)
            y = y / (y.square().mean(-1, keepdim=True) + getattr(mixer, norm).variance_epsilon).sqrt()
            gate = p.z.sigmoid() if getattr(mixer, norm).activation == "sigmoid" else F.silu(p.z)
            heads.append(y * w[f"{norm}.weight"] * gate)
    return F.linear(torch.cat(heads, -1), w[f"{out}.weight"])


def _delta_rows(w: dict[str, torch.Tensor], G: int, R: int, K: int, V: int) -> dict[str, list[torch.Tensor]]:
    """Return the rows of q, k, v, z, b and a of each key head."""
    sizes = {"q": K, "k": K, "v": R * V, "z": R * V}
    if "in_proj_qkvz.weight" in w:  # interleaved by key head
        parts = [block.split(list(sizes.values())) for block in w["in_proj_qkvz.weight"].chunk(G)]
        scalars = [block.chunk(2) for block in w["in_proj_ba.weight"].chunk(G)]
        rows = {name: [part[i] for part in parts] for i, name in enumerate(sizes)}
        return rows | {"b": [s[0] for s in scalars], "a": [s[1] for s in scalars]}
    if "in_proj_qkv.weight" in w:
        whole = dict(zip("qkv", w["in_proj_qkv.weight"].split([G * K, G * K, G * R * V]), strict=True))
        whole |= {name: w[f"in_proj_{name}.weight"] for name in "zba"}
    else:
        whole = {name: w[f"{'g' if name == 'z' else name}_proj.weight"] for name in "qkvzba"}
    return {name: list(value.chunk(G)) for name, value in whole.items()}
