"""What a cut costs by scorer and sparsity: perplexity and KL of a reference model on books that it never saw.

    python benchmarks/damage.py --data ../shared/data
    python benchmarks/damage.py --rows magnitude ghost "ghost, output" "balanced, none" balanced --data ../shared/data
    python benchmarks/damage.py zamba2-books --axis head --sparsities 0.25 0.5 --data ../shared/data

Calibration: seeded windows of books-val.txt, or text sampled from the model ("self"). Reported text: seeded windows of
books-test.txt. The model is read as fp32 and masked; a mask equals its slice (sspruner.surgery.proof).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import progress, provenance, table

import sspruner
from sspruner.evaluation.damage import log_probabilities

SPARSITIES = (0.5, 0.75, 0.9, 0.97)
SEEDS = (0, 1)  # of the random scorer, and of the calibration windows of the others
SEQ_LEN, CALIBRATION_WINDOWS, REPORTED_WINDOWS, REPORTED_SEED = 256, 32, 64, 0
WINDOWS_PER_BATCH = 8
RESAMPLES = 10_000

ROWS: dict[str, dict[str, Any]] = {  # label -> arguments of sspruner.prune; `source` picks the calibration
    "random": {"scorer": "random"},
    "magnitude": {"scorer": "magnitude"},
    "tp:taylor": {"scorer": "tp:taylor"},
    "ghost, means": {"scorer": "ghost", "options": {"variant": "means"}},
    "ghost, one-shot": {"scorer": "ghost", "one_shot": True},
    "ghost": {"scorer": "ghost"},
    "ghost, calibrated on self": {"scorer": "ghost", "source": "self"},
    "ghost, output": {"scorer": "ghost", "options": {"variant": "output"}},
    "balanced, none": {"scorer": "balanced", "options": {"weights": "none"}},
    "balanced": {"scorer": "balanced"},
}
ONLY_STATE = ("ghost, means", "ghost, calibrated on self", "balanced, none", "balanced")  # not on the other axes
PAIRS = [  # (worse as expected, better as expected)
    ("random", "magnitude"),
    ("magnitude", "ghost"),
    ("tp:taylor", "ghost"),
    ("ghost, means", "ghost"),
    ("ghost, one-shot", "ghost"),
    ("ghost, calibrated on self", "ghost"),
    ("ghost", "balanced"),
    ("balanced, none", "balanced"),
]


@torch.no_grad()
def measure(model: Any, windows: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood and KL(dense || model) of each window, nats per token: (2, windows).

    windows: int64 (W, T). dense: the dense model's log-probabilities (W, T-1, V).
    """
    rows = []
    for start in range(0, len(windows), WINDOWS_PER_BATCH):
        at = slice(start, start + WINDOWS_PER_BATCH)
        logp = log_probabilities(model, windows[at], torch.ones_like(windows[at]))  # (W, T-1, V)
        nll = -logp.gather(-1, windows[at, 1:, None]).squeeze(-1)  # (W, T-1)
        kl = (dense[at].exp() * (dense[at] - logp)).sum(-1)  # (W, T-1)
        rows.append(torch.stack([nll, kl]).double().mean(-1))
    return torch.cat(rows, 1)


def perplexity_ratio(a: torch.Tensor, b: torch.Tensor) -> str:
    """Perplexity of a over that of b, with a paired bootstrap 95 % interval over windows. a, b: nats per token (W,)."""
    difference = a - b
    picks = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(0))
    low, high = difference[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=a.dtype)).exp().tolist()
    return f"{float(difference.mean().exp()):.3f} ({low:.3f} to {high:.3f})"


def cell(values: torch.Tensor, digits: int, perplexity: bool) -> str:
    """Mean over seeds, ± their standard deviation if there are several. values: nats per token (seeds, windows)."""
    means = values.mean(1).exp() if perplexity else values.mean(1)  # (seeds,)
    mean = f"{float(means.mean()):.{digits}f}"
    return f"{mean} ± {float(means.std()):.{digits}f}" if len(means) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mamba2-books-4m", help="a reference model, or a folder")
    parser.add_argument("--axis", default="state")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of the table's rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books-*.txt")
    given = parser.parse_args()
    data: Path = given.data
    labels = [row for row in given.rows if given.axis == "state" or row not in ONLY_STATE]

    model, tokenizer = sspruner.load(given.model, dtype="float32")
    size = {"seq_len": SEQ_LEN, "held_out": 0}
    windows = sspruner.calibration(
        data / "books-test.txt", model, tokenizer, samples=REPORTED_WINDOWS, seed=REPORTED_SEED, **size
    ).tokens
    calibrations = {
        (name, seed): sspruner.calibration(source, model, tokenizer, samples=CALIBRATION_WINDOWS, seed=seed, **size)
        for name, source in (("books-val", data / "books-val.txt"), ("self", "self"))
        if name != "self" or "ghost, calibrated on self" in labels
        for seed in given.seeds
    }
    with torch.no_grad():
        parts = windows.split(WINDOWS_PER_BATCH)
        dense = torch.cat([log_probabilities(model, part, torch.ones_like(part)) for part in parts])

    cost: dict[tuple[str, float], torch.Tensor] = {}  # (label, sparsity) -> (seeds, 2, windows)
    kept: dict[float, set[int]] = {}
    for label in labels:
        arguments = ROWS[label] | {"axis": given.axis}
        source = arguments.pop("source", "books-val")
        for sparsity in given.sparsities:
            runs = []
            for seed in given.seeds if label != "magnitude" else given.seeds[:1]:
                arguments |= {"seed": seed, "calibration": calibrations[source, seed]}
                result = sspruner.prune(model, sparsity=sparsity, mode="mask", **arguments)
                runs.append(measure(model, windows, dense))
                sspruner.unmask(model)
            kept[sparsity] = {selection.after for selection in result.plan.groups.values()}
            cost[label, sparsity] = torch.stack(runs)
            progress(f"{label}, {sparsity:.0%}: {cell(cost[label, sparsity][:, 0], 2, perplexity=True)}")

    head = [f"{s:.0%} (keeps {', '.join(map(str, sorted(kept[s])))})" for s in given.sparsities]
    dense_perplexity = float(measure(model, windows, dense)[0].mean().exp())
    rows = [[label, *[cell(cost[label, s][:, 0], 2, perplexity=True) for s in given.sparsities]] for label in labels]
    title = f"{given.model}: perplexity by {given.axis} cut; dense {dense_perplexity:.2f}"
    print(table(title, ["scorer", *head], rows))
    rows = [[label, *[cell(cost[label, s][:, 1], 4, perplexity=False) for s in given.sparsities]] for label in labels]
    print(table("KL to the dense model, nats per token", ["scorer", *head], rows))
    pairs = [(a, b) for a, b in PAIRS if a in labels and b in labels]
    nll = {key: value[:, 0].mean(0) for key, value in cost.items()}  # (windows,), mean over seeds
    rows = [[f"{a} / {b}", *[perplexity_ratio(nll[a, s], nll[b, s]) for s in given.sparsities]] for a, b in pairs]
    head = ["pair", *[f"{s:.0%}" for s in given.sparsities]]
    print(table("Perplexity ratio (95 % interval over windows); above 1: the first does more damage", head, rows))

    note = (
        f"seeds {tuple(given.seeds)} (random scorer, calibration), {REPORTED_SEED} (reported windows); "
        f"{CALIBRATION_WINDOWS} x {SEQ_LEN} tokens observed, {REPORTED_WINDOWS} x {SEQ_LEN} reported"
    )
    print("\n" + provenance(note))


if __name__ == "__main__":
    main()
