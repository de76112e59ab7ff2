"""Perplexity by position, far beyond the length that was calibrated on: does a smaller state forget what is far back?

The rows are those of recipes/last_words.yaml. Scores from 8,192 tokens of books-val.txt in windows of 128 and of 256
tokens; measured on windows of 2,048 tokens of books-test.txt. A cell is the perplexity of the cut model over that of
the dense one at the same positions.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Made, Subject, progress, ratio, table
from experiment import Experiment

from sspruner.evaluation.damage import log_probabilities

CALIBRATED, LENGTHS, LENGTH, WINDOWS = 8192, (128, 256), 2048, 8
ENDS = (128, 256, 512, 1024, 2048)


@torch.no_grad()
def losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each predicted token, nats: fp64 (windows, T - 1)."""
    logps = [log_probabilities(model, window, torch.ones_like(window)) for window in windows.split(1)]
    pairs = zip(logps, windows.split(1), strict=True)
    return torch.cat([-logp.gather(-1, window[:, 1:, None]).squeeze(-1).double() for logp, window in pairs])


def buckets(values: torch.Tensor) -> list[torch.Tensor]:
    """Return means over runs of positions, by window: [(windows,)]."""
    starts = (0, *ENDS[:-1])
    return [values[:, max(start - 1, 0) : end - 1].mean(1) for start, end in zip(starts, ENDS, strict=True)]


def tables(s: Any) -> Made:
    """Return a table for each model."""
    texts, numbers = [], {}
    (section,) = Experiment.load(s.file.parent.parent / "recipes/last_words.yaml").sections
    for name in section.models[: 1 if s.quick else None]:
        subject = Subject(name, s.data)
        windows = subject.text("books-test.txt", 2 if s.quick else WINDOWS, LENGTH).tokens
        dense, found = losses(subject.model, windows), []
        for length in LENGTHS:
            data = subject.text("books-val.txt", CALIBRATED // length, length)
            for row, how in section.rows_of(name).items():
                for cut, budget in section.cuts_of(how).items():
                    plan = subject.plan(data, how["scorer"], axis="state", **budget)
                    with subject.masked(plan)():
                        more = buckets(losses(subject.model, windows) - dense)
                    found.append([f"{row}, {cut}, calibrated at {length}", *map(ratio, more)])
                    numbers.setdefault(name, {})[found[-1][0]] = [float(values.mean().exp()) for values in more]
                    progress(" | ".join(found[-1]))
        by_position = [f"{float(values.mean().exp()):.2f}" for values in buckets(dense)]
        head = ["cut", *[f"{a + 1} to {b}" for a, b in zip((0, *ENDS[:-1]), ENDS, strict=True)]]
        title = f"{name}: perplexity over the dense model's, by position (95 % interval over windows)"
        texts.append(table(title, head, [["dense, perplexity", *by_position], *found]))
    note = f"seed 0; {CALIBRATED} tokens observed, {WINDOWS} windows of {LENGTH} reported; one-shot scores"
    return "\n\n".join(texts), note, numbers
