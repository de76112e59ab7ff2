"""Run TwIST beside one-shot cuts of the same size trained for the same tokens, and beside plain training.

Workers are processes of torchrun, one thread each. Draws: eight random sub-networks of what was trained, reported on
windows of books-test.txt; the best of them is the one that is best on the held-out blocks of the training text.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from statistics import fmean, stdev
from typing import Any

from common import NO, Made, Subject, as_is, perplexity, progress, table, torchrun
from experiment import Bench, Experiment, Fields, measured

import sspruner

RATE, DRAWS, OFTEN, RARELY = 5e-4, 8, 5, 15


def twist(bench: Bench, workers: int, keep: float, tokens: int, deal: int = OFTEN) -> Fields:
    """Return the record of a run of the command: perplexities of the whole and of its draws; nothing if it refuses."""
    file = bench.work / f"twist-{workers}-{keep}-{tokens}-{deal}.json"
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    out, said = file.with_suffix(".run"), file.with_suffix(".said")
    how = f"--keep {keep} --ends 1 --deal-every {deal} --draws {DRAWS} --max-tokens {tokens} --learning-rate {RATE}"
    how += " --batch 8 --at-once 4 --seq-len 256 --every 20 --seed 0 --device cpu"
    text = ("--text", bench.subject.data / "books-train.txt", "--out", out, "--json", said)
    done = torchrun(workers, "sspruner", "train", "twist", bench.subject.name, *text, *how.split())
    if done.returncode:
        progress(done.stderr[-400:])
        return {}
    found, whole = json.loads(said.read_text(encoding="utf-8")), sspruner.load(out / "whole", dtype="float32")[0]
    plans, graph = [sspruner.Plan.load(out / f"draw-{n}.json") for n in range(DRAWS)], sspruner.trace(whole)
    versions = [as_is(whole), *(partial(sspruner.masked, whole, plan, graph) for plan in plans)]
    losses = [perplexity(record["nll"]) for record in bench.measure(versions)]
    best = min(range(DRAWS), key=found["draws"]["perplexity"].__getitem__)
    record = {"whole": losses[0], "draws": losses[1:], "best": losses[1 + best], "tokens": found["tokens"]}
    record |= {"bytes": found["draws"]["bytes_per_round"], "seconds": found["seconds"]}
    record["parameters"] = sum(p.numel() for p in sspruner.apply(whole, plans[-1]).parameters())
    file.write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(out)
    progress(f"twist, {workers} workers, keep {keep}, every {deal}: {losses[0]:.2f}")
    return record


def shown(row: Fields) -> list[str]:
    """Return mean and standard deviation over draws; the best by held-out text; the trained model as a whole."""
    if not row:
        return ["refused", NO, NO]
    return [f"{fmean(row['draws']):.2f} ± {stdev(row['draws']):.2f}", f"{row['best']:.2f}", f"{row['whole']:.2f}"]


def tables(s: Any) -> Made:
    """Return perplexity by size and workers, and what travels. Settings: tokens, keeps, workers."""
    (section,) = Experiment.load(s.file).sections
    section = section.quick() if s.quick else section
    subject, work, rows, traffic = Subject(section.models[0], s.data), s.work / "cells" / section.models[0], [], []
    found, bench = measured(subject, section, work), Bench(subject, section, work)
    values = {key: perplexity(cell.record["nll"]) for key, (cell,) in found.cells.items()}
    for keep in s.keeps:
        pairs = [[values[f"{keep:g}, {scorer}", cut] for cut in section.cuts] for scorer in ("ghost", "magnitude")]
        for count in s.workers:
            label, row = f"{keep:g}, {count} workers", twist(bench, count, keep, s.tokens)
            rows.append([label, *shown(row), *(f"{before:.2f} → {after:.2f}" for before, after in pairs)])
            if row:
                size, sent, formula = row["parameters"], row["bytes"], 2 * 3 * 4 * row["parameters"] * (count - 1)
                rate = f"{row['tokens'] / row['seconds']:,.0f}"
                traffic.append([label, f"{size:,}", f"{sent:,.0f}", f"{formula:,.0f}", f"{sent / formula:.4f}", rate])
    rarely = shown(twist(bench, 2, 0.5, s.tokens, RARELY))
    rows.append([f"0.5, 2 workers, dealt every {RARELY} steps", *rarely, "as above", "as above"])
    both = f"dense {values['dense', 'not trained']:.2f}, trained alike {values['dense', 'trained']:.2f}"
    head = ["keep", "draws", "best draw", "whole", "ghost, trained", "magnitude, trained"]
    text = table(f"Perplexity after {s.tokens:,} tokens; {both}", head, rows)
    head = ["keep", "parameters of a slice", "bytes a round, all workers", "2 · 12 · slice · (m − 1)"]
    text += "\n" + table("What travels", [*head, "ratio", "tokens/s"], traffic)
    return [text], f"seed 0, one run each; learning rate {RATE:g}; dealt every {OFTEN} steps; {DRAWS} draws"
