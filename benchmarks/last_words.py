"""LAMBADA: the last word of a passage, whose beginning has to be remembered, by scorer and cut.

    python benchmarks/last_words.py --threads 1 --data ../shared/data --table docs/benchmarks.md

Scores from 32 x 256 tokens of books-val.txt. Models of this size hit almost no last word; how far off they are, the
negative log-likelihood of the true word, tells cuts apart all the same.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from common import MODELS, books, cuts, deliver, options, progress, provenance, state_cuts, table

import sspruner
from sspruner.evaluation.last_word import last_words, passages

WINDOWS, PASSAGES, SEED = 32, 300, 0


def spread(values: torch.Tensor, digits: int) -> str:
    """Mean ± standard error. values: (passages,)."""
    return f"{float(values.mean()):.{digits}f} ± {float(values.std()) / math.sqrt(len(values)):.{digits}f}"


def main() -> None:
    parser = options(__doc__, "last_words.py")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with (given.data / "lambada-test.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    parts: list[str] = []
    numbers: dict[str, Any] = {}
    for name in given.models[:1] if given.quick else given.models:
        model, tokenizer = sspruner.load(name, dtype="float32")
        asked = passages(tokenizer, texts, 20 if given.quick else PASSAGES, SEED)
        data = books(model, tokenizer, given.data / "books-val.txt", WINDOWS, seed=SEED)
        rows = state_cuts(name)
        nll, hit = last_words(model, asked)
        found = [["dense", spread(nll, 3), "", f"{100 * float(hit.double().mean()):.2f}"]]
        for (scorer, sparsity), plan in cuts(model, data, rows).items():
            with sspruner.masked(model, plan):
                own, right = last_words(model, asked)
            label = f"{scorer}, {sparsity:.0%}"
            found.append([label, spread(own, 3), spread(own - nll, 3), f"{100 * float(right.double().mean()):.2f}"])
            numbers.setdefault(name, {})[label] = float((own - nll).mean())
            progress(" | ".join(found[-1]))
        head = ["cut", "nats per last word", "more than dense, same passages", "hit, %"]
        parts.append(table(f"{name}: LAMBADA's last word", head, found))
    note = f"seed {SEED}; {WINDOWS} x 256 tokens observed, {PASSAGES} passages; ± standard error over these; one-shot"
    deliver(given, "last_words.py", "\n\n".join(parts) + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
