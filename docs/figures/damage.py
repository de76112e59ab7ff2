"""Draw the picture of the README and of the first page, for light and for dark paper: python docs/figures/damage.py.

Its numbers are those of the table `reconstruct` of the results; `make bench` draws it anew with the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paper import BLUE, GREEN, HERE, ORANGE, draw_both

Curve = dict[int, tuple[float, float, float]]  # states kept -> increase of perplexity in %, low, high
#: Column of the table -> its name in the picture, and its colours.
LINES = {
    "none": ("GHOST", ORANGE),
    "reconstruct": ("reconstructed", GREEN),
    "balanced": ("balanced", BLUE),
}


def curves(text: str) -> dict[str, Curve]:
    """Return the increase of perplexity of Mamba2, by column of the table and states kept."""
    part = text.partition("<!-- reconstruct: begin -->")[2].partition("<!-- reconstruct: end -->")[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in part.splitlines() if line.startswith("|"))
    found: dict[str, Curve] = {column: {} for column in LINES}
    for row in rows:
        if kept := re.fullmatch(r"mamba2-books-4m state, (\d+) of 128", row[1]):
            for column in LINES:
                value, low, high, *_ = map(float, re.findall(r"[+-][\d.]+(?=%)", row[head.index(column)]))
                found[column][int(kept[1])] = value, low, high
    return found


def main(folder: Path = HERE) -> None:
    """Draw damage against states kept, with a name at each line instead of a legend."""
    found = curves("".join(page.read_text(encoding="utf-8") for page in sorted(HERE.parent.rglob("*.md"))))

    def lines(ax: Any, number: int) -> None:
        for column, (name, colours) in LINES.items():
            kept, (values, low, high) = list(found[column]), zip(*found[column].values(), strict=True)
            colour, label = colours[number], f"{name} +{values[-1]:.1f} %"
            ax.fill_between(kept, low, high, color=colour, alpha=0.25, linewidth=0)
            ax.plot([128, *kept], [0, *values], color=colour, marker="o", markersize=5, linewidth=2)
            ax.annotate(label, (kept[-1], values[-1]), (9, 6), textcoords="offset points", color=colour)
        ax.set(xlabel="states kept, of 128 (band: 95 % interval)", ylabel="increase of perplexity, %")
        ax.set(xlim=(140, 3.6), ylim=(-0.5, 13.5))

    ticks = [128, *sorted({k for curve in found.values() for k in curve}, reverse=True)]
    draw_both(folder / "damage", (6.6, 3.3), ticks, lines)


if __name__ == "__main__":
    main()
