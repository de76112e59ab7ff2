"""Strided windows over texts, and the losses on each: nll, KL and agreement with another model.

A window gives the model at most `window` tokens and scores the token after each. The next window begins `stride` tokens
later; what an earlier window has scored is context there, and is not counted again. So every token of a text except its
first, which has no context, is counted exactly once, and (except in the first window) with more than window - stride
tokens before it. With stride = window, windows lie end to end. The last window of a text ends with the text and may be
shorter; windows of one batch are padded on the right, and padding is neither context nor counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.compute.forward import forward
from sspruner.errors import InputError


@dataclass(frozen=True)
class Windows:
    """A set of windows; all fields (n, T).

    tokens     input, int64
    targets    the next tokens, int64; one column less for windows that are scored separately (`alone`)
    mask       True where `tokens` is not padding, bool
    counted    True where `targets` counts, bool
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor

    def batches(self, size: int) -> Iterator[Windows]:
        """Yield at most `size` windows at a time, no wider than the longest of them."""
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            width = int(self.mask[rows].sum(1).max())
            yield Windows(*(part[rows, :width] for part in (self.tokens, self.targets, self.mask, self.counted)))


@dataclass(frozen=True)
class Sums:
    """Sums over each window, fp64 (n,).

    nll         in nats, over the tokens that count
    tokens      number of tokens that count
    kl          KL(dense || model) in nats; None without a dense model
    agreement   number of tokens with the same argmax in both models; None without a dense model
    each        nll of every target of one batch, 0 where it does not count, fp64 (n, T); None for joined batches
    """

    nll: torch.Tensor
    tokens: torch.Tensor
    kl: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    each: torch.Tensor | None = None


Logits = Callable[[Windows], torch.Tensor]  # logits after every token of a batch: (b, T, V)


def windows(texts: Sequence[torch.Tensor], window: int, stride: int | None = None) -> Windows:
    """Return the windows of each text. texts: int64 (tokens,) each, of any length. stride: default `window`.

    Raises InputError for a stride outside 1 to window, and if no text has two tokens.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise InputError(f"stride {stride}: must be at least 1 and at most the window, {window}")
    rows = [(text, *span) for text in texts for span in _spans(len(text), window, stride)]
    if not rows:
        raise InputError("nothing to measure: no text holds two tokens")
    width = max(stop - start for _, start, stop, _ in rows)
    tokens, targets = torch.zeros(2, len(rows), width, dtype=torch.long)
    mask, counted = torch.zeros(2, len(rows), width, dtype=torch.bool)
    for row, (text, start, stop, new) in enumerate(rows):
        tokens[row, : stop - start] = text[start:stop]
        targets[row, : stop - start] = text[start + 1 : stop + 1]
        mask[row, : stop - start] = True
        counted[row, new - start : stop - start] = True
    return Windows(tokens, targets, mask, counted)


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, new): the input is tokens start to stop - 1; targets after token `new` and later count."""
    new = start = 0
    while new < length - 1:
        stop = min(start + window, length - 1)
        yield start, stop, new
        new, start = stop, start + stride


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each target's negative log-likelihood, nats, fp64 on the CPU: (b, T). logits (b, T, V), targets (b, T)."""
    rows = [nn.functional.cross_entropy(row.float(), target, reduction="none")
            for row, target in zip(logits, targets.to(logits.device), strict=True)]  # fmt: skip
    return torch.stack(rows).double().cpu()


def log_softmax(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return fp32 log-probabilities, window by window: (b, T, V) -> b times (T, V)."""
    return [row.float().log_softmax(-1) for row in logits]


def alone(tokens: torch.Tensor, mask: torch.Tensor) -> Windows:
    """Return windows that are scored separately: each token is the target of the one before it. Padding is not counted.

    tokens int64, mask bool, both (b, T); the targets are (b, T-1).
    """
    return Windows(tokens, tokens[:, 1:], mask, mask[:, 1:] & mask[:, :-1])


def logits_of(model: nn.Module) -> Logits:
    """Return the function that computes a model's logits on a batch."""
    return lambda batch: forward(model, batch.tokens, batch.mask, use_cache=False).logits


@torch.no_grad()
def losses_by_batch(
    batches: Iterable[Windows], versions: Sequence[Logits], dense: Logits | None = None, *, of_dense: bool = True
) -> Iterator[tuple[Sums | None, list[Sums]]]:
    """Compute the losses of a dense model and of versions of it, batch by batch; all losses are computed here.

    Yields, for each batch, the sums of the dense model (None without one, or without `of_dense`) and those of every
    version, against the dense model if there is one. The dense model runs once on each batch, before the versions.
    """
    for batch in batches:
        width = batch.targets.shape[1]
        dense_sums = logp = None
        if dense is not None:
            logits = dense(batch)[:, :width]
            dense_sums = sums(logits, batch.targets, batch.counted) if of_dense else None
            logp = log_softmax(logits)
            del logits
        yield dense_sums, [sums(version(batch)[:, :width], batch.targets, batch.counted, logp) for version in versions]


def sums(
    logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, dense: Sequence[torch.Tensor] | None = None
) -> Sums:
    """Return the losses of logits (b, T, V) on targets, int64 (b, T), where `counted`, bool (b, T), is True.

    dense: `log_softmax` of another model's logits for the same windows. Works window by window: fp32 logits are large.
    """
    where = counted.cpu()
    each = token_nll(logits, targets).where(where, 0.0)
    nll = each.sum(1)
    if dense is None:
        return Sums(nll, where.sum(1).double(), each=each)
    divergences = []
    for scored, reference, row in zip(logits, dense, counted.to(logits.device), strict=True):
        q, p = scored[row].float().log_softmax(-1), reference[row]  # (tokens that count, V)
        same = q.argmax(-1) == p.argmax(-1)
        divergences.append(torch.stack([(p.exp() * (p - q)).sum(-1).double().sum(), same.double().sum()]).cpu())
    kl, agreement = torch.stack(divergences, 1)
    return Sums(nll, where.sum(1).double(), kl, agreement, each)


def joined(parts: Sequence[Sums]) -> Sums:
    """Join the sums of several batches into one."""
    kl = [part.kl for part in parts if part.kl is not None]
    agreement = [part.agreement for part in parts if part.agreement is not None]
    return Sums(
        torch.cat([part.nll for part in parts]),
        torch.cat([part.tokens for part in parts]),
        torch.cat(kl) if kl else None,
        torch.cat(agreement) if agreement else None,
    )


def watched(
    batches: Iterable[Windows], progress: Progress | None, phase: str, total: int, step: int = 1
) -> Iterator[Windows]:
    """Yield the batches; before each, report the number of finished steps to `progress`."""
    for number, batch in enumerate(batches):
        if progress:
            progress(phase, number * step, total)
        yield batch


def measure(
    model: nn.Module,
    data: Windows,
    batch_size: int,
    against: nn.Module | None = None,
    progress: Progress | None = None,
    phase: str = "perplexity",
) -> tuple[Sums, Sums | None]:
    """Return the sums of a model, and of the model it is compared with (None without one), on the same batches."""
    ours, theirs = [], []
    batches = watched(data.batches(batch_size), progress, phase, len(data.tokens), batch_size)
    for dense, (batch,) in losses_by_batch(
        batches, [logits_of(model)], None if against is None else logits_of(against)
    ):
        ours.append(batch)
        if dense is not None:
            theirs.append(dense)
    return joined(ours), joined(theirs) if theirs else None


def losses(
    model: nn.Module, data: Windows, batch_size: int, progress: Progress | None = None, phase: str = "perplexity"
) -> torch.Tensor:
    """Return the nll of every target, 0 where it does not count: fp64 (n, T), on the CPU."""
    nll = torch.zeros(data.targets.shape, dtype=torch.float64)
    batches = watched(data.batches(batch_size), progress, phase, len(nll), batch_size)
    done = 0
    for _, (batch,) in losses_by_batch(batches, [logits_of(model)]):
        assert batch.each is not None
        size, width = batch.each.shape
        nll[done : done + size, :width] = batch.each
        done += size
    return nll
