"""Make token windows from a calibration source, split into an observed and a held-out part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.arrays import as_numbers, input_of, is_arrays, read_arrays, values_for
from sspruner.calibrate.documents import Reading
from sspruner.calibrate.encode import encode
from sspruner.calibrate.sample import sample_from
from sspruner.calibrate.seen import Seen, refuse_seen, seen_of
from sspruner.compute.forward import embedding
from sspruner.compute.inputs import reads_tokens
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError
from sspruner.recipes.parts import CalibrationText, check_size
from sspruner.recipes.texts import seed_in_64_bits

TOKENS_PER_BATCH = 4096  # tokens in one micro-batch
HELD_OUT = 16  # windows that are held out to report damage, unless the user says how many

Progress = Callable[[str, int, int], None]  # (phase, done, total)


@dataclass(frozen=True)
class Calibration:
    """Token windows of a calibration source, or windows of the values that a model reads instead.

    tokens, mask            int64 and bool (S, T): the observed windows; mask is False where padding. Of values fp32
                            (S, T, ...)
    held_out, held_out_mask the same for windows (S', T) that only serve to report damage
    source, seed            name of the source, and the seed of the draw
    held_out_is_separate    False when the source holds a single sequence, or repeats itself in every held-out window
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    held_out: torch.Tensor
    held_out_mask: torch.Tensor
    source: str
    seed: int
    held_out_is_separate: bool

    @property
    def seen(self) -> Seen:
        """Return the hashes of the observed windows."""
        return Seen.of(self.tokens, self.mask)

    def batches(self, size: int | None = None, *, logits: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (tokens, mask), both (b, T), in micro-batches of `size` sequences; by default of `micro_batch_size`."""
        yield from _batches(self.tokens, self.mask, size or micro_batch_size(self.tokens.shape[1], logits=logits))

    def held_out_batches(self, size: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield held-out (tokens, mask), both (b, T), in micro-batches small enough for the logits of two models."""
        yield from _batches(
            self.held_out, self.held_out_mask, size or micro_batch_size(self.held_out.shape[1], logits=True)
        )


def nothing(seed: int) -> Calibration:
    """Return a calibration without windows, for scorers that read weights alone."""
    tokens, mask = torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
    return Calibration(tokens, mask, tokens, mask, "none", seed, True)


def micro_batch_size(seq_len: int, *, logits: bool = False) -> int:
    """Return the micro-batch size per process, in sequences.

    logits: half the size, since the logits of the dense and of the pruned model are in memory at the same time.
    """
    return max(1, TOKENS_PER_BATCH // (2 if logits else 1) // max(seq_len, 1))


def _batches(tokens: torch.Tensor, mask: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size], mask[start : start + size]


@undisturbed
# Ten parameters: it is the public door for text of every kind; `mask` and `text_column` are for some of them.
def calibration(
    source: Any,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    samples: int = 32,
    seq_len: int = 256,
    held_out: int = HELD_OUT,
    seed: int = 0,
    mask: torch.Tensor | None = None,
    text_column: str = "",
    progress: Progress | None = None,
) -> Calibration:
    """Make calibration windows from any source.

    source: "self" (sampled from the model); "page" (two chapters of a novel that ship); a file of plain text, JSON
    lines, JSON, CSV, TSV, Parquet or Arrow; a folder of such files, or one that `save_to_disk` wrote; the name of a
    `datasets` dataset as NAME[:CONFIG[:SPLIT]]; token ids int64 (S, T), with an optional bool mask (S, T) that is False
    where padding. Or any iterable: of strings or of token ids (each a sequence, padded on the right), of rows with a
    column of text, of conversations. An .npz file: the array with the name of the argument that the model reads. For a
    model that reads no token ids: the values themselves, (S, T, ...), or such a file.

    Takes `samples` windows to observe and `held_out` others; if there are fewer, a quarter is held out, or none with
    held_out=0. Windows that repeat observed text, or text that an earlier cut of the model observed, are not held out,
    unless all do. text_column: the column of a row's text; default `text`, else `messages`.
    Raises InputError if the source is missing, empty, too short, not text, or does not fit the vocabulary.
    """
    check_size(samples, seq_len, held_out)
    text = CalibrationText(samples=samples, seq_len=seq_len, text_column=text_column)
    if mask is not None and _as_tokens(source) is None:
        raise InputError("calibration mask: belongs to token ids (S, T); other sources say themselves where padding is")
    tokens, own, name = _drawn(source, model, tokenizer, text, (held_out, 0), seed, progress)
    mask = own if mask is None else mask
    _check(tokens, mask, model, name)
    # Copies, since tokens made in inference mode would forbid gradients.
    found = _split(as_numbers(tokens), mask.cpu().bool().clone(), samples, held_out, name, seed)
    return _unseen(found, seen_of(model))


@undisturbed
def with_more(
    source: Any,
    model: nn.Module,
    tokenizer: Any,
    text: CalibrationText,
    more: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Calibration, Calibration]:
    """Return the calibration of a text, and one with up to `more` other windows of it, which a refit reads.

    The first is what it is without them, held-out windows included; the second holds out the same.
    """
    tokens, mask, name = _drawn(source, model, tokenizer, text, (HELD_OUT, more), seed, progress)
    _check(tokens, mask, model, name)
    tokens, mask = as_numbers(tokens), mask.cpu().bool().clone()
    alone = len(tokens) if name == "tokens" else text.samples + HELD_OUT  # of a text no more are drawn
    few = _split(tokens[:alone], mask[:alone], text.samples, HELD_OUT, name, seed)
    apart = torch.ones(len(tokens), dtype=torch.bool)
    apart[: len(few.tokens)] = False
    apart[len(tokens[:alone]) - len(few.held_out) : alone] = False
    few = _unseen(few, seen_of(model))
    if few.held_out_is_separate:
        apart &= ~Seen.of(few.held_out, few.held_out_mask).among(tokens, mask)
    rest = apart.nonzero().flatten()[:more]
    parts = (torch.cat([few.tokens, tokens[rest]]), torch.cat([few.mask, mask[rest]]))
    return few, replace(few, tokens=parts[0], mask=parts[1])


def _drawn(
    source: Any,
    model: nn.Module,
    tokenizer: Any,
    text: CalibrationText,
    beside: tuple[int, int],
    seed: int,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return windows of a source, (S, T), where they are no padding, and the source's name.

    beside: how many windows to draw for each purpose beside the samples; those of the second do not change the others.
    """
    seed_in_64_bits(seed, "seed")
    held_out, more = beside
    wanted, mask, file = text.samples + held_out + more, None, str(source) if is_arrays(source) else ""
    if file:
        source = input_of(read_arrays(file, "calibration"), model, f"calibration {file}")
    if not reads_tokens(model):
        name = file or "values"
        tokens = values_for(source, model, f"calibration {file}".rstrip())
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    elif (given := _as_tokens(source)) is not None:
        name, tokens = file or "tokens", given
    elif isinstance(source, str) and source == "self":
        name = "self"
        counts = text.samples + (held_out or HELD_OUT), more  # the same whether or not some of it is held out
        parts = [
            sample_from(model, count, text.seq_len, seed=seed + number, progress=progress)
            for number, count in enumerate(counts)
            if count
        ]
        tokens = torch.cat(parts)
    else:
        reading = Reading("calibration", text.text_column, tokenizer)
        found = encode(source, tokenizer, reading, wanted, wanted * text.seq_len)
        name = found.name
        if found.running:
            tokens = _windows(found.sequences[0], text.seq_len, wanted, seed, name)
        else:
            tokens, mask = _pad([ids for ids in found.sequences if len(ids) > 1], text.seq_len, name)
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask, name


def _as_tokens(source: Any) -> torch.Tensor | None:
    """Return a tensor, or an array of numbers, as tokens (S, T); None for other sources."""
    if not hasattr(source, "ndim") or getattr(source, "dtype", None) is None:
        return None
    if not isinstance(source, torch.Tensor):
        if source.dtype.kind not in "iu":
            return None
        source = torch.as_tensor(source).long()
    tokens: torch.Tensor = source
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise InputError(f"calibration tokens have shape {tuple(tokens.shape)}; expected (sequences, tokens >= 2)")
    return tokens


def _split(
    tokens: torch.Tensor, mask: torch.Tensor, samples: int, held_out: int, source: str, seed: int
) -> Calibration:
    """Hold out the last `held_out` windows, or a quarter of all when there are too few."""
    n = len(tokens)
    if n < samples + held_out:
        held_out = min(held_out, max(1, n // 4))
    separate = n > 1 and held_out > 0
    kept_out = slice(n - held_out, n) if separate else slice(0, 1)
    observed = slice(0, min(samples, n - held_out) if separate else samples)
    return Calibration(tokens[observed], mask[observed], tokens[kept_out], mask[kept_out], source, seed, separate)


def _unseen(data: Calibration, earlier: Seen) -> Calibration:
    """Hold out only windows that repeat no observed text; if all do, the result says that they are not separate.

    earlier: text that earlier cuts of the model observed.
    """
    if not data.held_out_is_separate:
        return data
    seen = (data.seen | earlier).among(data.held_out, data.held_out_mask)
    if seen.all():
        return replace(data, held_out_is_separate=False)
    return replace(data, held_out=data.held_out[~seen], held_out_mask=data.held_out_mask[~seen])


def check_held_out(model: Any, *observed: Calibration) -> None:
    """Raise InputError if held-out windows repeat text that was observed, now or by an earlier cut of the model.

    observed: calibrations with the same held-out windows.
    """
    first, seen = observed[0], seen_of(model)
    for each in observed:
        seen |= each.seen
    if first.held_out_is_separate:
        windows = (row[kept] for row, kept in zip(first.held_out, first.held_out_mask, strict=True))
        refuse_seen(seen, windows, f"held-out text of {first.source}")


def _pad(sequences: list[torch.Tensor], seq_len: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, mask), truncated to seq_len and padded on the right with 0."""
    if not sequences:
        raise InputError(f"calibration {name}: every one is shorter than 2 tokens")
    width = min(seq_len, max(map(len, sequences)))
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        ids = ids[:width]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask


def _windows(ids: torch.Tensor, seq_len: int, count: int, seed: int, name: str) -> torch.Tensor:
    """Draw up to `count` non-overlapping windows of a text, int64 (tokens,): (S, seq_len)."""
    if len(ids) < seq_len:
        raise InputError(f"calibration {name}: {len(ids)} tokens, shorter than one sequence of --seq-len {seq_len}")
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _check(tokens: torch.Tensor, mask: torch.Tensor, model: nn.Module, name: str) -> None:
    if reads_tokens(model):
        if tokens.is_floating_point():
            raise InputError(f"calibration {name}: values of type {tokens.dtype}; token ids are whole numbers")
        vocabulary = embedding(model).num_embeddings
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise InputError(f"calibration {name}: token id {high if low >= 0 else low} outside the vocabulary (0 to "
                             f"{vocabulary - 1}); is this the model's own tokenizer?")  # fmt: skip
    if mask.shape != tokens.shape[:2]:
        raise InputError(f"calibration mask has shape {tuple(mask.shape)}, its tokens {tuple(tokens.shape)}")
    if not mask.any():
        raise InputError(f"calibration {name}: the mask leaves no token")
