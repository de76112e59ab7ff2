"""Train reference models that fill their state: books, and after each passage dictionaries to look words up in.

A window is a passage of books, then dictionaries, each after the token of `<|endoftext|>`: a task of associative recall
(evaluation/recall.py), pairs of random words of the model's own vocabulary, then its keys once more, each followed by
its value. The dictionaries take half of the window, or one does more; how many pairs they have is drawn for each
window, from a range that grows over the first half of the training. The loss is the mean over the passages' tokens plus
the mean over the values that can be looked up; keys, which nobody can know, do not count.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import torch
from common import Made, Subject, check_unseen, perplexity, progress, ratio, table
from torch import Tensor, nn

import sspruner
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.paired import mean
from sspruner.evaluation.recall import END, FIRST_WORD, sequences
from sspruner.training.loop import train
from sspruner.training.text import Text
from studies.train import fresh_model, on_its_device, remembering, settings_of, train_recall

LEAST_PAIRS = 4
Cell = dict[str, Tensor]  # of a version of a model: what `losses` returns
WHAT = {
    "both": "perplexity of passages and values over the dense model's {}",
    "passage": "perplexity of passages alone over {}",
    "right": "right values; dense {}",
}
ROWS: dict[str, dict[str, Any]] = {
    "random": {"scorer": "random"},
    "magnitude": {"scorer": "magnitude"},
    "taylor": {"scorer": "taylor"},
    "ghost": {"scorer": "ghost"},
    "ghost, calibrated on books alone": {"scorer": "ghost", "calibration": "books"},
    "ghost, reconstruct": {"scorer": "ghost", "refit": "reconstruct"},
    "balanced": {"scorer": "balanced"},
    "balanced, calibrated on books alone": {"scorer": "balanced", "calibration": "books"},
}
PAIRS = [  # rows that the page ranks
    ("ghost", "random"), ("ghost", "magnitude"), ("ghost", "taylor"), ("balanced", "ghost"), ("balanced", "taylor"),
    ("ghost, reconstruct", "ghost"), ("ghost, calibrated on books alone", "ghost"),
]  # fmt: skip


@dataclass(frozen=True)
class Interleaved(Text):
    """Text whose training blocks end in dictionaries. words: how many there are; pairs: the most at the end.

    blocks: of the whole training.
    """

    words: int = 0
    pairs: int = 16
    blocks: int = 1

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify this text, as JSON."""
        return super().identity() | {"pairs": self.pairs, "words": self.words, "blocks": self.blocks}

    def training_blocks(self, skip: int = 0) -> Iterator[Tensor]:
        """Yield blocks, int64 (seq_len,), without end; each depends on its number and the seed alone."""
        for number, block in zip(count(skip), super().training_blocks(skip)):
            rng, part = random.Random(f"{self.seed} dictionary {number}"), number / self.blocks
            most = LEAST_PAIRS + round((self.pairs - LEAST_PAIRS) * min(1.0, 2 * part))
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            tail = dictionaries(len(block), rng.randint(LEAST_PAIRS, most), self.words, generator)
            yield torch.cat([block[: len(block) - len(tail)], tail])


def dictionaries(length: int, pairs: int, words: int, generator: torch.Generator) -> Tensor:
    """Return dictionaries that fill half of `length`, or one: int64 (count (1 + 4 pairs),), each after END."""
    count = max(1, length // 2 // (4 * pairs + 1))
    tasks = sequences(count, pairs, words, generator) + FIRST_WORD  # (count, 4 pairs)
    return torch.cat([torch.full((count, 1), END), tasks], 1).flatten()


def objective(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of passages plus that of looked-up values, and how many of these are right. tokens: (b, T)."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()  # (b, T - 1, V)
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    passage, value = parts(tokens)  # (b, T - 1)
    nll, right = nll.view(passage.shape), (logits.argmax(-1) == tokens[:, 1:])[value].float().mean()
    text, words = nll[passage].mean(), nll[value].mean()
    return text + words, {"text": text, "words": words, "right": right}


def parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the next token is one of the passage, and where it is a looked-up value: both bool (b, T - 1)."""
    length, is_end = tokens.shape[1], tokens == END
    first = is_end.int().argmax(1, keepdim=True)  # (b, 1): where the dictionaries begin
    size = (length - first) // is_end.sum(1, keepdim=True)  # (b, 1): tokens of each: END, pairs, queries with answers
    next_token = torch.arange(1, length, device=tokens.device)
    place = (next_token - first) % size - 1 - (size - 1) // 2  # (b, T - 1): from the first query
    return next_token < first, (next_token > first) & (place > 0) & (place % 2 == 1)


def begin(s: Any) -> Any:
    """Return the model that training begins with: a reference model, cut, or a new one that has learned recall alone.

    From a fresh start both at once is not learned in as many tokens as are trained on here: recall comes late.
    """
    tokenizer = sspruner.load()[1]
    if s.start:
        start, how = sspruner.load(s.start, dtype="float32")[0], {"samples": 32, "seq_len": 256, "keep": s.keep}
        recipe = sspruner.Recipe.of(scorer="ghost", **how)
        sspruner.prune(start, recipe, calibration=str(s.data / "books-train.txt"), tokenizer=tokenizer)
        model = fresh_model(s.family, s.config, len(tokenizer), s.seed)  # as if it had never been cut
        model.load_state_dict(start.state_dict())
        return on_its_device(model, s)
    model = remembering(fresh_model(s.family, s.config, len(tokenizer), s.seed, token=None))
    train_recall(on_its_device(model, s), s.pairs, s.recall_steps, s.seed, s.words)
    return model


def trained(s: Any) -> Made:
    """Train and save a model; return its facts.

    Settings: out, device, tokens, rate, pairs, words, seed; family, config; start and keep, or else recall_steps.
    """
    tokenizer, model = sspruner.load()[1], begin(s)
    progress(f"{s.out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    settings = settings_of(s, max_tokens=s.tokens, learning_rate=s.rate, seed=s.seed)
    sizes = {"words": s.words, "pairs": s.pairs, "blocks": settings.steps * settings.batch}
    text = Interleaved((str(s.data / "books-train.txt"),), tokenizer, settings.seq_len, seed=s.seed, **sizes)
    folder = Path(s.out + ".run")
    folder.mkdir(parents=True, exist_ok=True)
    run = train(model, text, settings, objective, folder)
    model.config.recall_pairs, model.config.recall_words = s.pairs, s.words
    for config, name in product((model.config, model.generation_config), ("bos", "eos", "pad")):
        setattr(config, f"{name}_token_id", END)
    sspruner.save(model.requires_grad_(False).to("cpu", torch.bfloat16), s.out, tokenizer, overwrite=True)
    facts = {"tokens": run.tokens, "steps": run.steps, "minutes": round(run.seconds / 60, 1)}
    return [json.dumps(facts, indent=2)], f"seed {s.seed}"


def own_windows(subject: Subject, file: str, count: int, seed: int) -> Tensor:
    """Return windows of the kind that a model was trained on, with text and words of their own: int64 (count, 256)."""
    sizes = {"words": subject.model.config.recall_words, "pairs": subject.model.config.recall_pairs}
    text = Interleaved((str(subject.data / file),), subject.tokenizer, 256, seed=seed, **sizes)
    return torch.stack(list(islice(text.training_blocks(), count)))


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> Cell:
    """Return by window nats per token of passage and values, nats of the passage, right values: fp64 (W,) each."""
    rows = []
    with quick_on_cpu(model, torch.device("cpu")):
        for tokens in torch.split(windows, 8):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()  # (b, T - 1, V)
            nll = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double()
            passage, value = parts(tokens)  # (b, T - 1)
            known, right = passage | value, (logits.argmax(-1) == tokens[:, 1:]).double()
            each = ((nll, known), (nll, passage), (right, value))
            rows.append(torch.stack([(what * where).sum(1) / where.sum(1) for what, where in each]))
    return dict(zip(("both", "passage", "right"), torch.cat(rows, 1), strict=True))


def tables(s: Any) -> Made:
    """Return what cuts of the state cost on windows of the models' own kind. Settings: models, windows, sparsities."""
    made = []
    for name in s.models:
        folder = s.work / name
        subject = Subject(folder if folder.is_dir() else name, s.data)
        test = own_windows(subject, "books-test.txt", s.windows, 1)
        own = own_windows(subject, "books-val.txt", s.windows // 2, 0)
        observed = {
            "books": subject.text("books-val.txt", s.windows // 2),
            "own": sspruner.calibration(own, subject.model, samples=s.windows // 2, held_out=0),
        }
        start, found = losses(subject.model, test), dict[tuple[str, float], Cell]()
        for (label, row), sparsity in product(ROWS.items(), s.sparsities):
            how = {"samples": s.windows // 2, **row, "calibration": observed[row.get("calibration", "own")]}
            model = copy.deepcopy(subject.model)
            made_by = sspruner.prune(model, sparsity=sparsity, tokenizer=subject.tokenizer, **how).plan.made_by
            check_unseen(made_by, test, "reported windows")
            found[label, sparsity] = losses(model, test)
            progress(f"{name} | {label} | {sparsity}")
        made += [drawn(name, start, found, *what) for what in WHAT.items()] + beside(name, found)
    return made, f"seed 0; {s.windows // 2} windows observed, {s.windows} reported; (95 % interval over windows)"


def beside(name: str, found: dict[tuple[str, float], Cell]) -> list[str]:
    """Return what rows cost beside others on the same windows: the ratio of perplexities, the difference of values."""
    cuts, made = list(dict.fromkeys(sparsity for _, sparsity in found)), []
    ways: list[tuple[str, str, Any]] = [
        ("both", "perplexity of passages and values, the first over the second", ratio),
        ("right", "right values, the first less the second", partial(share, sign="+")),
    ]
    for key, title, show in ways:
        rows = [[f"{a}; {b}", *(show(found[a, c][key] - found[b, c][key]) for c in cuts)] for a, b in PAIRS]
        made.append(table(f"{name}, state cut: {title}", ["pair", *(f"{cut:.0%}" for cut in cuts)], rows))
    return made


def share(values: Tensor, sign: str = "") -> str:
    """Return the mean with its bootstrap 95 % interval over windows. values: (W,)."""
    return "{0:{3}.3f} ({1:{3}.3f} to {2:{3}.3f})".format(*mean(values), sign)


def drawn(name: str, start: Cell, found: dict[tuple[str, float], Cell], key: str, what: str) -> str:
    """Return the table of one thing that was measured: ratios to the dense model, or how many values are right."""
    dense = share(start[key]) if key == "right" else f"{perplexity(start[key].tolist()):.2f}"
    rows: dict[str, list[str]] = {row: [row] for row, _ in found}
    for (row, _), cell in found.items():
        rows[row].append(share(cell[key]) if key == "right" else ratio(cell[key] - start[key]))
    head = ["scorer", *dict.fromkeys(f"{sparsity:.0%}" for _, sparsity in found)]
    return table(f"{name}, state cut: {what.format(dense)}", head, rows.values())
