"""Make token windows from a calibration source, split into an observed and a held-out part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.sample import sample_from
from sspruner.compute.forward import embedding
from sspruner.errors import InputError
from sspruner.recipes.texts import seed_in_64_bits

TOKENS_PER_BATCH = 4096  # tokens in one micro-batch
TEXT_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".csv", ".text"}

Progress = Callable[[str, int, int], None]  # (phase, done, total)


@dataclass(frozen=True)
class Calibration:
    """Token windows of a calibration source.

    tokens, mask            int64 and bool (S, T): the observed windows; mask is False where padding
    held_out, held_out_mask the same for windows (S', T) that only serve to report damage
    source, seed            name of the source, and the seed of the draw
    held_out_is_separate    False only when the source holds a single sequence
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    held_out: torch.Tensor
    held_out_mask: torch.Tensor
    source: str
    seed: int
    held_out_is_separate: bool

    def batches(self, size: int | None = None, *, logits: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (tokens, mask), both (b, T), in micro-batches of `size` sequences; by default of `micro_batch_size`."""
        yield from _batches(self.tokens, self.mask, size or micro_batch_size(self.tokens.shape[1], logits=logits))

    def held_out_batches(self, size: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield held-out (tokens, mask), both (b, T), in micro-batches small enough for the logits of two models."""
        yield from _batches(
            self.held_out, self.held_out_mask, size or micro_batch_size(self.held_out.shape[1], logits=True)
        )


def micro_batch_size(seq_len: int, *, logits: bool = False) -> int:
    """Return the micro-batch size per process, in sequences.

    logits: half the size, since the logits of the dense and of the pruned model are in memory at the same time.
    """
    return max(1, TOKENS_PER_BATCH // (2 if logits else 1) // seq_len)


def _batches(tokens: torch.Tensor, mask: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size], mask[start : start + size]


# Nine parameters: it is the public door for text of every kind, and `mask` means something for one of them alone.
def calibration(
    source: str | Path | list[str] | torch.Tensor,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    samples: int = 32,
    seq_len: int = 256,
    held_out: int = 16,
    seed: int = 0,
    mask: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Make calibration windows from any source.

    source: "self" (sampled from the model), a UTF-8 text file, the name of a `datasets` dataset as
    NAME[:CONFIG[:SPLIT]] with a column `text`, a list of strings (each a sequence, padded on the right), or a
    token tensor int64 (S, T) with an optional bool mask (S, T) that is False where padding.

    Takes `samples` windows to observe and `held_out` others; if there are fewer, a quarter is held out.
    Raises InputError if the source is missing, empty, too short, not UTF-8, or does not fit the vocabulary.
    """
    if samples < 1 or seq_len < 2 or held_out < 0:
        raise InputError(f"samples={samples}, seq_len={seq_len}, held_out={held_out}: need at least 1, 2 and 0")
    seed_in_64_bits(seed, "seed")
    if isinstance(source, torch.Tensor):
        name, tokens = "tokens", source
        if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
            raise InputError(f"calibration tokens have shape {tuple(tokens.shape)}; expected (sequences, tokens >= 2)")
    elif isinstance(source, list):
        name = "strings"
        tokens, mask = _pad(_encode_all(source, _required(tokenizer)), seq_len)
    elif str(source) == "self":
        name = "self"
        tokens = sample_from(model, samples + held_out, seq_len, seed=seed, progress=progress)
    else:
        name = str(source)
        tokens = _windows(read_text(name), _required(tokenizer), seq_len, samples + held_out, seed, name)
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    _check(tokens, mask, model, name)
    return _split(tokens.cpu().long(), mask.cpu().bool(), samples, held_out, name, seed)


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


def _required(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InputError("calibration from text needs a tokenizer and this model has none; give tokens or 'self'")
    return tokenizer


def read_text(name: str, what: str = "calibration") -> str:
    """Return the text of a UTF-8 file, or the joined column `text` of a dataset. `what` names its purpose in errors."""
    if not name.strip():
        raise InputError(f"{what}: the name is empty; give self, a text file or a dataset")
    path = Path(name).expanduser()
    if path.is_file():
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{what} file {name}: not UTF-8 (byte {error.start}); convert it") from error
    elif path.suffix in TEXT_SUFFIXES:
        raise InputError(f"{what} file {name}: no such file")
    else:
        text = "\n\n".join(read_dataset(name, what))
    if not text.strip():
        raise InputError(f"{what} {name}: empty")
    return text


def read_dataset(name: str, what: str = "calibration", default_split: str = "train") -> list[str]:
    """Return the `text` column of a `datasets` dataset: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT."""
    import datasets

    path, config, split = [*name.split(":"), "", ""][:3]
    try:
        with quiet():
            rows = datasets.load_dataset(path, config or None, split=split or default_split)
    except Exception as error:  # the hub, a loader or a parser may fail in any way
        brief = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"{what} {name}: no such file, and datasets cannot load it: {brief}") from error
    if "text" not in rows.column_names:
        raise InputError(f"{what} {name}: no column 'text'; it has {', '.join(rows.column_names)}")
    texts = [text for text in rows["text"] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} {name}: its column 'text' holds {type(texts[0]).__name__}, not text")
    return texts


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences datasets' progress bars and log messages. Errors are raised."""
    import datasets

    silent, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _encode_all(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not any(t.strip() for t in texts):
        raise InputError("calibration strings: empty")
    return [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(ids) > 1]


def _pad(sequences: list[list[int]], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, mask), truncated to seq_len and padded on the right with 0."""
    if not sequences:
        raise InputError("calibration strings: every one is shorter than 2 tokens")
    width = min(seq_len, max(map(len, sequences)))
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        ids = ids[:width]
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return tokens, mask


def _windows(text: str, tokenizer: Any, seq_len: int, count: int, seed: int, name: str) -> torch.Tensor:
    """Draw up to `count` non-overlapping windows of a text: (S, seq_len)."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < seq_len:
        raise InputError(f"calibration {name}: {len(ids)} tokens, shorter than one sequence of --seq-len {seq_len}")
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _check(tokens: torch.Tensor, mask: torch.Tensor, model: nn.Module, name: str) -> None:
    vocabulary = embedding(model).num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"calibration {name}: token id {high if low >= 0 else low} outside the vocabulary (0 to "
                         f"{vocabulary - 1}); is this the model's own tokenizer?")  # fmt: skip
    if mask.shape != tokens.shape:
        raise InputError(f"calibration mask has shape {tuple(mask.shape)}, its tokens {tuple(tokens.shape)}")
    if not mask.any():
        raise InputError(f"calibration {name}: the mask leaves no token")
