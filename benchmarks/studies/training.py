"""What distil.py, gradual.py and twist.py share: a model, its texts, and rows that are made once and kept in a folder.

A row is a JSON file with what was asked for and the negative log-likelihood of every window; it is made again if what
was asked for changed. Changes of the engine are not noticed: remove the folder. A run that was interrupted goes on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import Subject, by_token, file_name, kept, progress
from common import ratio as interval

import sspruner
from sspruner.recipes.train import Settings
from sspruner.training.distil import distil
from sspruner.training.text import Text

MODEL, SEED = "mamba2-books-4m", 0
SIZES = {"observed": 32, "reported": 64, "chosen": 32}  # windows: of books-val, of books-test, of other books-val
SEQ_LEN, BATCH, AT_ONCE, EVERY = 256, 8, 4, 20
CHOSEN_RATES = {"head": 3e-4, "state": 3e-4, "weight": 3e-4}  # distil.py chose the first two, and says how
Row = dict[str, Any]


class Bench:
    """The dense model, the windows it is measured on, the text to train on, and the folder of rows."""

    def __init__(self, s: Any) -> None:
        self.subject, self.results, self.data = Subject(MODEL, s.data), Path(s.results), s.data
        self.dense, self.tokenizer = self.subject.model, self.subject.tokenizer
        self.sizes = dict.fromkeys(SIZES, 2) if s.quick else SIZES
        self.observed = self.subject.text("books-val.txt", self.sizes["observed"])
        self.reported = self.subject.text("books-test.txt", self.sizes["reported"])
        self.chosen = self.subject.text("books-val.txt", self.sizes["chosen"], seed=1)
        self.text = Text((str(s.data / "books-train.txt"),), self.tokenizer, SEQ_LEN, seed=SEED)
        self.cuts: dict[str, Any] = {}

    def cut(self, cut: Row) -> Any:
        """Return a copy of the dense model under a cut, by arguments of sspruner.prune; dense without any."""
        key = json.dumps(cut)
        if key not in self.cuts:
            self.cuts[key] = copy.deepcopy(self.dense)
            if cut:
                sspruner.prune(self.cuts[key], calibration=self.observed, seed=SEED, **cut)
        return copy.deepcopy(self.cuts[key])

    def settings(self, tokens: int, rate: float) -> Settings:
        """Return the settings of a run."""
        how: dict[str, Any] = {"batch": BATCH, "at_once": AT_ONCE, "seq_len": SEQ_LEN, "every": EVERY, "seed": SEED}
        return Settings(max_tokens=tokens, learning_rate=rate, **how)

    def row(self, label: str, asked: Row, make: Callable[[Path], tuple[Any, Row]]) -> Row:
        """Return a row from its file, or make it. make: the folder of a run -> the model, and what else to keep."""

        def new() -> Row:
            run = self.results / f"run-{hashlib.sha256(json.dumps([label, asked]).encode()).hexdigest()[:12]}"
            model, more = make(run)
            row = {"label": label, **more, "nll": self.nll(model), "chosen": self.nll(model, self.chosen)}
            shutil.rmtree(run, ignore_errors=True)
            progress(f"{label}: {perplexity(row):.2f}, on books-val {perplexity(row, 'chosen'):.2f}")
            return row

        self.results.mkdir(parents=True, exist_ok=True)
        return dict(kept(self.results / f"{file_name(label)}.json", asked | self.sizes, new))

    def nll(self, model: Any, text: Any = None) -> list[float]:
        """Return the negative log-likelihood of each window, nats per token."""
        (values,) = self.subject.measure([lambda: nullcontext(model)], text or self.reported)[1]
        return list(by_token(values)[0].tolist())

    def as_cut(self, label: str, cut: Row) -> Row:
        """Return the row of a cut, not trained."""
        return self.row(label, cut, lambda run: (self.cut(cut), {}))

    def distilled(self, label: str, cut: Row, tokens: int, rate: float, alpha: float = 0.5) -> Row:
        """Return the row of a cut that learned from the text and, if alpha is not 0, from the dense model."""
        settings = self.settings(tokens, rate)

        def make(run: Path) -> tuple[Any, Row]:
            student, teacher = self.cut(cut).requires_grad_(True), copy.deepcopy(self.dense)
            made, found = distil(student, teacher, self.text, run, settings=settings, alpha=alpha)
            return made, {"tokens": found.tokens, "seconds": round(found.seconds, 1)}

        asked = {"cut": cut, "alpha": alpha, **settings.identity()}
        return self.row(f"{label}, {tokens} tokens, {rate:g}", asked, make)

    def note(self) -> str:
        """Return the windows and steps, for provenance."""
        found = {name: f"{count} x {SEQ_LEN}" for name, count in self.sizes.items()}
        return (
            f"seed {SEED}, one run each; steps of {BATCH} x {SEQ_LEN} tokens; {found['observed']} tokens observed, "
            f"{found['chosen']} for choices, {found['reported']} reported"
        )


def perplexity(row: Row, of: str = "nll") -> float:
    """Return the perplexity of a row over its windows."""
    return math.exp(sum(row[of]) / len(row[of]))


def ratio(row: Row, against: Row) -> str:
    """Return perplexity over that of another row, with a paired 95 % interval over windows."""
    return interval(torch.tensor(row["nll"], dtype=torch.float64) - torch.tensor(against["nll"], dtype=torch.float64))


def speed(rows: list[Row]) -> str:
    """Return the tokens per second of the runs together, and minutes."""
    seconds, tokens = (sum(row.get(key, 0) for row in rows) for key in ("seconds", "tokens"))
    return f"{tokens:,} tokens trained on in {seconds / 60:.0f} minutes, {tokens / max(seconds, 1e-9):.0f} a second"
