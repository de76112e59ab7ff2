"""`make bench`: every table of docs/benchmarks.md, each by its own command, between its marks in it; pictures.

    python benchmarks/all.py --data ../shared/data
    python benchmarks/all.py --quick --work /tmp/quick      # that every command works; the page is left alone
    python benchmarks/all.py --large                        # beside them: 2.7B on disk, GHOST on the 130M shape

What a part prints is kept in the work folder, and a part that is there already is not run again. Two parts run at a
time, one thread each; those that measure time or memory run alone, after the others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import insert, progress
from figures import draw

HERE = Path(__file__).parent
PAGE, FIGURES = HERE.parent / "docs/benchmarks.md", HERE.parent / "docs/figures"
THREE = ("--sparsities", "0.25", "0.5", "0.75", "--seeds", "0", "1")
STATE = ("--rows", "random", "magnitude", "tp:taylor", "ghost", *THREE)
MAMBA1 = ("--rows", "random", "magnitude", "ghost", *THREE)
FEW = ("--rows", "magnitude", "--sparsities", "0.5", "--seeds", "0")


@dataclass(frozen=True)
class Part:
    """One section between marks. quick: arguments instead, to see that it runs; WORK in them is the work folder."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    timed: bool = False
    large: bool = False
    data: bool = True  # whether it takes --data
    before: str = ""  # the part whose files it needs
    drawn: bool = False  # whether a picture shows its numbers


def _recall(states: int, *size: str) -> tuple[Part, Part]:
    """A model that remembers, and what cuts of it remember."""
    model, training = f"WORK/recall-{states}", f"train_recall-{states}"
    made = ("--out", model, *size)
    few = (model, "--rows", "magnitude")
    return (
        Part(training, "train_recall", made, (*made, "--steps", "2"), data=False),
        Part(f"recall-{states}", "recall", (model,), few, data=False, before=training, drawn=True),
    )


RECALL = (*_recall(64), *_recall(128, "--state", "128", "--pairs", "48", "--vocabulary", "256"))
PARTS = (
    Part("damage.py", "damage", quick=FEW),
    Part(
        "damage.py, balanced",
        "damage",
        (
            "--rows",
            "magnitude",
            "ghost",
            "ghost, output",
            "balanced, none",
            "balanced",
            "--sparsities",
            "0.5",
            "0.75",
            "0.9",
            "0.97",
            "--seeds",
            "0",
            "1",
        ),
        FEW,
    ),
    Part(
        "damage.py, balanced, zamba2-books",
        "damage",
        (
            "zamba2-books",
            "--rows",
            "ghost",
            "balanced, none",
            "balanced",
            "--sparsities",
            "0.75",
            "0.9",
            "0.97",
            "--seeds",
            "0",
        ),
        ("zamba2-books", *FEW),
    ),
    Part("damage.py, head", "damage", ("--axis", "head", *STATE), ("--axis", "head", *FEW)),
    Part("damage.py, zamba2-books", "damage", ("zamba2-books", *STATE), ("zamba2-books", *FEW)),
    Part(
        "damage.py, zamba2-books, head",
        "damage",
        ("zamba2-books", "--axis", "head", *STATE),
        ("zamba2-books", "--axis", "head", *FEW),
    ),
    Part("damage.py, mamba1-books", "damage", ("mamba1-books", *MAMBA1), ("mamba1-books", *FEW)),
    Part(
        "damage.py, mamba1-books, channel",
        "damage",
        ("mamba1-books", "--axis", "channel", *MAMBA1),
        ("mamba1-books", "--axis", "channel", *FEW),
    ),
    *RECALL,
    Part(
        "joint.py",
        "joint",
        ("--windows", "16", "--keep", "13", "4", "--turns", "1", "3"),
        ("--windows", "2", "--keep", "4", "--turns", "1", "--tokens", "2", "64"),
    ),
    Part("refit.py", "refit"),
    Part("allocation.py", "allocation"),
    Part("auto.py", "auto"),
    Part("positions.py", "positions", drawn=True),
    Part("last_words.py", "last_words"),
    Part("calibration_size.py", "calibration_size", drawn=True),
    Part(
        "scorers.py",
        "scorers",
        ("--results", "WORK/scorers", "--seeds", "1", "--passages", "20", "--reported-windows", "16"),
        (
            "mamba2-books-4m",
            "--axis",
            "state",
            "--rows",
            "magnitude",
            "--results",
            "WORK/scorers",
            "--seeds",
            "1",
            "--passages",
            "2",
            "--reported-windows",
            "2",
        ),
    ),
    Part("reference.py", "reference", quick=("--windows", "2")),
    Part("published.py", "published"),
    Part(
        "projection_cost.py",
        "projection_cost",
        ("--repeats", "3"),
        ("--repeats", "1", "--shapes", "reference", "--batch", "1"),
        timed=True,
        data=False,
    ),
    Part("scoring_cost.py", "scoring_cost", ("--repeats", "3", "--model-repeats", "1"), timed=True),
    Part("scorer_cost.py", "scorer_cost", ("--repeats", "1"), timed=True),
    Part("decode.py", "decode", quick=("--layers", "2", "--repeats", "1"), timed=True, data=False),
    Part("gpu.py", "gpu", quick=("--batch", "1", "--repeats", "1", "--generate", "2"), timed=True, data=False),
    Part("tool_speed.py", "tool_speed", timed=True),
    Part("tool_speed.py --large", "tool_speed", ("--large",), ("--large", "--quick"), timed=True, large=True),
    Part(
        "offload",
        "offload",
        ("--folder", "WORK/offload"),
        ("--folder", "WORK/offload", "--layers", "2"),
        True,
        True,
        False,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the texts")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/sspruner-bench"), help="what parts printed")
    parser.add_argument("--quick", action="store_true", help="a little of each part; the page is left alone")
    parser.add_argument("--large", action="store_true", help="those that take long, too")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="some of them")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    usual = [p for p in PARTS if (given.large or not p.large) and (p.script != "gpu" or shutil.which("nvidia-smi"))]
    parts = [p for p in PARTS if p.name in given.parts] if given.parts else usual
    failed = []
    with ThreadPoolExecutor(2) as pool:
        for stage in (
            [p for p in parts if not p.timed and not p.before],
            [p for p in parts if not p.timed and p.before],
        ):
            failed += [
                p.name for p, good in zip(stage, pool.map(lambda p: run(p, given), stage), strict=True) if not good
            ]
    failed += [p.name for p in parts if p.timed and not run(p, given)]
    progress(f"{len(parts) - len(failed)} of {len(parts)} parts in {(time.perf_counter() - start) / 60:.1f} minutes")
    if not given.quick:
        draw(given.work, FIGURES)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(part: Part, given: argparse.Namespace) -> bool:
    """One part in a process of its own, unless its output is there; into the page. False where it failed."""
    out = given.work / f"{part.name.replace(', ', '-')}{'.quick' if given.quick else ''}.md"
    if not out.exists():
        arguments = [a.replace("WORK", str(given.work)) for a in (part.quick if given.quick else part.arguments)]
        if part.drawn and not given.quick:
            arguments += ["--json", str(given.work / f"{part.name.removesuffix('.py')}.json")]
        if part.data:
            arguments += ["--data", str(given.data)]
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(HERE / f"{part.script}.py"), *arguments],
            capture_output=True,
            text=True,
            env=os.environ if part.timed else os.environ | {"OMP_NUM_THREADS": "1"},
        )
        minutes = (time.perf_counter() - begun) / 60
        progress(f"{part.name}: {'done' if done.returncode == 0 else 'failed'}, {minutes:.1f} minutes")
        if done.returncode:
            progress(done.stderr[-2000:])
            return False
        out.write_text(done.stdout, encoding="utf-8")
    if not given.quick and part.script != "train_recall":
        insert(PAGE, part.name, out.read_text(encoding="utf-8"))
    return True


if __name__ == "__main__":
    main()
