"""TwIST beside one-shot cuts of the same size trained for the same tokens, and beside plain training.

    python benchmarks/twist.py --data ../shared/data
    python benchmarks/twist.py --quick --results /tmp/quick --data ../shared/data

Sub-networks keep a fraction of the heads in all blocks but the first and the last; a one-shot cut removes as many heads
of the same blocks from the dense model, and is then trained on the text for as many tokens at the same rate. Workers
are processes of torchrun, one thread each. Draws: eight random sub-networks of what was trained, reported on windows of
books-test.txt; the best of them is the one that is best on the held-out blocks of the training text. The learning rate
was not tuned for any row. A row that is in --results is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from common import deliver, options, progress, provenance, table
from training import AT_ONCE, BATCH, EVERY, MODEL, SEED, SEQ_LEN, Bench, Row, nll, perplexity, sizes

import sspruner

KEEPS, WORKERS, TOKENS, RATE, EVERY_DEAL, DRAWS = (0.75, 0.5, 0.25), (2, 4), 100_000, 5e-4, 5, 8
ENDS = ("*layers.0.*", "*layers.5.*")  # blocks that every sub-network, and every cut, has whole
ONE_SHOT = ("ghost", "magnitude")


def twist(bench: Bench, data: Path, workers: int, keep: float, tokens: int, deal: int = EVERY_DEAL) -> Row:
    """One run of the command: perplexities of its draws, and bytes; or the line by which it refuses."""
    asked = {"workers": workers, "keep": keep, "tokens": tokens, "rate": RATE, "deal": deal, "draws": DRAWS}

    def make(run: Path) -> tuple[Any, Row]:
        how = f"--keep {keep} --ends 1 --deal-every {deal} --draws {DRAWS} --max-tokens {tokens} --learning-rate {RATE}"
        how += f" --batch {BATCH} --at-once {AT_ONCE} --seq-len {SEQ_LEN} --every {EVERY} --seed {SEED} --device cpu"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command += ["-m", "sspruner", "train", "twist", MODEL, "--text", str(data / "books-train.txt"), *how.split()]
        said = run.with_suffix(".json")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--out", str(run), "--json", str(said)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            line = next(
                (line for line in done.stderr.splitlines() if line.startswith("sspruner: ")), done.stderr[-400:]
            )
            return bench.cut({}), {"refused": line.removeprefix("sspruner: ")}
        found = json.loads(said.read_text())
        draws = []
        for number in range(DRAWS):
            whole = sspruner.load(run / "whole", dtype="float32")[0]
            plan = sspruner.Plan.load(run / f"draw-{number}.json")
            draws.append({"nll": nll(sspruner.apply(whole, plan), bench.reported), "mixers": heads(whole)})
        return sspruner.load(run / "whole", dtype="float32")[0], {
            "draws": draws,
            "held_out": found["draws"]["perplexity"],
            "before": found["draws"]["before"],
            "bytes_per_round": found["draws"]["bytes_per_round"],
            "parameters": sum(p.numel() for p in whole.parameters()),
            "tokens": found["tokens"],
            "seconds": round(found["seconds"], 1),
        }

    return bench.row(f"twist, {workers} workers, keep {keep}, every {deal}, {tokens} tokens", asked, make)


def heads(model: Any) -> list[int]:
    """Heads of each layer."""
    return [group.units for group in sspruner.trace(model).on_axis("head").values()]


def shown(row: Row) -> list[str]:
    """Mean and standard deviation over draws; the best by held-out text; the trained model as a whole."""
    if "refused" in row:
        return ["refused", "–", "–"]
    found = [perplexity(draw) for draw in row["draws"]]
    best = min(range(len(found)), key=row["held_out"].__getitem__)
    return [f"{fmean(found):.2f} ± {stdev(found):.2f}", f"{found[best]:.2f}", f"{perplexity(row):.2f}"]


def main() -> None:
    parser = options(__doc__, "twist.py")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/training"), help="folder of the rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or 1)
    tokens = 4_000 if given.quick else TOKENS
    keeps, workers = ((0.5,), (2,)) if given.quick else (KEEPS, WORKERS)
    bench = Bench(given.data, given.results, given.quick)
    dense, trained = bench.as_cut("dense", {}), bench.distilled("dense", {}, tokens, RATE, 0.0)
    rows, numbers, traffic = [], {"dense": perplexity(dense), "dense, trained": perplexity(trained)}, []
    for keep in keeps:
        made = {count: twist(bench, given.data, count, keep, tokens) for count in workers}
        cells = []
        for scorer in ONE_SHOT:
            cut = {"axis": "head", "scorer": scorer, "sparsity": 1 - keep, "ignore": ENDS}
            before = bench.as_cut(f"heads {keep}, {scorer}", cut)
            after = bench.distilled(f"heads {keep}, {scorer}", cut, tokens, RATE, 0.0)
            cells.append(f"{perplexity(before):.2f} → {perplexity(after):.2f}")
            numbers |= {f"{keep}, {scorer}": perplexity(before), f"{keep}, {scorer}, trained": perplexity(after)}
        for count, row in made.items():
            rows.append([f"{keep:g}, {count} workers", *shown(row), *cells])
            if "refused" in row:
                progress(row["refused"])
                continue
            formula = 2 * 3 * 4 * row["parameters"] * (count - 1)
            traffic.append(
                [
                    f"{keep:g}, {count} workers",
                    f"{row['parameters']:,}",
                    f"{row['bytes_per_round']:,.0f}",
                    f"{formula:,.0f}",
                    f"{row['bytes_per_round'] / formula:.4f}",
                    f"{row['tokens'] / row['seconds']:,.0f}",
                ]
            )
            numbers[f"{keep}, {count} workers"] = fmean(map(perplexity, row["draws"]))
    rarely = twist(bench, given.data, 2, 0.5, tokens, 15)
    rows.append(["0.5, 2 workers, dealt every 15 steps", *shown(rarely), *["as above"] * len(ONE_SHOT)])
    head = ["keep", "draws", "best draw", "whole", *(f"{scorer}, trained" for scorer in ONE_SHOT)]
    title = (
        f"Perplexity after {tokens:,} tokens; dense {perplexity(dense):.2f}, trained alike {perplexity(trained):.2f}"
    )
    text = table(title, head, rows)
    head = [
        "keep",
        "parameters of a slice",
        "bytes a round, all workers",
        "2 · 12 · slice · (m − 1)",
        "ratio",
        "tokens/s",
    ]
    text += "\n" + table("What travels", head, traffic)
    note = f"{sizes(bench)}; learning rate {RATE:g}; dealt every {EVERY_DEAL} steps; {DRAWS} draws"
    deliver(given, "twist.py", text + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
