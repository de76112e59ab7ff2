"""Gradual pruning of models that are no language models, beside one-shot cuts that were trained for as many steps.

ETTh1 (Zhou et al., Informer): 96 hours of seven series give the next 96; the usual split of 12, 4 and 4 months, of
which the second is not used, standardised by the first; tested on every fourth window. Windows are normalised one by
one, and four hours are one step of the model. ListOps (Nangia & Bowman, arXiv 1804.06028; in the Long Range Arena 500
to 2,000 tokens): made here by its grammar, 8 to 32 tokens; ten classes.

Each seed trains a dense Mamba, and from it every row: all weights in the same number of further steps, at one rate.
What a seed found is kept in the work folder.
"""

from __future__ import annotations

import copy
import csv
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Made, hash_of, over_seeds, progress, table
from torch import nn
from transformers import MambaConfig, MambaModel, MambaPreTrainedModel

import sspruner
from sspruner.compute.quick_scan import ALL, quick_scans
from sspruner.recipes.train import Settings
from sspruner.training.distil import keep_zeros
from sspruner.training.examples import Examples
from sspruner.training.gradual import gradual
from sspruner.training.loop import train

HOURS, AHEAD, STEP, SERIES, MONTH = 96, 96, 4, 7, 720
SHORTEST, LONGEST, DEPTH, ARGUMENTS, NESTED = 8, 32, 10, 5, 0.25
TEST_EVERY, TESTS = 4, 1000
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(median(values)),
    "SM": lambda values: sum(values) % 10,
}
CLOSE, FIRST_OPERATOR = 11, 12  # tokens: 0 padding, digits 1 to 10, then these; 4 operators
SPARSITIES = (0.5, 0.7, 0.9)
BATCH, TRAIN_RATE, ROW_RATE, OBSERVED = 16, 2e-3, 1e-3, 64


class Forecaster(MambaPreTrainedModel):
    """The next AHEAD hours of all series: (b, HOURS, SERIES) -> (b, AHEAD, SERIES)."""

    main_input_name = "values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.enter = nn.Linear(STEP * SERIES, config.hidden_size)
        self.backbone = MambaModel(config)
        self.leave = nn.Linear(config.hidden_size, AHEAD * SERIES)
        self.post_init()

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Return the shape of its windows."""
        return {"values": torch.zeros(1, HOURS, SERIES)}

    def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return `logits`, the forecast, and `loss`, the squared error, where there are labels."""
        mean, scale = values.mean(1, keepdim=True), values.std(1, keepdim=True) + 0.1
        steps = ((values - mean) / scale).unflatten(1, (-1, STEP)).flatten(2)  # (b, HOURS / STEP, STEP * SERIES)
        last = self.backbone(inputs_embeds=self.enter(steps)).last_hidden_state[:, -1]
        found = self.leave(last).unflatten(-1, (AHEAD, SERIES)) * scale + mean
        return {"logits": found} | ({} if labels is None else {"loss": nn.functional.mse_loss(found, labels)})


class Classifier(MambaPreTrainedModel):
    """The value of an expression, from the last position: (b, T) -> (b, 10)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.leave = nn.Linear(config.hidden_size, 10)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return `logits`, and `loss` where there are labels."""
        found = self.leave(self.backbone(input_ids).last_hidden_state[:, -1])
        return {"logits": found} | ({} if labels is None else {"loss": nn.functional.cross_entropy(found, labels)})


@dataclass(frozen=True)
class Task:
    """A task: the class of its model, arrays to train on and to test, and what a test returns: (logits, labels)."""

    name: str
    kind: Any
    reads: str
    train: dict[str, torch.Tensor]
    test: dict[str, torch.Tensor]
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    steps: int
    digits: int
    better: str


def forecasting(data: Path, steps: int) -> Task:
    """Return the task of ETTh1."""
    with (data / "ETTh1.csv").open(encoding="utf-8") as file:
        rows = torch.tensor([[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
    first, test = rows[: 12 * MONTH], rows[16 * MONTH - HOURS : 20 * MONTH]

    def windows(part: torch.Tensor, each: int) -> dict[str, torch.Tensor]:
        scaled = (part - first.mean(0)) / first.std(0)
        every = scaled.unfold(0, HOURS + AHEAD, each).transpose(1, 2)  # (n, HOURS + AHEAD, SERIES)
        return {"values": every[:, :HOURS].contiguous(), "labels": every[:, HOURS:].contiguous()}

    squares: Callable[..., torch.Tensor] = lambda found, labels: (found - labels).square().mean()  # noqa: E731
    parts = windows(first, 1), windows(test, TEST_EVERY)
    return Task("ETTh1, MSE", Forecaster, "values", *parts, squares, steps, 4, "lower")


def list_operations(count: int, steps: int) -> Task:
    """Return the task of ListOps: so many expressions to train on, and up to TESTS others to test."""

    def draw(seed: int, number: int) -> dict[str, torch.Tensor]:
        generator, found = random.Random(f"listops {seed}"), {}
        while len(found) < number:
            tokens, value = expression(generator, 1)
            if SHORTEST <= len(tokens) <= LONGEST:
                found[(0,) * (LONGEST - len(tokens)) + tuple(tokens)] = value
        return {"input_ids": torch.tensor([*found]), "labels": torch.tensor([*found.values()])}

    right: Callable[..., torch.Tensor] = lambda found, labels: (found.argmax(-1) == labels).float().mean()  # noqa: E731
    test, seen = draw(1, TESTS), draw(0, count)
    known = {tuple(row) for row in seen["input_ids"].tolist()}
    new = torch.tensor([tuple(row) not in known for row in test["input_ids"].tolist()])
    test = {name: array[new] for name, array in test.items()}
    return Task("ListOps, accuracy", Classifier, "input_ids", seen, test, right, steps, 3, "higher")


def expression(generator: random.Random, depth: int) -> tuple[list[int], int]:
    """Draw an expression by the grammar of ListOps: its tokens, and its value."""
    if depth >= DEPTH or generator.random() > NESTED:
        digit = generator.randrange(10)
        return [1 + digit], digit
    parts = [expression(generator, depth + 1) for _ in range(generator.randint(2, ARGUMENTS))]
    number = generator.randrange(len(OPERATORS))
    value = [*OPERATORS.values()][number]([value for _, value in parts])
    return [FIRST_OPERATOR + number, *(token for tokens, _ in parts for token in tokens), CLOSE], value


@torch.no_grad()
def tested(task: Task, model: Any) -> float:
    """Return the error or the accuracy of a model on all of the test examples."""
    found = [model(part)["logits"] for part in task.test[task.reads].split(256)]
    return float(task.measure(torch.cat(found), task.test["labels"]))


@contextmanager
def quick(model: Any) -> Iterator[None]:
    """Context manager: Mamba's scan with a gradient of its own; the loop of transformers is slow to train."""
    with quick_scans(model.backbone.layers[0].mixer, ALL):
        yield


def study(task: Task, config: dict[str, Any], seed: int, steps: int) -> tuple[dict[str, list[float]], int]:
    """Return the measures of every row, by sparsity, before its training where there are two, and the parameters."""
    torch.manual_seed(seed)
    dense = task.kind(MambaConfig(**config, use_cache=False, pad_token_id=0, vocab_size=16))
    examples = Examples(task.train, seed=seed)
    found: dict[str, list[float]] = {}

    def train_on(model: Any, count: int, rate: float) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            how = settings(count, rate, seed)
            train(model, examples, how, examples.objective, Path(folder), after_step=keep_zeros(model))
        return model

    with quick(dense):
        train_on(dense, task.steps, TRAIN_RATE)
        found["dense"] = [tested(task, dense)]
        found["dense, trained on"] = [tested(task, train_on(copy.deepcopy(dense), steps, ROW_RATE))]
        for sparsity in SPARSITIES:
            with tempfile.TemporaryDirectory() as folder:
                options: dict[str, Any] = {"sparsity": sparsity, "mask_every": 5}
                how = settings(steps, ROW_RATE, seed)
                pruned = gradual(copy.deepcopy(dense), examples, folder, settings=how, **options)[0]
            found[f"gradual {sparsity:.0%}"] = [tested(task, pruned)]
            options = {"axis": "weight", "sparsity": sparsity, "granularity": "global"}
            pruned = sspruner.prune(copy.deepcopy(dense), "magnitude", **options).model
            found[f"magnitude {sparsity:.0%}"] = [tested(task, pruned)]
            found[f"magnitude {sparsity:.0%}"] += [tested(task, train_on(pruned.requires_grad_(), steps, ROW_RATE))]
        inputs = task.train[task.reads][:: len(task.train[task.reads]) // OBSERVED][:OBSERVED]
        pruned = sspruner.prune(copy.deepcopy(dense), "ghost", sparsity=0.5, calibration=inputs, samples=OBSERVED).model
        found["GHOST 50%"] = [tested(task, pruned)]
        found["GHOST 50%"] += [tested(task, train_on(pruned.requires_grad_(), steps, ROW_RATE))]
    return found, sum(p.numel() for p in dense.parameters())


def settings(steps: int, rate: float, seed: int) -> Settings:
    """Return the settings of a training in so many steps."""
    sizes: dict[str, Any] = {"max_tokens": steps * BATCH, "batch": BATCH, "at_once": BATCH, "seq_len": 1}
    return Settings(**sizes, learning_rate=rate, every=10**6, seed=seed)


def rows_of(task: Task, found: list[dict[str, list[float]]]) -> list[list[str]]:
    """Return the lines of a task: before the further steps, after them, and against the dense model after them."""
    rows = []
    for name in found[0]:
        last = [one[name][-1] for one in found]
        before = [one[name][0] for one in found] if len(found[0][name]) > 1 or name == "dense" else []
        change = [one[name][-1] - one["dense, trained on"][-1] for one in found]
        cells = [over_seeds(before, task.digits) if before else "–"]
        cells += (
            ["–", "–"] if name == "dense" else [over_seeds(last, task.digits), over_seeds(change, task.digits, "+")]
        )
        rows.append([name, *cells])
    return rows


def tables(s: Any) -> Made:
    """Return a table for each task. Settings: seeds, steps, forecast, listops, examples, config."""
    tasks, made = [forecasting(s.data, s.forecast), list_operations(s.examples, s.listops)], []
    for task, config in zip(tasks, s.configs, strict=True):
        runs = []
        for seed in range(s.seeds):
            file = s.work / f"forecast-{task.reads}-{hash_of(task.steps, s.steps, s.examples, config)}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(study(task, config, seed, s.steps)), encoding="utf-8")
            runs.append(json.loads(file.read_text(encoding="utf-8")))
            progress(f"{task.name}, seed {seed}: {runs[-1][0]}")
        head = [f"{task.better} is better", "before", f"after {s.steps} further steps", "against dense, after"]
        title = f"{task.name}; {runs[0][1]:,} parameters, {task.steps:,} steps before"
        made.append(table(title, head, rows_of(task, [found for found, _ in runs])))
    labels = tasks[1].test["labels"]
    share = float(torch.bincount(labels).max() / len(labels))
    note = f"{s.seeds} seeds; mean ± half of the 95 % interval over seeds (Student); steps of {BATCH} examples"
    return made, f"{note}; learning rates {TRAIN_RATE:g} and {ROW_RATE:g}, not tuned; most frequent class {share:.3f}"
