"""What distil.py and gradual.py share: a model, its texts, and rows that are made once and kept in a folder.

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
from pathlib import Path
from typing import Any

import torch
from common import books, progress

import sspruner
from sspruner.evaluation import paired
from sspruner.evaluation.damage import log_probabilities
from sspruner.training.distil import distil
from sspruner.training.loop import Settings
from sspruner.training.text import Text

MODEL, SEED = "mamba2-books-4m", 0
OBSERVED, REPORTED, CHOSEN = 32, 64, 32  # windows: of books-val for scores, of books-test, of books-val for choices
CHOSEN_SEED = 1  # other windows of books-val than those observed
SEQ_LEN, BATCH, AT_ONCE, EVERY = 256, 8, 4, 20
CHOSEN_RATES = {"head": 3e-4, "state": 3e-4, "weight": 3e-4}  # distil.py chose the first two, and says how
Row = dict[str, Any]


class Bench:
    """The dense model, the windows it is measured on, the text to train on, and the folder of rows."""

    def __init__(self, data: Path, results: Path, quick: bool) -> None:
        self.dense, self.tokenizer = sspruner.load(MODEL, dtype="float32")
        few = 2 if quick else None
        self.sizes = {"observed": few or OBSERVED, "reported": few or REPORTED, "chosen": few or CHOSEN}
        self.observed = self.windows(data / "books-val.txt", few or OBSERVED, SEED)
        self.reported = self.windows(data / "books-test.txt", few or REPORTED, SEED).tokens
        self.chosen = self.windows(data / "books-val.txt", few or CHOSEN, CHOSEN_SEED).tokens
        self.text = Text((str(data / "books-train.txt"),), self.tokenizer, SEQ_LEN, seed=SEED)
        self.results, self.cuts = results, dict[str, Any]()

    def windows(self, file: Path, count: int, seed: int) -> sspruner.Calibration:
        return books(self.dense, self.tokenizer, file, count, SEQ_LEN, seed)

    def cut(self, cut: Row) -> Any:
        """A copy of the dense model under a cut, by arguments of sspruner.prune; of the dense model without any."""
        key = json.dumps(cut)
        if key not in self.cuts:
            self.cuts[key] = copy.deepcopy(self.dense)
            if cut:
                sspruner.prune(self.cuts[key], calibration=self.observed, seed=SEED, **cut)
        return copy.deepcopy(self.cuts[key])

    def settings(self, tokens: int, rate: float) -> Settings:
        return Settings(tokens, None, BATCH, AT_ONCE, SEQ_LEN, rate, every=EVERY, seed=SEED)

    def row(self, label: str, asked: Row, make: Callable[[Path], tuple[Any, Row]]) -> Row:
        """A row from its file, or made now. make: the folder of a run -> the model, and what else to keep."""
        asked = json.loads(json.dumps(asked | self.sizes))
        file = self.results / f"{''.join(c if c.isalnum() else '-' for c in label)}.json"
        if file.exists() and (found := json.loads(file.read_text()))["asked"] == asked:
            return dict(found)
        run = self.results / f"run-{hashlib.sha256(json.dumps([label, asked]).encode()).hexdigest()[:12]}"
        self.results.mkdir(parents=True, exist_ok=True)
        model, more = make(run)
        row = {"label": label, "asked": asked, **more, "nll": nll(model, self.reported)}
        row["chosen"] = nll(model, self.chosen)
        file.write_text(json.dumps(row))
        shutil.rmtree(run, ignore_errors=True)
        progress(f"{label}: {perplexity(row):.2f}, on books-val {perplexity(row, 'chosen'):.2f}")
        return row

    def as_cut(self, label: str, cut: Row) -> Row:
        """A cut, not trained."""
        return self.row(label, cut, lambda run: (self.cut(cut), {}))

    def distilled(self, label: str, cut: Row, tokens: int, rate: float, alpha: float = 0.5) -> Row:
        """A cut that learned from the text and, if alpha is not 0, from the dense model."""
        settings = self.settings(tokens, rate)

        def make(run: Path) -> tuple[Any, Row]:
            student, teacher = self.cut(cut).requires_grad_(True), copy.deepcopy(self.dense)
            made, found = distil(student, teacher, self.text, run, settings=settings, alpha=alpha)
            return made, {"tokens": found.tokens, "seconds": round(found.seconds, 1)}

        asked = {"cut": cut, "alpha": alpha, **settings.asked()}
        return self.row(f"{label}, {tokens} tokens, {rate:g}", asked, make)


@torch.no_grad()
def nll(model: Any, windows: torch.Tensor) -> list[float]:
    """Negative log-likelihood of each window, in nats, summed over its T-1 targets. windows: int64 (W, T)."""
    found: list[float] = []
    for part in windows.split(8):
        logp = log_probabilities(model, part, torch.ones_like(part))  # (w, T-1, V)
        found += (-logp.gather(-1, part[:, 1:, None])).double().sum((1, 2)).tolist()
    return [round(x, 4) for x in found]


def perplexity(row: Row, of: str = "nll") -> float:
    return math.exp(sum(row[of]) / len(row[of]) / (SEQ_LEN - 1))


def ratio(row: Row, against: Row) -> str:
    """Perplexity over that of another row, with a paired 95 % interval over windows."""
    counts = torch.full((len(row["nll"]),), SEQ_LEN - 1)
    found = paired.perplexity_ratio(torch.tensor(row["nll"]), torch.tensor(against["nll"]), counts)
    return "{:.3f} ({:.3f} to {:.3f})".format(*found)


def sizes(bench: Bench) -> str:
    """The windows and steps, for provenance."""
    found = {name: f"{count} x {SEQ_LEN}" for name, count in bench.sizes.items()}
    return (
        f"seed {SEED}, one run each; steps of {BATCH} x {SEQ_LEN} tokens; {found['observed']} tokens observed, "
        f"{found['chosen']} for choices, {found['reported']} reported"
    )


def speed(rows: list[Row]) -> str:
    """Tokens per second of the runs together, and minutes."""
    seconds, tokens = (sum(row.get(key, 0) for row in rows) for key in ("seconds", "tokens"))
    return f"{tokens:,} tokens trained on in {seconds / 60:.0f} minutes, {tokens / max(seconds, 1e-9):.0f} a second"
