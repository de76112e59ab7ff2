"""What a cut costs by scorer: perplexity, KL to the dense model, and LAMBADA's last word, for every axis.

    python benchmarks/scorers.py mamba2-books-4m --axis state    # makes what is missing in --results, prints the table
    python benchmarks/scorers.py                                 # all reference models, all axes; several may run

The rows are those of scorer_rows.py. Calibration: seeded windows of books-val.txt. Reported: seeded windows of
books-test.txt and seeded passages of lambada-test.jsonl, the same for every row. The model is read as fp32 and masked;
a mask equals its slice (sspruner.surgery.proof). Each row and seed is a JSON file; a cell is made again if its
arguments, the sizes or the scorer's code changed, or if it failed. Changes of the engine are not noticed: --again.
"""

from __future__ import annotations

import argparse
import ast
import copy
import datetime
import hashlib
import inspect
import json
import platform
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import progress, provenance
from damage import measure
from scorer_rows import MODELS, TABLES, Row, Table
from scorer_table import render

import sspruner
from sspruner.evaluation.damage import log_probabilities
from sspruner.evaluation.last_word import last_words, passages
from sspruner.scoring.known import find_scorer

SIZES = {"seq_len": 256, "calibration_windows": 8, "reported_windows": 32, "passages": 40}
REPORTED_SEED, WINDOWS_PER_BATCH, PASSAGES_PER_BATCH, DIGITS = 0, 8, 32, 6


class Bench:
    """One model, what is asked of it, and its dense answers."""

    def __init__(self, name: str, data: Path, sizes: dict[str, int]) -> None:
        self.name, self.data, self.sizes = Path(name).name, data, sizes
        self.model, self.tokenizer = sspruner.load(name, dtype="float32")
        self.calibrations: dict[int, sspruner.Calibration] = {}

    def windows(self, file: str, count: int, seed: int) -> sspruner.Calibration:
        size = {"seq_len": self.sizes["seq_len"], "samples": count, "held_out": 0}
        return sspruner.calibration(self.data / file, self.model, self.tokenizer, seed=seed, **size)

    def calibration(self, seed: int) -> sspruner.Calibration:
        if seed not in self.calibrations:
            self.calibrations[seed] = self.windows("books-val.txt", self.sizes["calibration_windows"], seed)
        return self.calibrations[seed]

    @cached_property
    def reported(self) -> torch.Tensor:
        """int64 (W, T)"""
        return self.windows("books-test.txt", self.sizes["reported_windows"], REPORTED_SEED).tokens

    @cached_property
    def passages(self) -> list[Any]:
        with (self.data / "lambada-test.jsonl").open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        return passages(self.tokenizer, texts, self.sizes["passages"], REPORTED_SEED)

    @cached_property
    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """The dense model's log-probabilities: (W, T-1, V)."""
        parts = self.reported.split(WINDOWS_PER_BATCH)
        return torch.cat([log_probabilities(self.model, part, torch.ones_like(part)) for part in parts])

    def answers(self, model: Any) -> dict[str, Any]:
        """nll, kl: by window, nats per token; word_nll, word: by passage, nats per last word, and whether it is hit."""
        nll, kl = measure(model, self.reported, self.dense)
        word_nll, hit = last_words(model, self.passages, PASSAGES_PER_BATCH)
        numbers = {"nll": nll, "kl": kl, "word_nll": word_nll}
        return {k: [round(x, DIGITS) for x in v.tolist()] for k, v in numbers.items()} | {"word": hit.tolist()}

    def cut(self, seed: int, scorer: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A cell: what one cut costs, or why it cannot be made."""
        model, start = copy.deepcopy(self.model), time.perf_counter()
        try:
            data = self.calibration(seed)
            result = sspruner.prune(model, scorer, mode="mask", calibration=data, seed=seed, **arguments)
            kept = sorted({s.after for s in result.plan.groups.values()})
            return self.answers(model) | {
                "kept": kept,
                "scoring_seconds": result.report.seconds["scoring"],
                "seconds": round(time.perf_counter() - start, 2),
            }
        except sspruner.SSPrunerError as error:
            return {"error": str(error)}
        except Exception as error:  # a broken scorer must not take the other rows with it
            return {"error": f"{type(error).__name__}: {error}"}


def code_of(scorer: str) -> str:
    """A hash of the module that a scorer comes from, without comments and docstrings."""
    cls = find_scorer(scorer)[0]
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls) or cls))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def file_of(results: Path, model: str, axis: str, label: str, seed: int) -> Path:
    return results / model / axis / f"{''.join(c if c.isalnum() else '-' for c in label)}.{seed}.json"


def seeds_of(row: Row, table: Table, asked: int | None) -> Iterator[int]:
    """One seed for what is neither drawn nor calibrated."""
    fixed = row.scorer != "random" and find_scorer(row.scorer)[0].needs == "weights"
    yield from range(1 if fixed else asked or max(row.seeds, table.seeds))


def make_row(bench: Bench, table: Table, row: Row, seed: int, file: Path, again: bool) -> None:
    """Make the cells that are missing in a row's file; it is written after every one."""
    old = json.loads(file.read_text()) if file.exists() and not again else {}
    record = {
        "model": bench.name,
        "axis": table.axis,
        "label": row.label,
        "seed": seed,
        "sizes": bench.sizes,
        "code": code_of(row.scorer),
        "made": {
            "date": str(datetime.date.today()),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads, torch {torch.__version__}",
        },
        "cells": {},
    }
    same = all(old.get(key) == record[key] for key in ("sizes", "code"))
    for cut, budget in table.cuts.items():
        arguments = {"axis": table.axis, **row.arguments, **budget}
        if "pattern" in budget:
            arguments.pop("granularity", None)  # a pattern is one
        as_json = json.loads(json.dumps(arguments))
        cell = old.get("cells", {}).get(cut, {}) if same else {}
        if cell.get("arguments") != as_json or "error" in cell:
            cell = bench.cut(seed, row.scorer, arguments) | {"arguments": as_json}
            said = cell.get("error") or f"{sum(cell['nll']) / len(cell['nll']):.4f} nats, {cell['seconds']:.1f} s"
            progress(f"{bench.name} {table.axis} | {row.label} | seed {seed} | {cut}: {said}")
        record["cells"][cut] = cell
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="reference models, or folders; default: all three")
    parser.add_argument("--axis", nargs="+", help="some of the axes")
    parser.add_argument("--rows", nargs="+", help="some of the rows, by scorer or label")
    parser.add_argument("--seeds", type=int, help="so many seeds of every row; default: by table")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books and LAMBADA")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the rows' JSON")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; 1, and a process for each core, is quickest"
    )
    parser.add_argument("--again", action="store_true", help="make rows that are there already, too")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = {name: getattr(given, name) for name in SIZES}
    for name in given.models:
        bench = Bench(name, given.data, sizes)
        dense = given.results / bench.name / "dense.json"
        if given.again or not dense.exists() or json.loads(dense.read_text())["sizes"] != sizes:
            dense.parent.mkdir(parents=True, exist_ok=True)
            dense.write_text(json.dumps({"model": bench.name, "sizes": sizes, **bench.answers(bench.model)}))
        for table in TABLES:
            if table.axis not in (given.axis or [table.axis]) or (
                bench.name in MODELS and bench.name not in table.models
            ):
                continue
            for row in table.rows:
                if bench.name in MODELS and bench.name not in row.models:
                    continue
                if given.rows and not {row.label, row.scorer} & set(given.rows):
                    continue
                for seed in seeds_of(row, table, given.seeds):
                    make_row(
                        bench,
                        table,
                        row,
                        seed,
                        file_of(given.results, bench.name, table.axis, row.label, seed),
                        given.again,
                    )
    print(render(given.results, [Path(m).name for m in given.models], given.axis))
    print("\n" + provenance(f"seeds 0 and up (random scorer, calibration), {REPORTED_SEED} (reported)"))


if __name__ == "__main__":
    main()
