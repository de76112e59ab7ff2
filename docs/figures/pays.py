"""Draw what half of the state can gain against the batch, for light and for dark paper: python docs/figures/pays.py.

Its numbers are those of the table of speed-ups of the page "When it pays"; `make bench` draws it anew with the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paper import BLUE, GREEN, HERE, ORANGE, draw_both

WAY = "half of the state"
#: Row of the table -> its name in the picture, and its colours.
LINES = {
    "mamba2-130m": ("Mamba2-130M", ORANGE),
    "mamba2-1.3b": ("Mamba2-1.3B", ORANGE),
    "Nemotron-H-8B, 2k": ("Nemotron-H-8B, 2k tokens", BLUE),
    "Nemotron-H-8B, 32k": ("Nemotron-H-8B, 32k", BLUE),
    "Nemotron-H-8B, 128k": ("Nemotron-H-8B, 128k", BLUE),
    "Granite-4.0-H-Small, 2k": ("Granite-4.0-H-Small (MoE), 2k", GREEN),
}
APART = 0.06  # of two names, in times as fast


def curves(text: str) -> tuple[list[int], dict[str, list[float]]]:
    """Return the batches, and by row of the table how many times as fast half of the state can be."""
    part = text.partition("<!-- pays: begin -->")[2].partition("<!-- pays: end -->")[0]
    title, rows = re.findall(r"^\*\*(At most so many times as fast.*)\*\*\n\n((?:\|.*\n)+)", part, re.MULTILINE)[0]
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines())
    found = {line[0]: [float(x) for x in line[head.index(WAY)].split(" / ")] for line in lines}
    return [int(x) for x in title.partition("batch ")[2].split(" / ")], {row: found[row] for row in LINES}


def heights(values: dict[str, float]) -> dict[str, float]:
    """Return where names stand: at their values, but no two nearer than APART. From the lowest to the highest."""
    placed, last = {}, 0.0
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        placed[name] = last = max(value, last + APART)
    return placed


def main(folder: Path = HERE) -> None:
    """Draw speed-up against batch, with a name at each line instead of a legend."""
    batches, found = curves((HERE.parent / "when-it-pays.md").read_text(encoding="utf-8"))

    def lines(ax: Any, number: int) -> None:
        names = heights({row: values[-1] for row, values in found.items()})
        for row, (name, colours) in LINES.items():
            colour, values = colours[number], found[row]
            ax.plot(batches, values, color=colour, marker="o", markersize=5, linewidth=2)
            ax.annotate(f"{name}: {values[-1]:.2f}", (batches[-1] * 1.15, names[row]), color=colour, va="center")
        ax.set(xlabel="sequences that decode at once", ylabel="times as fast, at most")
        ax.set(xlim=(batches[0] * 0.9, batches[-1] * 14), ylim=(0.97, 2.03))

    draw_both(folder / "pays", (7.4, 3.6), batches, lines)


if __name__ == "__main__":
    main()
