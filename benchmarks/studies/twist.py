"""TwIST beside one-shot cuts of the same size trained for the same tokens, and beside plain training.

Sub-networks keep a fraction of the heads in all blocks but the first and the last; a one-shot cut removes as many heads
of the same blocks from the dense model, and is then trained on the text for as many tokens at the same rate. Workers
are processes of torchrun, one thread each. Draws: eight random sub-networks of what was trained, reported on windows of
books-test.txt; the best of them is the one that is best on the held-out blocks of the training text. The learning rate
was not tuned for any row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import Made, table

import sspruner
from studies.training import AT_ONCE, BATCH, EVERY, MODEL, SEED, SEQ_LEN, Bench, Row, perplexity

RATE, EVERY_DEAL, DRAWS, ONE_SHOT = 5e-4, 5, 8, ("ghost", "magnitude")
ENDS = ("*layers.0.*", "*layers.5.*")  # blocks that every sub-network, and every cut, has whole


def twist(bench: Bench, workers: int, keep: float, tokens: int, deal: int = EVERY_DEAL) -> Row:
    """Return one run of the command: perplexities of its draws, and bytes; or the line by which it refuses."""
    asked = {"workers": workers, "keep": keep, "tokens": tokens, "rate": RATE, "deal": deal, "draws": DRAWS}

    def make(run: Path) -> tuple[Any, Row]:
        how = f"--keep {keep} --ends 1 --deal-every {deal} --draws {DRAWS} --max-tokens {tokens} --learning-rate {RATE}"
        how += f" --batch {BATCH} --at-once {AT_ONCE} --seq-len {SEQ_LEN} --every {EVERY} --seed {SEED} --device cpu"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command += ["-m", "sspruner", "train", "twist", MODEL, "--text", str(bench.data / "books-train.txt")]
        said, environment = run.with_suffix(".json"), os.environ | {"OMP_NUM_THREADS": "1"}
        command += [*how.split(), "--out", str(run), "--json", str(said)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("sspruner: ")]
            return bench.cut({}), {"refused": (lines or [done.stderr[-400:]])[0].removeprefix("sspruner: ")}
        found, draws = json.loads(said.read_text()), []
        for number in range(DRAWS):
            whole = sspruner.load(run / "whole", dtype="float32")[0]
            draws.append({"nll": bench.nll(sspruner.apply(whole, sspruner.Plan.load(run / f"draw-{number}.json")))})
        record = {"draws": draws, "held_out": found["draws"]["perplexity"], "tokens": found["tokens"]}
        record |= {"bytes": found["draws"]["bytes_per_round"], "seconds": round(found["seconds"], 1)}
        record["parameters"] = sum(p.numel() for p in whole.parameters())  # of the slice that was applied last
        return sspruner.load(run / "whole", dtype="float32")[0], record

    return bench.row(f"twist, {workers} workers, keep {keep}, every {deal}, {tokens} tokens", asked, make)


def shown(row: Row) -> list[str]:
    """Return mean and standard deviation over draws; the best by held-out text; the trained model as a whole."""
    if "refused" in row:
        return ["refused", "–", "–"]
    found = [perplexity(draw) for draw in row["draws"]]
    best = min(range(len(found)), key=row["held_out"].__getitem__)
    return [f"{fmean(found):.2f} ± {stdev(found):.2f}", f"{found[best]:.2f}", f"{perplexity(row):.2f}"]


def tables(s: Any) -> Made:
    """Return perplexity by size and workers, and what travels. Settings: tokens, keeps, workers."""
    bench, rows, traffic = Bench(s), [], []
    dense, trained = bench.as_cut("dense", {}), bench.distilled("dense", {}, s.tokens, RATE, 0.0)
    for keep in s.keeps:
        made, cells = {count: twist(bench, count, keep, s.tokens) for count in s.workers}, []
        for scorer in ONE_SHOT:
            cut = {"axis": "head", "scorer": scorer, "sparsity": 1 - keep, "ignore": ENDS}
            before = bench.as_cut(f"heads {keep}, {scorer}", cut)
            after = bench.distilled(f"heads {keep}, {scorer}", cut, s.tokens, RATE, 0.0)
            cells.append(f"{perplexity(before):.2f} → {perplexity(after):.2f}")
        for count, row in made.items():
            label = f"{keep:g}, {count} workers"
            rows.append([label, *shown(row), *cells])
            if "refused" not in row:
                size, sent, formula = row["parameters"], row["bytes"], 2 * 3 * 4 * row["parameters"] * (count - 1)
                rate = f"{row['tokens'] / row['seconds']:,.0f}"
                traffic.append([label, f"{size:,}", f"{sent:,.0f}", f"{formula:,.0f}", f"{sent / formula:.4f}", rate])
    rarely = twist(bench, 2, 0.5, s.tokens, 15)
    rows.append(["0.5, 2 workers, dealt every 15 steps", *shown(rarely), *["as above"] * len(ONE_SHOT)])
    head = ["keep", "draws", "best draw", "whole", *(f"{scorer}, trained" for scorer in ONE_SHOT)]
    both = f"dense {perplexity(dense):.2f}, trained alike {perplexity(trained):.2f}"
    text = table(f"Perplexity after {s.tokens:,} tokens; {both}", head, rows)
    head = [
        "keep",
        "parameters of a slice",
        "bytes a round, all workers",
        "2 · 12 · slice · (m − 1)",
        "ratio",
        "tokens/s",
    ]
    text += "\n" + table("What travels", head, traffic)
    return text, f"{bench.note()}; learning rate {RATE:g}; dealt every {EVERY_DEAL} steps; {DRAWS} draws", None
