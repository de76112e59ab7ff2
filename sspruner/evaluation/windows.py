"""Strided windows over texts, and what a model does on each of them: nll, KL and agreement with another model.

A window gives the model at most `window` tokens and asks for the one after each. The next window begins `stride` tokens
later; what an earlier window has predicted is context there, and counts no more. So every token of a text but its
first, which has no context, is counted exactly once, and (but for the first window) with more than window - stride
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
    """All (n, T): tokens that the model reads, int64; those it should say next, int64; which of the first are no
    padding, bool; which of the second count, bool. Windows that are scored alone have one target less than tokens."""

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor

    def batches(self, size: int) -> Iterator[Windows]:
        """At most `size` windows at a time, no wider than the longest of them."""
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            width = int(self.mask[rows].sum(1).max())
            yield Windows(*(part[rows, :width] for part in (self.tokens, self.targets, self.mask, self.counted)))


@dataclass(frozen=True)
class Sums:
    """Of each window, fp64 (n,): nll in nats, summed over the tokens that count, and their number; and, against a
    dense model, the sum of KL(dense || model) and the number of tokens of which both find the same one likeliest.

    each: nll of every target of one batch, 0 where it does not count, fp64 (n, T); None for several batches together.
    """

    nll: torch.Tensor
    tokens: torch.Tensor
    kl: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    each: torch.Tensor | None = None


Logits = Callable[[Windows], torch.Tensor]  # what a model says after every token of a batch: (b, T, V)


def windows(texts: Sequence[torch.Tensor], window: int, stride: int | None = None) -> Windows:
    """The windows of each text. texts: int64 (tokens,) each, of any length; stride: default: window.

    Raises InputError for a stride outside 1 to window, and if no text holds two tokens.
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
    """(start, stop, new): the model reads tokens start to stop - 1; what follows token `new` and later ones counts."""
    new = start = 0
    while new < length - 1:
        stop = min(start + window, length - 1)
        yield start, stop, new
        new, start = stop, start + stride


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats, fp64 on the CPU: (b, T). logits (b, T, V), targets (b, T)."""
    rows = [nn.functional.cross_entropy(own.float(), wanted, reduction="none")
            for own, wanted in zip(logits, targets.to(logits.device), strict=True)]  # fmt: skip
    return torch.stack(rows).double().cpu()


def log_softmax(logits: torch.Tensor) -> list[torch.Tensor]:
    """fp32 log-probabilities, window by window: (b, T, V) -> b times (T, V)."""
    return [row.float().log_softmax(-1) for row in logits]


def alone(tokens: torch.Tensor, mask: torch.Tensor) -> Windows:
    """Windows that are scored alone: each token is the target of the one before it. Padding predicts nothing.

    tokens int64, mask bool, both (b, T); the targets are (b, T-1).
    """
    return Windows(tokens, tokens[:, 1:], mask, mask[:, 1:] & mask[:, :-1])


def logits_of(model: nn.Module) -> Logits:
    """What a model says of a batch."""
    return lambda batch: forward(model, batch.tokens, batch.mask, use_cache=False).logits


@torch.no_grad()
def losses_by_batch(
    batches: Iterable[Windows], versions: Sequence[Logits], dense: Logits | None = None, *, of_dense: bool = True
) -> Iterator[tuple[Sums | None, list[Sums]]]:
    """Compute the losses of a dense model and of versions of it, batch by batch: the only place that does.

    Yields, for each batch, the sums of the dense model (None without one, or without `of_dense`) and those of every
    version, against the dense model where there is one. The dense model runs once on each batch, before the versions.
    """
    for batch in batches:
        width = batch.targets.shape[1]
        own = logp = None
        if dense is not None:
            logits = dense(batch)[:, :width]
            own = sums(logits, batch.targets, batch.counted) if of_dense else None
            logp = log_softmax(logits)
            del logits
        yield own, [sums(version(batch)[:, :width], batch.targets, batch.counted, logp) for version in versions]


def sums(
    logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, dense: Sequence[torch.Tensor] | None = None
) -> Sums:
    """What logits (b, T, V) are worth on targets, int64 (b, T), where `counted`, bool (b, T), is True.

    dense: `log_softmax` of another model's logits for the same windows. Window by window, for fp32 logits are wide.
    """
    where = counted.cpu()
    each = token_nll(logits, targets).where(where, 0.0)
    nll = each.sum(1)
    if dense is None:
        return Sums(nll, where.sum(1).double(), each=each)
    found = []
    for own, theirs, row in zip(logits, dense, counted.to(logits.device), strict=True):
        q, p = own[row].float().log_softmax(-1), theirs[row]  # (tokens that count, V)
        same = q.argmax(-1) == p.argmax(-1)
        found.append(torch.stack([(p.exp() * (p - q)).sum(-1).double().sum(), same.double().sum()]).cpu())
    kl, agreement = torch.stack(found, 1)
    return Sums(nll, where.sum(1).double(), kl, agreement, each)


def joined(parts: Sequence[Sums]) -> Sums:
    """Sums of several batches as those of one."""
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
    """The batches; before each, `progress` is told how many steps are done."""
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
    """Sums of a model, and of the model that it is compared with (None without): both see the same batches."""
    own, theirs = [], []
    batches = watched(data.batches(batch_size), progress, phase, len(data.tokens), batch_size)
    for dense, (found,) in losses_by_batch(
        batches, [logits_of(model)], None if against is None else logits_of(against)
    ):
        own.append(found)
        if dense is not None:
            theirs.append(dense)
    return joined(own), joined(theirs) if theirs else None


def losses(
    model: nn.Module, data: Windows, batch_size: int, progress: Progress | None = None, phase: str = "perplexity"
) -> torch.Tensor:
    """The nll of every target, 0 where it does not count: fp64 (n, T), on the CPU."""
    found = torch.zeros(data.targets.shape, dtype=torch.float64)
    batches = watched(data.batches(batch_size), progress, phase, len(found), batch_size)
    done = 0
    for _, (own,) in losses_by_batch(batches, [logits_of(model)]):
        assert own.each is not None
        size, width = own.each.shape
        found[done : done + size, :width] = own.each
        done += size
    return found
