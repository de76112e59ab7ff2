"""What every benchmark prints: a Markdown table, and the line that says how, when and where it was made."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(note: str) -> str:
    """The command that ran, the date, the machine, the versions, and `note` (seeds, repeats)."""
    import torch

    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    cores, threads = os.cpu_count(), torch.get_num_threads()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sspruner"))
    return (
        f"`{command}` · {datetime.date.today()} · {platform.machine()}, {cores} CPU cores, "
        f"{threads} torch threads · Python {platform.python_version()}, {versions} · {note}"
    )


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table under a bold title; all columns but the first are right-aligned."""
    head = list(head)
    lines = [f"\n**{title}**\n", head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines)


def progress(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


RESAMPLES = 10_000
MODELS = ("mamba2-books-4m", "zamba2-books", "mamba1-books")
STATE_CUTS = (
    ("random", (0.9,)),
    ("magnitude", (0.9,)),
    ("taylor", (0.9,)),
    ("ghost", (0.75, 0.9)),
    ("balanced", (0.75, 0.9, 0.97)),
)


def interval(values: Any) -> str:
    """Mean with a bootstrap 95 % interval, as exp: a ratio from differences of logarithms. values: (n,), fp64."""
    import torch

    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).exp().tolist()
    return f"{float(values.mean().exp()):.3f} ({low:.3f} to {high:.3f})"


def books(model: Any, tokenizer: Any, file: Path, windows: int, seq_len: int = 256, seed: int = 0) -> Any:
    """Seeded windows of one text, all observed: a Calibration."""
    import sspruner

    return sspruner.calibration(file, model, tokenizer, samples=windows, seq_len=seq_len, held_out=0, seed=seed)


def cuts(model: Any, data: Any, rows: Iterable[tuple[str, tuple[float, ...]]], options: Any = None) -> dict[Any, Any]:
    """(scorer, fraction of the state removed) -> plan, from one-shot scores of all scorers in one pass."""
    import sspruner

    rows, graph = list(rows), sspruner.trace(model)
    scores = sspruner.score(model, [name for name, _ in rows], calibration=data, options=options)
    return {(n, s): sspruner.plan(graph, scores[n], sparsity=s) for n, fractions in rows for s in fractions}


def state_cuts(model: str) -> list[tuple[str, tuple[float, ...]]]:
    """(scorer, fractions of the state) that the section on limits shows for a reference model."""
    return [row for row in STATE_CUTS if model != "mamba1-books" or row[0] != "balanced"]


def options(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments that the benchmarks of docs/benchmarks.md share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the texts")
    parser.add_argument("--quick", action="store_true", help="a few windows, to see that it runs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--table", type=Path, help=f"a page with the marks <!-- {name}: begin --> and end")
    return parser


def deliver(given: argparse.Namespace, name: str, text: str, numbers: Any) -> None:
    """Print the tables; put them and the numbers where the arguments say."""
    print(text)
    if given.table:
        insert(given.table, name, text)
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: there is no {begin} with an {end} after it")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
