"""`make bench`: every table of the results in docs/, each by its own command, between its marks; pictures.

    python benchmarks/all.py damage refit                   # some parts
    python benchmarks/all.py --quick --work /tmp/quick      # that every part works; the pages are left alone

What a part prints is kept in the work folder, and a part that is there already is not run again. Two parts run at a
time, one thread each; those that measure time or memory run alone, after the others.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from common import progress
from figures import draw
from run import HERE, Part, arguments, read_parts

RUN, DOCS = HERE / "run.py", HERE.parent / "docs"
PARTS = read_parts()


def main() -> None:
    """Run parts, put what they print between the marks of the pages, and draw the pictures."""
    parser = arguments(str(__doc__))
    parser.add_argument("parts", nargs="*", metavar="PART", help="some of them; default: all that do not take long")
    parser.add_argument("--large", action="store_true", help="those that take long, too")
    parser.add_argument("--list", action="store_true", help="show the parts, and the file that makes each")
    given = parser.parse_args()
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    usual = [p for p in PARTS.values() if (given.large or not p.large) and (not p.gpu or shutil.which("nvidia-smi"))]
    parts = [PARTS[name] for name in given.parts] or usual
    if given.list:
        print("\n".join(f"{p.name}: {p.files[0].relative_to(HERE.parent)}" for p in parts))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    start, begun = time.perf_counter(), dict[str, Future[bool]]()
    with ThreadPoolExecutor(2) as pool:  # which begins parts in their order, so that none waits for one behind it
        for part in sorted((p for p in parts if not p.timed), key=lambda p: bool(p.after)):
            needed = [begun[name] for name in part.after if name in begun]
            begun[part.name] = pool.submit(run, part, given, needed)
    failed = [name for name, done in begun.items() if not done.result()]
    failed += [p.name for p in parts if p.timed and not run(p, given)]
    progress(f"{len(parts) - len(failed)} of {len(parts)} parts in {(time.perf_counter() - start) / 60:.1f} minutes")
    if not given.quick:
        for part in parts:
            if part.name not in failed and not part.trains:
                insert(part.name, output(part, given).read_text(encoding="utf-8"))
        draw(DOCS, DOCS / "figures")
        for picture in sorted((DOCS / "figures").glob("*.py")):
            subprocess.run([sys.executable, str(picture)], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def output(part: Part, given: argparse.Namespace) -> Path:
    """Return the file that keeps what a part printed."""
    return Path(given.work / f"{part.name}{'.quick' if given.quick else ''}.md")


def run(part: Part, given: argparse.Namespace, needed: Sequence[Future[bool]] = ()) -> bool:
    """Run a part in a process of its own, after those that it needs, unless its output is there. False: it failed."""
    wait(needed)
    out = output(part, given)
    if out.exists():
        return True
    arguments = [part.name, "--data", str(given.data), "--work", str(given.work), *["--quick"] * given.quick]
    environment = os.environ if part.timed else os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, env=environment)
    minutes = (time.perf_counter() - begun) / 60
    progress(f"{part.name}: {'done' if done.returncode == 0 else 'failed'}, {minutes:.1f} minutes")
    if done.returncode:
        progress(done.stderr[-2000:])
        return False
    out.write_text(done.stdout.replace(str(given.work), "WORK"), encoding="utf-8")
    return True


def insert(name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, on the one page that has them."""
    marked = re.compile(rf"(?<=<!-- {re.escape(name)}: begin -->\n).*?(?=<!-- {re.escape(name)}: end -->)", re.DOTALL)
    pages = [page for page in sorted(DOCS.rglob("*.md")) if marked.search(page.read_text(encoding="utf-8"))]
    if len(pages) != 1:
        raise SystemExit(f"the marks of {name} stand in {len(pages)} pages of {DOCS}, not in one")
    page, new = pages[0], f"{text.strip()}\n\n"
    page.write_text(marked.sub(lambda _: new, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
