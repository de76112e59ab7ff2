"""Evaluate: measure a model with confidence intervals, alone or against another on the same tokens and items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.documents import Reading
from sspruner.calibrate.encode import encode, source_name
from sspruner.calibrate.sample import sample_from
from sspruner.calibrate.seen import refuse_seen, seen_of
from sspruner.calibrate.sources import Progress, micro_batch_size
from sspruner.compute.device import check_whole, on_device, resolve_device
from sspruner.compute.forward import check_predicts_tokens, embedding
from sspruner.compute.quick import quick_on_cpu
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError
from sspruner.evaluation import paired
from sspruner.evaluation.harness import TaskMetric, check_harness, run_tasks
from sspruner.evaluation.last_word import Passage, last_words, passages, read_passages
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.passkey import passkeys
from sspruner.evaluation.recall import recall, tasks_for
from sspruner.evaluation.result import Evaluation, Row
from sspruner.evaluation.rows import means, perplexities, row
from sspruner.evaluation.stored_state import every_of, stored_state
from sspruner.evaluation.windows import losses, measure, windows
from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.measure import EvaluateOptions, Measures, TextWindows

SHORTEST = 128  # tokens: the shortest length, and the end of the first range of positions
RECALL_SEQUENCES = 64
PASSKEY_SHORTEST = 256


Both = tuple[nn.Module, nn.Module | None]


@undisturbed
@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    options: EvaluateOptions | None = None,
    *,
    against: nn.Module | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    **short: Any,
) -> Evaluation:
    """Measure a model, optionally together with `against`, a model with the same vocabulary. Neither is changed.

    Args:
        tokenizer: tokenizer that reads text; also needed for passkeys and tasks.
        options: `EvaluateOptions`; or its fields as `short` arguments: `evaluate(model, tokenizer, text="t.txt",
            tokens=4096)`. `text` may also be tokens, int64 (texts, T), or anything else that `sspruner.calibration`
            takes; the first `tokens` tokens in all are measured. `limit` LAMBADA passages are drawn with the seed.
            Default metrics: all that can be measured; with `state_dtype` none.
        against: the model to compare with, usually the dense one. With text "self", the text is sampled from it.
        device: the compute device; CUDA if there is one, else the CPU.
        progress: called with (phase, done, total).

    Raises:
        InputError: for invalid arguments, and for texts that are too short.
    """
    options = recipe_or_short(EvaluateOptions, options, short)
    measures, text, seed, chosen = options.measures, options.windows, options.measures.seed, options.chosen
    notes: list[str] = []
    _check(model, against, tokenizer, measures)
    both: Both = (model, against)
    lambada = measures.lambada
    lambada_passages = [] if lambada is None else passages(tokenizer, read_passages(str(lambada)), measures.limit, seed)
    passkey_passages = _passkeys(tokenizer, chosen, text.max_length, seed, measures.metrics is not None, notes)
    compute = resolve_device(device)
    every = every_of(options.state, model)
    storage: dict[str, Any] = {}
    rows: list[Row] = []
    by_position: dict[str, Row] = {}
    by_length: dict[str, Row] = {}
    by_state: dict[str, Row] = {}
    pairs = 0
    with ExitStack() as stack:
        for each in (model, against):
            if each is not None:
                stack.enter_context(on_device(each, compute))
                stack.enter_context(quick_on_cpu(each, compute))
        if {"perplexity", "position", "length"} & set(chosen) or every:
            texts = _texts(text, both, tokenizer, seed, progress)
            if "perplexity" in chosen:
                rows += _perplexity(both, texts, text.max_length, text.step, seed, progress)
            if {"position", "length"} & set(chosen):
                positions, lengths = _by_length(both, texts, text.max_length, "length" in chosen, seed, progress)
                by_position = positions if "position" in chosen else {}
                by_length = lengths if "length" in chosen else {}
            if every:
                data = windows(texts, text.max_length, text.step)
                by_state, storage = stored_state(both, data, options.state, every, seed, progress)
        if lambada_passages:
            rows += _passages(both, "lambada", lambada_passages, seed, progress)
        if "recall" in chosen:
            queries = tasks_for(model, RECALL_SEQUENCES, seed)
            pairs = queries.shape[1] // 4
            rows += _recall(both, queries, seed, progress)
        if passkey_passages:
            rows += _passages(both, "passkey", passkey_passages, seed, progress)
        if measures.tasks:
            rows += _tasks(both, tokenizer, measures, progress)
    protocol = _protocol(both, options, pairs, len(passkey_passages), compute) | {"state": storage or None}
    against_name = None if against is None else ""
    return Evaluation("", against_name, protocol, tuple(rows), by_position, by_length, tuple(notes), by_state)


def _protocol(both: Both, options: EvaluateOptions, pairs: int, passkeys: int, device: torch.device) -> dict[str, Any]:
    """Return the protocol of all measurements. pairs: in a sequence of recall; passkeys: number of passages."""
    model, against = both
    measures, text = options.measures, options.windows
    return {
        "text": source_name(text.text),
        "text_from": ("dense" if against is not None else "model") if source_name(text.text) == "self" else None,
        "tokens": text.tokens,
        "window": text.max_length,
        "stride": text.step,
        "first_token_of_a_text": "context only",
        "special_tokens_added": False,
        "lambada": None if measures.lambada is None else str(measures.lambada),
        "limit": measures.limit,
        "tasks": list(measures.tasks),
        "recall": {"sequences": RECALL_SEQUENCES, "pairs": pairs} if pairs else None,
        "passkey": {"passages": passkeys} if passkeys else None,
        "interval": f"95 %, bootstrap of {paired.RESAMPLES} over windows or items; shares of items: Wilson",
        "seed": measures.seed,
        "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _perplexity(
    both: Both, texts: list[torch.Tensor], window: int, stride: int, seed: int, progress: Progress | None
) -> list[Row]:
    model, against = both
    ours, theirs = measure(model, windows(texts, window, stride), _batch(window), against, progress)
    n = len(ours.nll)
    rows = [perplexities("perplexity", ours.nll, None if theirs is None else theirs.nll, ours.tokens, seed, n)]
    for metric, part in (("kl_to_dense", ours.kl), ("top1_agreement", ours.agreement)):
        if part is not None:
            rows.append(Row(metric, paired.rate(part, ours.tokens, seed), None, None, "difference", n))
    return rows


def _by_length(
    both: Both, texts: list[torch.Tensor], longest: int, shorter: bool, seed: int, progress: Progress | None
) -> tuple[dict[str, Row], dict[str, Row]]:
    """Measure perplexity by position in windows of the greatest length, and by length; windows lie end to end."""
    model, against = both
    edges = _lengths(SHORTEST, min(longest, max(len(text) for text in texts) - 1))
    positions: dict[str, Row] = {}
    lengths: dict[str, Row] = {}
    for length in edges if shorter else edges[-1:]:
        data = windows(texts, length)
        phase = f"windows of {length}"
        ours = losses(model, data, _batch(length), progress, phase)
        theirs = None if against is None else losses(against, data, _batch(length), progress, phase)
        lengths[str(length)] = _bucket(ours, theirs, data.counted, seed)
    for first, last in zip([0, *edges], edges, strict=False):
        here = slice(first, last)
        positions[f"{first}-{last - 1}"] = _bucket(
            ours[:, here], None if theirs is None else theirs[:, here], data.counted[:, here], seed
        )
    return positions, lengths


def _bucket(nll: torch.Tensor, against: torch.Tensor | None, counted: torch.Tensor, seed: int) -> Row:
    """Return a row from the nll of tokens, (windows, T).

    Windows that end before this range of positions have no tokens.
    """
    count = counted.sum(1)
    return perplexities(
        "perplexity", nll.sum(1), None if against is None else against.sum(1), count, seed, int((count > 0).sum())
    )


def _passages(both: Both, name: str, items: list[Passage], seed: int, progress: Progress | None) -> list[Row]:
    """Measure accuracy, nll and, for LAMBADA, perplexity of the last words of passages."""
    model, against = both
    _check_unseen(both, (torch.tensor(passage.context + passage.word) for passage in items), name)
    size = _batch(max(len(passage.context) + len(passage.word) for passage in items))
    if progress:
        progress(name, 0, 2)
    nll, hits = last_words(model, items, size)
    if progress:
        progress(name, 1, 2)
    their_nll, their_hits = (None, None) if against is None else last_words(against, items, size)
    rows = [
        means(f"{name}_accuracy", hits, their_hits, seed, paired.share),
        means(f"{name}_nll", nll, their_nll, seed),
    ]
    if name == "lambada":
        rows.append(perplexities("lambada_perplexity", nll, their_nll, torch.ones(len(nll)), seed, len(nll)))
    return rows


def _recall(both: Both, tokens: torch.Tensor, seed: int, progress: Progress | None) -> list[Row]:
    _check_unseen(both, tokens, f"recall sequences of seed {seed}")
    if progress:
        progress("recall", 0, 1)
    ours, theirs = (None if each is None else recall(each, tokens, _batch(tokens.shape[1])) for each in both)
    assert ours is not None
    accuracy, nll = (None, None) if theirs is None else theirs
    return [means("recall_accuracy", ours[0], accuracy, seed), means("recall_nll", ours[1], nll, seed)]


def _passkeys(
    tokenizer: Any, chosen: Sequence[str], max_length: int, seed: int, named: bool, notes: list[str]
) -> list[Passage]:
    """Return the passkey passages. If there can be none: raise if the user named the metric, else add a note."""
    if "passkey" not in chosen:
        return []
    try:
        if tokenizer is None:
            raise InputError("passkey: needs a tokenizer, and this model has none")
        return passkeys(tokenizer, _lengths(min(PASSKEY_SHORTEST, max_length), max_length), seed=seed)
    except InputError as error:
        if named:
            raise
        notes.append(f"left out: {error}")
        return []


def _tasks(both: Both, tokenizer: Any, measures: Measures, progress: Progress | None) -> list[Row]:
    results: list[list[TaskMetric] | None] = []
    how: dict[str, Any] = {"limit": measures.limit, "include_path": measures.include_path}
    for each in both:
        if progress:
            progress("lm-eval", len(results), 2)
        results.append(None if each is None else run_tasks(each, tokenizer, measures.tasks, **how))
    ours, theirs = results
    assert ours is not None
    return [_task_row(m, None if theirs is None else theirs[i], measures.seed) for i, m in enumerate(ours)]


def _task_row(ours: TaskMetric, theirs: TaskMetric | None, seed: int) -> Row:
    if ours.part is None or ours.count is None or (theirs is not None and theirs.part is None):
        return Row(
            ours.name, _normal(ours), None if theirs is None else _normal(theirs), None, "difference", ours.items
        )
    other = None if theirs is None else theirs.part
    if ours.is_perplexity:
        return perplexities(ours.name, ours.part, other, ours.count, seed, ours.items)
    part, count = ours.part, ours.count
    return row(ours.name, part, other, lambda each: paired.rate(each, count, seed),
                lambda their: paired.rate(part - their, count, seed), items=ours.items)  # fmt: skip


def _normal(metric: TaskMetric) -> Interval:
    """Return an interval from lm-eval's standard error; unknown (NaN) without one."""
    half = paired.WILSON_Z * metric.stderr
    return Interval(metric.value, metric.value - half, metric.value + half)


def _texts(text: TextWindows, both: Both, tokenizer: Any, seed: int, progress: Progress | None) -> list[torch.Tensor]:
    """Return texts as tokens, int64 (T,) each, `text.tokens` tokens in all."""
    model, against = both
    source, tokens, length = text.text, text.tokens, text.max_length
    if isinstance(source, torch.Tensor):
        if source.ndim != 2 or source.shape[1] < 2 or not len(source):
            raise InputError(f"text: tokens of shape {tuple(source.shape)}; expected (texts, tokens >= 2)")
        texts = list(source.cpu().long())
    elif isinstance(source, str) and source == "self":
        report = None if progress is None else lambda _, done, total: progress("sampling text", done, total)
        count = max(1, tokens // length)
        texts = list(sample_from(against or model, count, length + 1, seed=seed, progress=report))
        tokens = count * (length + 1)  # the first token of each is not measured
    else:
        texts = encode(source, tokenizer, Reading("text", text.text_column, tokenizer), tokens, tokens).sequences
    kept = []
    for ids in texts:
        ids = ids[: max(0, tokens)]
        tokens -= len(ids)
        if len(ids) > 1:
            kept.append(ids)
    if not kept:
        raise InputError(f"text {source_name(source)}: shorter than two tokens")
    low, high = (int(getattr(torch.cat(kept), end)()) for end in ("min", "max"))
    vocabulary = embedding(model).num_embeddings
    if low < 0 or high >= vocabulary:
        raise InputError(f"text: token id {high if low >= 0 else low} outside the vocabulary (0 to {vocabulary - 1}); "
                         "is this the model's own tokenizer?")  # fmt: skip
    _check_unseen(both, kept, f"text {source_name(source)}", length)
    return kept


def _check_unseen(both: Both, windows: Iterable[torch.Tensor], what: str, length: int | None = None) -> None:
    """Raise InputError if a cut of one of the models was calibrated on text that is to be measured."""
    model, against = both
    seen = seen_of(model) if against is None else seen_of(model) | seen_of(against)
    if seen:
        refuse_seen(seen, windows, what, length)


def _lengths(first: int, last: int) -> list[int]:
    """Return first, its doubles below last, and last."""
    return [*(first * 2**i for i in range(64) if first * 2**i < last), last]


def _batch(length: int) -> int:
    return micro_batch_size(length, logits=True)


def _check(model: nn.Module, against: nn.Module | None, tokenizer: Any, measures: Measures) -> None:
    """Raise InputError for invalid arguments, before any work."""
    if tokenizer is None and (measures.lambada is not None or measures.tasks):
        what = "lambada" if measures.lambada is not None else "tasks"
        raise InputError(f"{what}: needs a tokenizer, and this model has none")
    for each in (model, against):
        if each is not None:
            check_whole(each, "evaluate")
            check_predicts_tokens(each, "evaluate")
    if measures.tasks:
        check_harness()
    if against is not None:
        sizes = [embedding(each).num_embeddings for each in (model, against)]
        if sizes[0] != sizes[1]:
            raise InputError(f"against: its vocabulary has {sizes[1]} tokens, the model's {sizes[0]}: not comparable")
