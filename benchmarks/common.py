"""What every benchmark prints: a Markdown table, and the line that says how, when and where it was made."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def provenance(note: str) -> str:
    """The command that ran, the date, the machine, the versions, and `note` (seeds, repeats)."""
    import torch

    cores, threads = os.cpu_count(), torch.get_num_threads()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sspruner"))
    return (
        f"`python {shlex.join(sys.argv)}` · {datetime.date.today()} · {platform.machine()}, {cores} CPU cores, "
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


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: there is no {begin} with an {end} after it")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
