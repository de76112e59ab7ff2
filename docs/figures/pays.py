"""Draw what half of the state can gain against the batch, for light and for dark paper: python docs/figures/pays.py.

Its numbers are those of the table of speed-ups of the page "When it pays"; `make bench` draws it anew with the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WAY = "half of the state"
#: Row of the table -> its name in the picture, its colour on light paper, and on dark.
LINES = {
    "mamba2-130m": ("Mamba2-130M", "#B84F00", "#F0883E"),
    "mamba2-1.3b": ("Mamba2-1.3B", "#B84F00", "#F0883E"),
    "Nemotron-H-8B, 2k": ("Nemotron-H-8B, 2k tokens", "#0072B2", "#58A6FF"),
    "Nemotron-H-8B, 32k": ("Nemotron-H-8B, 32k", "#0072B2", "#58A6FF"),
    "Nemotron-H-8B, 128k": ("Nemotron-H-8B, 128k", "#0072B2", "#58A6FF"),
    "Granite-4.0-H-Small, 2k": ("Granite-4.0-H-Small (MoE), 2k", "#00735A", "#2BBF9A"),
}
PAPERS = {"light": ("#1F2328", "#D8DEE4", 1), "dark": ("#E6EDF3", "#3D444D", 2)}  # ink, grid, place of the colours
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


def draw(batches: list[int], found: dict[str, list[float]], file: Path, paper: str) -> None:
    """Draw speed-up against batch, with a name at each line instead of a legend."""
    from matplotlib import pyplot

    ink, grid, place = PAPERS[paper]
    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    style |= {"svg.hashsalt": "sspruner", "font.size": 12, "axes.edgecolor": grid}
    with pyplot.rc_context(style):
        figure, ax = pyplot.subplots(figsize=(7.4, 3.6), layout="constrained")
        names = heights({row: values[-1] for row, values in found.items()})
        for row, (name, *colours) in LINES.items():
            colour, values = colours[place - 1], found[row]
            ax.plot(batches, values, color=colour, marker="o", markersize=5, linewidth=2)
            ax.annotate(f"{name}: {values[-1]:.2f}", (batches[-1] * 1.15, names[row]), color=colour, va="center")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="sequences that decode at once", ylabel="times as fast, at most")
        ax.set(xlim=(batches[0] * 0.9, batches[-1] * 14), ylim=(0.97, 2.03))
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.minorticks_off()
        ax.grid(True, axis="y", color=grid, linewidth=0.6)
        ax.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Draw both pictures beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    batches, found = curves((HERE.parent / "when-it-pays.md").read_text(encoding="utf-8"))
    for paper in PAPERS:
        draw(batches, found, HERE / f"pays-{paper}.svg", paper)


if __name__ == "__main__":
    main()
