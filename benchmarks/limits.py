"""The one command behind the sections Refit, Allocation, The scorer that costs least, and Limits of docs/benchmarks.md.

    python benchmarks/limits.py --data ../shared/data --threads 1
    python benchmarks/limits.py --quick --work /var/tmp/limits

Runs every part that the work folder has no numbers of yet, writes its table into the page, and draws the pictures. The
recall models are trained into the work folder, and kept there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import progress
from figures import draw

HERE = Path(__file__).parent
PAGE, FIGURES = HERE.parent / "docs/benchmarks.md", HERE.parent / "docs/figures"
PARTS = ("refit", "allocation", "auto", "positions", "last_words", "calibration_size")
RECALL = {
    64: [],
    128: ["--state", "128", "--pairs", "48", "--vocabulary", "256"],
}  # states -> arguments of its training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the texts")
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp/sspruner-limits"), help="numbers and trained models"
    )
    parser.add_argument("--quick", action="store_true", help="a few windows, to see that it runs; no table, no picture")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every part")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    threads = ["--threads", str(given.threads)]
    for part in PARTS:
        numbers = given.work / f"{part}.json"
        if given.quick:
            run(part, [*threads, "--data", str(given.data), "--quick"])
        elif not numbers.exists():
            run(part, [*threads, "--data", str(given.data), "--json", str(numbers), "--table", str(PAGE)])
    for states, size in RECALL.items() if not given.quick else ():
        model, numbers = given.work / f"recall-{states}", given.work / f"recall-{states}.json"
        if not model.exists():
            run("train_recall", [*threads, *size, "--out", str(model)])
        if not numbers.exists():
            run("recall", [str(model), *threads, "--json", str(numbers), "--table", str(PAGE)])
    if not given.quick:
        draw(given.work, FIGURES)


def run(script: str, arguments: list[str]) -> None:
    """One part, in a process of its own. Ends here if it fails."""
    progress(f"{script} {' '.join(arguments)}")
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *arguments], check=True)


if __name__ == "__main__":
    main()
