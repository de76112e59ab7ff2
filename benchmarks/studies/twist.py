"""Run TwIST beside cuts of the same size: without calibration, with it, and trained.

For each seed the dense model, fixed cuts of it and TwIST are trained on the same tokens, each at a rate of its own.
Under torchrun this file is one process of TwIST's trainings.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from common import Made, Subject, check_unseen, half_interval, over_seeds, progress, span, table, torchrun
from torch import distributed

import sspruner
from sspruner.compute.processes import processes, rank
from sspruner.recipes.train import Settings
from sspruner.training.gradual import likelihood
from sspruner.training.loop import perplexity, train
from sspruner.training.text import Text
from sspruner.training.twist import Deal, twist

MODEL, ENDS, WORKERS = "mamba2-books-4m", 1, 4
ROWS = ["dense, {}", "dense trained, {}", "TwIST, {}"]


def training(s: Any, seed: int, rate: float) -> dict[str, Any]:
    """Return the text and the settings of every training."""
    sizes: dict[str, Any] = {"batch": s.batch, "at_once": s.batch, "seq_len": 256, "every": 10**6}
    tokenizer = sspruner.load(MODEL)[1]
    text = Text((str(Path(s.data) / "books-train.txt"),), tokenizer, 256, held_out=2, seed=seed)
    return {"text": text, "settings": Settings(max_tokens=s.tokens, learning_rate=rate, seed=seed, **sizes)}


def sub_networks(given: str) -> None:
    """Train by TwIST, as a process of torchrun, what has no folder yet. given: the settings as JSON."""
    s = SimpleNamespace(**json.loads(given))
    with processes():
        for out, keep, seed in ((folder(s, f"twist-{k}-{i}"), k, i) for i in range(s.seeds) for k in s.keeps):
            if not (out / "whole").exists():
                how: dict[str, Any] = {"keep": keep, "every": s.deal, "ends": ENDS, "draws": 1}
                model = sspruner.load(MODEL, dtype="float32")[0]
                found, *_ = twist(model, out=out, **training(s, seed, s.rates["TwIST"]), **how)
                if rank() == 0:
                    keep_model(found, out)
                distributed.barrier()


def folder(s: Any, name: str) -> Path:
    """Return the folder of a run, or the file of what was measured: one for each name and all that decides it."""
    key = "-".join(f"{value:g}" for value in (s.tokens, s.batch, s.deal, *s.rates.values(), s.draws, s.windows))
    return Path(s.work) / f"twist-{key}" / name


def keep_model(model: Any, out: Path) -> None:
    """Save what was trained, without the checkpoints."""
    sspruner.save(model, out / "whole")
    shutil.rmtree(out / "checkpoints")
    progress(out.name)


def fixed(s: Any, name: str, model: Any, seed: int) -> Any:
    """Return a model or a cut of it after plain training; kept in its folder."""
    out, rate = folder(s, name), s.rates["dense" if name.startswith("dense") else "cut"]
    if not (out / "whole").exists():
        how = training(s, seed, rate)
        out.mkdir(parents=True, exist_ok=True)
        train(model.requires_grad_(True), how["text"], how["settings"], likelihood, out)
        keep_model(model.requires_grad_(False).eval(), out)
    return sspruner.load(out / "whole", dtype="float32")[0]


def cuts(s: Any, subject: Subject, model: Any, keep: float, seed: int) -> dict[str, list[sspruner.Plan]]:
    """Return random plans, and those of scorers; blocks at the ends stay whole."""
    deal, data = Deal(model, ["head"], keep, ENDS, seed), subject.text("books-train.txt", 32, seed=seed)
    found = {"random": [deal.draw(f"draw {number}", 1)[0] for number in range(s.draws)]}
    for scorer in ("magnitude", "ghost"):
        scores = sspruner.score(model, scorer, axis="head", calibration=data)
        found[scorer] = [sspruner.plan(deal.graph, scores, sparsity=1 - keep, ignore=deal.ignore)]
    return found


def measured(s: Any, subject: Subject, keep: float, seed: int) -> dict[str, float]:
    """Return the perplexity of each kind of cut, the mean over draws; kept in a file."""
    file, record = folder(s, f"{keep}-{seed}.json"), dict[str, float]()
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    tokens = subject.text("books-test.txt", s.windows).tokens
    trained = fixed(s, f"dense-{seed}", copy.deepcopy(subject.model), seed)
    whole = sspruner.load(folder(s, f"twist-{keep}-{seed}") / "whole", dtype="float32")[0]
    for row, model in zip(ROWS, (subject.model, trained, whole), strict=True):
        record[row.format("whole")] = perplexity(model, tokens, s.batch)
        for name, plans in cuts(s, subject, model, keep, seed).items():
            check_unseen(plans[0].made_by, tokens, "reported text")
            versions = [sspruner.apply(copy.deepcopy(model), plan) for plan in plans]
            record[row.format(name)] = fmean(perplexity(version, tokens, s.batch) for version in versions)
            if model is subject.model:
                after = fixed(s, f"{name}-{keep}-{seed}", versions[0], seed)
                record[f"{name}, then trained"] = perplexity(after, tokens, s.batch)
    file.write_text(json.dumps(record), encoding="utf-8")
    return record


def tables(s: Any) -> Made:
    """Return perplexities by kind of cut, and TwIST's random cuts over others.

    Settings: tokens, batch, deal, rates, keeps, seeds, draws, windows.
    """
    given = {key: value for key, value in vars(s).items() if key not in ("file", "quick")}
    done = torchrun(WORKERS, "studies.twist", json.dumps(given, default=str))
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    subject = Subject(MODEL, s.data)
    found = {keep: [measured(s, subject, keep, seed) for seed in range(s.seeds)] for keep in s.keeps}
    head, ours = [f"{keep:g} of the heads" for keep in s.keeps], ROWS[2].format("random")
    names = [*found[s.keeps[0]][0]]
    rows = [[name, *(over_seeds([record[name] for record in found[keep]], 2) for keep in s.keeps)] for name in names]
    others = [name for name in names if name != ours and "whole" not in name]
    ratios = [[name, *(over([r[ours] / r[name] for r in found[keep]]) for keep in s.keeps)] for name in others]
    made = [table("Perplexity: mean over seeds ± 95 % interval", ["what", *head], rows)]
    made += [table("TwIST's random cuts over others (95 % interval); above 1: TwIST loses", ["over", *head], ratios)]
    note = f"seeds 0 to {s.seeds - 1}; {s.tokens:,} tokens in steps of {s.batch} x 256, {WORKERS} workers, dealt every "
    note += f"{s.deal} steps; rates {', '.join(f'{rate:g} ({name})' for name, rate in s.rates.items())}; "
    return made, note + f"{s.draws} draws a seed; 32 x 256 tokens observed, {s.windows} x 256 reported"


def over(ratios: list[float]) -> str:
    """Return the geometric mean of ratios over seeds with its interval."""
    logs = [math.log(ratio) for ratio in ratios]
    half = half_interval(logs) if len(logs) > 1 else math.nan
    return span([math.exp(fmean(logs) + shift) for shift in (0, -half, half)], 3)


if __name__ == "__main__":
    sub_networks(sys.argv[1])
