"""Cut the models of recall_models.py, and measure what is still answered: by states kept, and by pairs or length.

A row is a scorer, with a refit or a distillation, or a model that was trained with as few states (trained). What is
observed are sequences of the hardest test that the dense models answer (SOLVED). A row that distils begins with the cut
of the row that it names, and takes as many seconds of a processor as the reconstruction of that cut took; it has what a
reconstruction has not: new sequences without end, and the places where something is asked.
Every cell is kept in WORK beside its model.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from common import NO, Made, hash_of, over_seeds, progress, table
from torch import Tensor

import sspruner
from sspruner.compute.device import resolve_device
from sspruner.compute.quick_scan import ALL, quick_scans, quick_streams
from sspruner.evaluation.questions import NONE, Questions, answered, logits_after
from sspruner.recipes.train import Settings
from sspruner.training.distil import divergence
from sspruner.training.loop import adamw, take_step
from studies.recall_models import lesson, place

SOLVED, OBSERVED, TEST_SEED, OBSERVED_SEED, DISTIL_SEED = 0.95, 128, 10**6, 2 * 10**6, 3 * 10**6
DISTIL_RATE, TRIAL = 1e-3, 4  # steps that are timed before a distillation
Cell = dict[str, Any]


class Cut:
    """A dense model of one seed, and cells of its cuts. Settings: those of `tables`."""

    def __init__(self, s: Any, seed: int) -> None:
        self.s, self.seed, self.device = s, seed, resolve_device(s.device)
        self.file = Path(f"{place(s, s.states[0], seed)}.cells")
        self.dense = self.load(s.states[0])
        self.tests = {str(which): self.sequences(which, s.test_tokens, TEST_SEED) for which in s.tests}
        self.observed: Questions | None = None

    def load(self, states: int) -> Any:
        """Return the model of this seed that was trained with so many states."""
        return sspruner.load(place(self.s, states, self.seed), dtype="float32")[0].to(self.device)

    def sequences(self, which: Any, tokens: int, seed: int) -> Questions:
        """Return about as many tokens of a test."""
        generator = torch.Generator().manual_seed(seed + self.seed)
        return lesson(self.s.task, which, tokens, self.dense.config.vocab_size, generator)

    def observe(self, which: Any) -> None:
        """Set the test whose sequences the scorers see."""
        length = self.sequences(which, 1, 0).tokens.shape[1]
        self.observed, self.hardest = self.sequences(which, OBSERVED * length, OBSERVED_SEED), which
        tested = {tuple(row) for test in self.tests.values() for row in test.tokens.tolist()}
        if tested & {tuple(row) for row in self.observed.tokens.tolist()}:  # hashes of runs would find the filler
            raise SystemExit(f"benchmarks: a sequence of {which} is observed and measured")

    def cell(self, label: str, how: Cell, keep: int) -> Cell:
        """Return a cell from its file; make and measure it if it is missing."""
        key = hash_of(self.s.tests, self.s.test_tokens, self.observed and self.hardest, how, keep)
        file = self.file / f"{key}.json"
        if not file.exists():
            model, seconds = self.made(how, keep)
            with quick_streams(model, self.device):
                right = {name: float(answered(model, test)[0].mean()) for name, test in self.tests.items()}
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"right": right, "seconds": seconds, "cell": [label, keep]}), encoding="utf-8")
            progress(f"{self.file.stem} {label} {keep}: {right}")
        found: Cell = json.loads(file.read_text(encoding="utf-8"))
        return found

    def has(self, how: Cell, keep: int) -> bool:
        """Check whether a row is there: some sizes may not be trained."""
        return "trained" not in how or place(self.s, keep, self.seed).exists()

    def made(self, how: Cell, keep: int) -> tuple[Any, float]:
        """Return a version of the model, and the seconds of a processor that it took."""
        begun = time.process_time()
        if how.get("trained") or not how:
            return self.load(keep), 0.0
        model = self.pruned(how, keep)
        if "distil" in how:
            cost = self.cell("", how["distil"] | {"refit": "reconstruct"}, keep)["seconds"]
            begun = time.process_time()
            distilled(
                model, self.dense, lambda n: self.sequences(self.hardest, self.s.tokens, DISTIL_SEED + 997 * n), cost
            )
        elif "refit" in how:
            spent = time.process_time() - begun
            return model, spent - self.cell("", {k: v for k, v in how.items() if k != "refit"}, keep)["seconds"]
        return model, time.process_time() - begun

    def pruned(self, how: Cell, keep: int) -> Any:
        """Return a cut copy of the model."""
        how = how.get("distil", how)
        data = sspruner.calibration(self.observed.tokens, self.dense, samples=OBSERVED, held_out=0, seed=self.seed)  # type: ignore[union-attr]
        recipe = sspruner.Recipe.of(axis="state", mode="slice", keep=keep, seed=self.seed, **how)
        return sspruner.prune(copy.deepcopy(self.dense), recipe, calibration=data, device=str(self.device)).model


def distilled(model: Any, teacher: Any, batch: Callable[[int], Questions], seconds: float) -> None:
    """Train a cut model on its teacher's answers for as many seconds of a processor. Only whole steps are taken."""

    def step(student: Any, number: int, settings: Settings, optimizer: Any) -> None:
        part = batch(number)
        packed = torch.stack([part.tokens, part.answers], 1).to(next(student.parameters()).device)
        take_step(student, packed, optimizer, settings, number, objective)

    def objective(student: Any, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, answers = packed.unbind(1)
        with torch.no_grad():
            known = logits_after(teacher, tokens, answers != NONE)  # (questions, V)
        return divergence(known, logits_after(student, tokens, answers != NONE)), {}

    def run(student: Any, steps: int) -> float:
        how: dict[str, Any] = {"batch": 1, "at_once": 2**30, "seq_len": 1, "max_tokens": steps}
        settings, begun = Settings(learning_rate=DISTIL_RATE, **how), time.process_time()
        optimizer = adamw(list(student.requires_grad_(True).parameters()), settings)
        student.train()
        for number in range(1, steps + 1):
            step(student, number, settings, optimizer)
        student.eval()
        return time.process_time() - begun

    with quick_scans(model.backbone.layers[0].mixer, ALL):
        a_step = run(copy.deepcopy(model), TRIAL) / TRIAL
        run(model, max(1, round(seconds / a_step)))


def tables(s: Any) -> Made:
    """Return accuracy by states kept at the hardest test that is solved, and by test. Settings: those of the training,
    and tests, test_tokens, title, by_test (the states of the second table), device.
    """  # fmt: skip
    rows: dict[str, Cell] = yaml.safe_load(s.file.read_text(encoding="utf-8"))["rows"]
    rows = {label: rows[label] for label in getattr(s, "rows", rows)}
    cuts = [Cut(s, seed) for seed in s.seeds]
    dense = [cut.cell("dense", {}, s.states[0])["right"] for cut in cuts]
    means = {name: sum(found[name] for found in dense) / len(dense) for name in dense[0]}
    hardest = [which for which in s.tests if means[str(which)] >= SOLVED] or s.tests[:1]
    for cut in cuts:
        cut.observe(hardest[-1])
    cells = {(label, keep): [cut.cell(label, how, keep) for cut in cuts if cut.has(how, keep)]
             for label, how in rows.items() for keep in s.states[1:]}  # fmt: skip

    def right(found: list[Cell], which: Any) -> str:
        return over_seeds([cell["right"][str(which)] for cell in found]) if found else NO

    at = f"{s.title} = {hardest[-1]}: accuracy by states kept; dense {over_seeds([d[str(hardest[-1])] for d in dense])}"
    first = [[label, *(right(cells[label, keep], hardest[-1]) for keep in s.states[1:])] for label in rows]
    second = [["dense", *(over_seeds([d[str(which)] for d in dense]) for which in s.tests)]]
    second += [[label, *(right(cells[label, s.by_test], which) for which in s.tests)] for label in rows]
    return [
        table(at, ["row", *map(str, s.states[1:])], first),
        table(f"{s.title}: accuracy by test, {s.by_test} of {s.states[0]} states", ["row", *map(str, s.tests)], second),
    ], f"training seeds {s.seeds}; ± half of a 95 % interval over them (t); {OBSERVED} sequences observed"
