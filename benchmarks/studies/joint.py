"""Refine the balanced basis on the joint error, to see whether that beats the closed form, the scorer `balanced`.

The closed form takes C and h for independent in time. The joint error of a layer does not:

    J(encode, decode) = sum_t sum_p w_t[p] (C_t . h_t[p] - C_t . decode encode h_t[p])^2

It is quadratic in encode and in decode, each with the other held; alternating steps solve for one and then the other,
from the closed form on. Reported: J of all layers against that of the closed form, on the tokens that it was fitted to
and on others; and perplexity on other books. Calibration: books-val.txt.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Made, Subject, as_is, by_token, progress, steps, table

import sspruner
from sspruner.plans import reduction
from sspruner_plugins.balanced import Balanced

reduction.INVERSE = torch.inf  # the least squares solution is of rank k, but no exact projector
RIDGE = 1e-4
log: list[tuple[float, float]] = []  # J / J of the closed form, fitted and not, of every layer


def states(view: sspruner.SSMView) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C (tokens, N) and the weighted H_t = sum_p w h h^T (tokens, N, N), of a mixer with one group."""
    (x, B, decay), w, total = steps(view.projected), view.output_weights, []
    state = x.new_zeros(*x.shape[1:], B.shape[-1])  # (b, H, P, N)
    for t in range(len(x)):
        state = decay[t] * state + x[t][..., None] * B[t][..., None, :]
        h = (state * w[:, t, ..., None].sqrt()).flatten(1, 2)  # (b, H P, N)
        total.append(h.transpose(-1, -2) @ h)
    return view.C.float().flatten(0, 1).squeeze(1), torch.stack(total, 1).flatten(0, 1)


def joint(C: torch.Tensor, H: torch.Tensor, encode: torch.Tensor, decode: torch.Tensor) -> float:
    """Return J of one layer: the mean over tokens."""
    lost = C - C @ decode @ encode  # (tokens, N): (I - decode encode)^T C
    return float(torch.einsum("tn,tnm,tm->t", lost, H, lost).double().mean())


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
    products = torch.einsum("ti,tk->tik", c, c).flatten(1).T @ G.flatten(1) / len(C)  # (i i, j j)
    i, j = c.shape[1], G.shape[1]
    left = products.view(i, i, j, j).transpose(1, 2).reshape(i * j, i * j)
    left.diagonal().add_(size)
    goal = torch.einsum("ti,tn,tnj->ij", c, C, right) / len(C) + size * start
    found: torch.Tensor = torch.linalg.solve(left, goal.flatten())
    return found.view(i, j)


class Refined(Balanced):
    """balanced, refined on the first half of the tokens that it sees; the other half only measures."""

    name = basis = "refined"

    def __init__(self, k: int, turns: int) -> None:
        super().__init__()
        self.k, self.turns = k, turns
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(self, view: sspruner.SSMView) -> None:
        """Add a batch."""
        super().observe(view)
        self.parts.append(states(view))

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode and decode: the refined directions, and then those of the closed form."""
        C, H = (torch.cat(part) for part in zip(*self.parts, strict=True))
        half, k = len(C) // 2, self.k
        closed = self.encode[0, :k].float(), self.decode[0, :, :k].float()
        better = refine(C[:half], H[:half], *closed, self.turns)
        pairs = [(C[part], H[part]) for part in (slice(half), slice(half, None))]
        log.append(tuple(joint(*pair, *better) / joint(*pair, *closed) for pair in pairs))  # type: ignore[arg-type]
        encode, decode = self.encode.clone(), self.decode.clone()
        encode[0, :k], decode[0, :, :k] = better[0].double(), better[1].double()
        return encode, decode


def tables(s: Any) -> Made:
    """Return a row for each size and number of turns. Settings: windows, keep, turns, tokens (sequences, length)."""
    subject, rows = Subject("mamba2-books-4m", s.data), []
    (count, length), text = s.tokens, subject.text("books-test.txt", s.windows)
    data = subject.text("books-val.txt", count, seq_len=length)
    for keep, turns in [(keep, turns) for keep in s.keep for turns in (0, *s.turns)]:
        model, options = copy.deepcopy(subject.model), {"k": keep, "turns": turns} if turns else {}
        log.clear()
        how: dict[str, Any] = {"keep": keep, "mode": "mask", "calibration": data, "options": options}
        sspruner.prune(model, Refined if turns else "balanced", **how)
        dense, (nll, kl) = map(by_token, subject.measure([as_is(subject.model), as_is(model)], text))
        errors = [f"{sum(x) / len(x):.3f}" for x in zip(*log or [(1.0, 1.0)], strict=True)]
        label = f"{turns} turns" if turns else "closed form"
        rows.append([str(keep), label, *errors, f"{float(nll.mean().exp()):.3f}", f"{float(kl.mean()):.5f}"])
        progress(" | ".join(rows[-1]))
    head = ["kept", "basis", "J, fitted tokens", "J, other tokens", "perplexity", "KL"]
    title = f"Joint refinement, mamba2-books-4m; dense {float(dense[0].mean().exp()):.3f}"
    return [table(title, head, rows)], f"seed 0; {count} x {length} tokens observed, half of them fitted"
