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
SCALING = "scaling.py"  # has a page of its own
FEW = ("--rows", "magnitude", "--sparsities", "0.5", "--seeds", "0")
MODELS = ("mamba2-books-4m", "zamba2-books", "mamba1-books")


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
    after: tuple[str, ...] = ()  # the parts whose files it needs
    drawn: bool = False  # whether a picture shows its numbers


def _trained(states: int, *size: str, large: bool = False) -> Part:
    """A model that remembers, for other parts: it has no section."""
    made = ("--out", f"WORK/recall-{states}", "--state", str(states), *size)
    return Part(
        f"train_recall-{states}", "train_recall", made, (*made, "--steps", "2", "--pairs", "4"), large=large, data=False
    )


def _recall(states: int, large: bool = False) -> Part:
    """What cuts of it remember."""
    few = (f"WORK/recall-{states}", "--rows", "magnitude")
    needed = (f"train_recall-{states}",)
    return Part(f"recall-{states}", "recall", few[:1], few, large=large, data=False, after=needed, drawn=True)


def _scorers(model: str) -> Part:
    sizes = ("--results", "WORK/scorers", "--seeds", "1")
    few = (model, "--axis", "state", "--rows", "magnitude", *sizes, "--passages", "2", "--reported-windows", "2")
    return Part(f"scorers.py, {model}", "scorers", (model, *sizes, "--passages", "20", "--reported-windows", "16"), few)


COMPARED = ("train_recall-64", "train_recall-32", "train_recall-16")
PARTS = (
    _trained(64),
    _trained(32),
    _trained(16),
    *map(_scorers, MODELS),
    Part("damage.py", "damage", quick=FEW),
    Part("calibration_size.py", "calibration_size", drawn=True),
    Part("auto.py", "auto"),
    Part("refit.py", "refit"),
    Part("allocation.py", "allocation"),
    Part("positions.py", "positions", drawn=True),
    Part("reference.py", "reference", ("--windows", "80"), ("--windows", "2")),
    Part("last_words.py", "last_words"),
    Part(
        "joint.py",
        "joint",
        ("--windows", "16", "--keep", "13", "4", "--turns", "1", "3"),
        ("--windows", "2", "--keep", "4", "--turns", "1", "--tokens", "2", "64"),
    ),
    Part("published.py", "published"),
    _trained(128, "--pairs", "48", "--vocabulary", "256", large=True),
    _recall(64),
    Part("compare.py", "compare", ("--recall", "WORK"), ("--recall", "WORK", "--quick"), after=COMPARED),
    _recall(128, large=True),
    Part(
        "distil.py",
        "distil",
        ("--results", "WORK/training"),
        ("--quick", "--results", "WORK/training-quick"),
        large=True,
    ),
    Part(
        "gradual.py",
        "gradual",
        ("--results", "WORK/training", "--threads", "1"),
        ("--quick", "--results", "WORK/training-quick"),
        timed=True,
        large=True,
        after=("distil.py",),
    ),
    Part(
        "projection_cost.py",
        "projection_cost",
        ("--threads", "1", "--repeats", "3", "--batch", "1", "16"),
        ("--repeats", "1", "--shapes", "reference", "--batch", "1"),
        timed=True,
        data=False,
    ),
    Part("scoring_cost.py", "scoring_cost", ("--repeats", "3", "--model-repeats", "1"), timed=True),
    Part(
        "scorer_cost.py",
        "scorer_cost",
        ("--models", "mamba2-books-4m", "--repeats", "1"),
        ("--models", "mamba2-books-4m", "--repeats", "1", "--rows", "magnitude"),
        timed=True,
    ),
    Part(
        "scorer_cost.py, other models",
        "scorer_cost",
        ("--models", "mamba1-books", "130M", "--repeats", "1"),
        ("--models", "mamba1-books", "--repeats", "1", "--rows", "magnitude"),
        timed=True,
        large=True,
    ),
    Part(
        "decode.py",
        "decode",
        ("--threads", "1", "--repeats", "3"),
        ("--layers", "2", "--repeats", "1"),
        timed=True,
        data=False,
    ),
    Part("shift.py", "shift"),
    Part("twist.py", "twist", ("--results", "WORK/training"), ("--quick", "--results", "WORK/training"), large=True),
    Part(SCALING, "scaling", ("--threads", "1"), timed=True, data=False),
    Part("gpu.py", "gpu", quick=("--batch", "1", "--repeats", "1", "--generate", "2"), timed=True, data=False),
    Part("tool_speed.py", "tool_speed", ("--repeats", "2"), timed=True),
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
            [p for p in parts if not p.timed and not p.after],
            [p for p in parts if not p.timed and p.after],
        ):
            failed += [
                p.name for p, good in zip(stage, pool.map(lambda p: run(p, given), stage), strict=True) if not good
            ]
    failed += [p.name for p in parts if p.timed and not run(p, given)]
    progress(f"{len(parts) - len(failed)} of {len(parts)} parts in {(time.perf_counter() - start) / 60:.1f} minutes")
    if not given.quick:
        for part in parts:
            if part.name not in failed and part.script != "train_recall":
                page = PAGE.with_name("scaling.md") if part.name == SCALING else PAGE
                insert(page, part.name, output(part, given).read_text(encoding="utf-8"))
        draw(given.work, FIGURES)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def output(part: Part, given: argparse.Namespace) -> Path:
    return Path(given.work / f"{part.name.replace(', ', '-')}{'.quick' if given.quick else ''}.md")


def run(part: Part, given: argparse.Namespace) -> bool:
    """One part in a process of its own, unless its output is there. False where it failed."""
    out = output(part, given)
    if out.exists():
        return True
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
    out.write_text(done.stdout.replace(str(given.work), "WORK"), encoding="utf-8")
    return True


if __name__ == "__main__":
    main()
