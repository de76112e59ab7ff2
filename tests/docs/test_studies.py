"""The research of benchmarks/studies: its tasks have the answers it says, its intervals are Student's."""

from __future__ import annotations

import importlib
import random
import re
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import sspruner
from sspruner.testing.models import zoo


def study(name: str) -> Any:
    """A module of benchmarks/studies; the fixture `bench` makes it importable."""
    return importlib.import_module(f"studies.{name}")


def test_what_is_looked_up_in_a_dictionary_was_told_before(bench: ModuleType, tmp_path: Path) -> None:
    study = importlib.import_module("studies.dictionaries")
    (tmp_path / "books.txt").write_text("It was the best of times. " * 2000, encoding="utf-8")
    tokenizer = sspruner.load()[1]
    text = study.Interleaved((str(tmp_path / "books.txt"),), tokenizer, 256, words=60, pairs=24, blocks=40)
    blocks = list(islice(text.training_blocks(), 40))
    assert torch.equal(blocks[7], next(text.training_blocks(skip=7)))
    most = []
    for block in blocks:
        passage, value = (found[0] for found in study.parts(block[None]))
        first = block.tolist().index(0)
        assert passage.tolist() == [place < first for place in range(1, 256)]
        asked = [(int(block[t]), int(block[t + 1])) for t in value.nonzero()[:, 0]]
        ends = [*(block == 0).nonzero()[:, 0].tolist(), 256]
        found = []
        for begin, end in pairwise(ends):
            words = block[begin + 1 : end].tolist()
            told = dict(zip(words[: len(words) // 2 : 2], words[1 : len(words) // 2 : 2], strict=True))
            assert set(words) <= set(range(1, 61))
            found += [(key, told[key]) for key in words[len(words) // 2 :: 2]]
        assert asked == found  # every looked-up value, and no other token
        most.append(len(asked) // (len(ends) - 1))
    assert max(most[:4]) < 9 < max(most) <= 24  # more and more pairs


def value(tokens: list[int]) -> int:
    """The value of an expression of ListOps, read from the right with a stack. 1 to 10 are digits, 11 closes."""
    stack: list[int] = []
    for token in reversed(tokens):
        if token <= 11:
            stack.append(token)
            continue
        parts = []
        while stack[-1] != 11:
            parts.append(stack.pop() - 1)
        stack.pop()
        found = {12: min(parts), 13: max(parts), 14: int(median(parts)), 15: sum(parts) % 10}[token]
        stack.append(1 + found)
    (last,) = stack
    return last - 1


def test_an_expression_has_the_value_that_it_is_labelled_with(bench: ModuleType) -> None:
    generator, seen = random.Random(0), set()
    for _ in range(300):
        tokens, label = study("forecast").expression(generator, 1)
        assert value(tokens) == label
        seen |= set(tokens)
    assert seen == set(range(1, 16))  # every digit, every operator
    task = study("forecast").list_operations(200, 1)
    known = {tuple(row) for row in task.train["input_ids"].tolist()}
    assert not known & {tuple(row) for row in task.test["input_ids"].tolist()}
    assert [value([t for t in row if t]) for row in task.test["input_ids"].tolist()] == task.test["labels"].tolist()


def test_every_experiment_says_what_it_observed_and_reported(bench: ModuleType) -> None:
    """As a whole: a quick run has other sizes."""
    tables, experiment = importlib.import_module("tables"), importlib.import_module("experiment")
    files = {part.files[0] for part in bench.PARTS.values() if part.recipe and not part.study}
    found = [experiment.Experiment.load(file) for file in files if not hasattr(tables.commands, file.stem)]
    assert len(found) > 10
    for one in found:
        assert re.match(
            r"seed 0; (\d+ windows observed, )?\d+( passages)? reported; ", tables.note(one.sections[0], one.note)
        )


def test_an_interval_over_seeds_is_students(bench: ModuleType) -> None:
    over_seeds = importlib.import_module("common").over_seeds
    assert over_seeds([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.303 * 1 / sqrt(3)
    assert over_seeds([1.0, 3.0], 1, "+") == "+2.0 ± 12.7"  # 12.706 * sqrt(2) / sqrt(2)
    assert over_seeds([0.5]) == "0.500"


def settings(folder: Path, **others: Any) -> SimpleNamespace:
    """Settings of a tiny training of recall_models."""
    config = {"hidden_size": 16, "num_hidden_layers": 2, "expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": 1}
    plain = {"task": "mqar", "config": config, "vocabulary": 32, "lessons": [[4, 16]], "tokens": 64, "steps": 2,
             "rate": 1e-3, "work": folder, "states": [64], "seeds": [0], "device": "cpu"}  # fmt: skip
    return SimpleNamespace(**plain | others)


def test_a_model_begins_as_an_associative_memory(bench: ModuleType, tmp_path: Path) -> None:
    recall, mqar = study("recall_models"), importlib.import_module("sspruner.evaluation.mqar")
    answered = importlib.import_module("sspruner.evaluation.questions").answered
    config = settings(tmp_path).config | {"hidden_size": 64, "head_dim": 32, "chunk_size": 16, "state_size": 64}
    model = recall.memory(config, 256, 0)
    tasks = mqar.mqar(64, 4, 32, torch.Generator().manual_seed(0), vocabulary=256)
    assert answered(model, tasks)[0].mean() > 0.5  # by chance 1 of 128


def test_another_training_has_another_folder(bench: ModuleType, tmp_path: Path) -> None:
    place = study("recall_models").place
    names = {
        place(settings(tmp_path, **other), 8, 0) for other in ({}, {"steps": 3}, {"lessons": [[2, 16]]}, {"rate": 1})
    }
    assert len(names) == 4
    assert place(settings(tmp_path), 8, 0) == place(settings(tmp_path, states=[4], seeds=[0, 1]), 8, 0)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (1.75, 7)])
def test_a_distillation_takes_whole_steps_until_its_time_is_over(
    seconds: float, steps: int, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, made = study("recall_cuts"), list[int]()
    student, teacher = zoo("mamba2"), zoo("mamba2", seed=1)
    mqar = importlib.import_module("sspruner.evaluation.mqar").mqar
    clock = iter(range(10**6))  # a trial of four steps takes a second
    monkeypatch.setattr(cuts.time, "process_time", lambda: float(next(clock)))

    def batch(number: int) -> Any:
        made.append(number)
        return mqar(2, 2, 8, torch.Generator().manual_seed(number), vocabulary=student.config.vocab_size)

    before = {name: p.clone() for name, p in student.named_parameters()}
    cuts.distilled(student, teacher, batch, seconds)
    assert made == [*range(1, cuts.TRIAL + 1), *range(1, steps + 1)]
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert not student.training
