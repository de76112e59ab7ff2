"""Does refining the balanced basis on the joint error beat the closed form? The scorer `balanced` is the closed form.

The closed form takes C and h for independent in time. The joint error of a layer does not:

    J(encode, decode) = sum_t sum_p w_t[p] (C_t . h_t[p] - C_t . decode encode h_t[p])^2

It is quadratic in encode and in decode, each with the other held; alternating steps solve for one and then the other by
conjugate gradients, from the closed form on. Reported: J of all layers against that of the closed form, on the tokens
that it was fitted to and on others; and perplexity on other books. Calibration: books-val.txt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import Made, Subject, costs, progress, table

import sspruner
from sspruner.calibrate.state import chunks
from sspruner.plans import reduction
from sspruner_plugins.balanced import Balanced

reduction.INVERSE = torch.inf  # the least squares solution is of rank k, but no exact projector
CONJUGATE_STEPS, RIDGE = 30, 1e-4


def states(view: sspruner.SSMView) -> tuple[torch.Tensor, torch.Tensor]:
    """C (tokens, N) and the weighted H_t = sum_p w h h^T (tokens, N, N), of a mixer with one group."""
    w, total, start = view.output_weights, [], 0
    for c in chunks(view.projected, size=4):  # four steps at a time: their states are made
        made = (c.L * c.dt[..., None, :])[..., None, :] * c.x.transpose(-1, -2)[..., None, :, :]  # (b, 1, K, Q, P, Q)
        h = torch.einsum("bgkqps,bgsn->bqkpn", made, c.B)
        h = h + torch.einsum("bgkq,bgkpn->bqkpn", c.decay, c.entry)  # (b, Q, K, P, N)
        Q = h.shape[1]
        h = (h * w[:, start : start + Q, ..., None].sqrt()).flatten(2, 3)  # (b, Q, K P, N)
        total.append(h.transpose(-1, -2) @ h)
        start += Q
    return view.C.float().flatten(0, 1).squeeze(1), torch.cat(total, 1).flatten(0, 1)


def joint(C: torch.Tensor, H: torch.Tensor, encode: torch.Tensor, decode: torch.Tensor) -> float:
    """J of one layer: the mean over tokens."""
    lost = C - C @ decode @ encode  # (tokens, N): (I - decode encode)^T C
    return float(torch.einsum("tn,tnm,tm->t", lost, H, lost).double().mean())


def solve(apply: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients for a symmetric positive operator on matrices."""
    x, r = start, right - apply(start)
    p, energy = r, float((r * r).sum())
    for _ in range(CONJUGATE_STEPS):
        if energy == 0:
            break
        ap = apply(p)
        step = energy / float((p * ap).sum())
        x, r = x + step * p, r - step * ap
        p, energy = r + float((r * r).sum()) / energy * p, float((r * r).sum())
    return x


def refine(C: torch.Tensor, H: torch.Tensor, encode: torch.Tensor, decode: torch.Tensor, turns: int) -> Any:
    """Return encode (k, N) and decode (N, k) after so many turns of both steps; a ridge holds them near their start."""
    for _ in range(turns):
        G = encode @ H @ encode.T  # (tokens, k, k): sum_t C C^T decode G = sum_t C C^T H encode^T
        decode = least(C, C, H @ encode.T, G, decode)
        encode = least(C @ decode, C, H, H, encode)  # c = decode^T C: sum_t c c^T encode H = sum_t c C^T H
    return encode, decode


def least(c: torch.Tensor, C: torch.Tensor, right: torch.Tensor, G: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return X near `start` with sum_t c c^T X G_t = sum_t c C^T right_t. c: (tokens, i); G: (tokens, j, j)."""
    size = RIDGE * G.diagonal(dim1=-2, dim2=-1).mean() * c.square().mean()

    def apply(X: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,tj,tjk->ik", c, c @ X, G) / len(C) + size * X

    return solve(apply, torch.einsum("ti,tn,tnj->ij", c, C, right) / len(C) + size * start, start)


class Refined(Balanced):
    """balanced, refined on the first half of the tokens that it sees; the other half only measures."""

    name = basis = "refined"
    log: dict[int, list[tuple[float, float]]] = {}  # turns -> J / J of the closed form, fitted and not, by layer

    def __init__(self, k: int, turns: int) -> None:
        super().__init__()
        self.k, self.turns = k, turns
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        self.parts.append(states(view))

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        C, H = (torch.cat(part) for part in zip(*self.parts, strict=True))
        half, k = len(C) // 2, self.k
        first, other = (C[:half], H[:half]), (C[half:], H[half:])
        closed = self.encode[0, :k].float(), self.decode[0, :, :k].float()
        better = refine(*first, *closed, self.turns)
        Refined.log.setdefault(self.turns, []).append(
            (joint(*first, *better) / joint(*first, *closed), joint(*other, *better) / joint(*other, *closed))
        )
        encode, decode = self.encode.clone(), self.decode.clone()
        encode[0, :k], decode[0, :, :k] = better[0].double(), better[1].double()
        return encode, decode


def tables(s: Any) -> Made:
    """Return a row for each size and number of turns. Settings: windows, keep, turns, tokens (sequences, length)."""
    subject, rows = Subject("mamba2-books-4m", s.data), []
    data, text = subject.text("books-val.txt", *s.tokens), subject.text("books-test.txt", s.windows)
    for keep in s.keep:
        for turns in (0, *s.turns):
            model, options = copy.deepcopy(subject.model), {"k": keep, "turns": turns} if turns else {}
            Refined.log.clear()
            how: dict[str, Any] = {"keep": keep, "mode": "mask", "calibration": data, "options": options}
            sspruner.prune(model, Refined if turns else "balanced", **how)
            dense, (values,) = subject.measure([lambda model=model: nullcontext(model)], text)
            errors = [f"{sum(x) / len(x):.3f}" for x in zip(*Refined.log.get(turns, [(1.0, 1.0)]), strict=True)]
            perplexity, kl = costs(values)
            label = f"{turns} turns" if turns else "closed form"
            rows.append([str(keep), label, *errors, f"{perplexity:.3f}", f"{kl:.5f}"])
            progress(" | ".join(rows[-1]))
    head = ["kept", "basis", "J, fitted tokens", "J, other tokens", "perplexity", "KL"]
    title = f"Joint refinement, mamba2-books-4m; dense {costs(dense)[0]:.3f}"
    return table(title, head, rows), f"seed 0; {s.tokens[0]} x {s.tokens[1]} tokens observed, half of them fitted", None
