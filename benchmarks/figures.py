"""Draw the pictures of the results from their tables: python benchmarks/figures.py docs FOLDER."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {
    "random": "#999999", "magnitude": "#E69F00", "taylor": "#56B4E9", "rrqr": "#CC79A7", "ghost": "#D55E00",
    "balanced": "#0072B2",
}  # fmt: skip
IN_TABLE_ONLY = ("ghost, output", "balanced, no weights", "rrqr", "magnitude, reconstruct")  # level with others
Table = tuple[str, list[str], dict[str, list[float]]]  # title, columns, rows


def draw(pages: Path, folder: Path) -> None:
    """Draw every picture, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(pages.rglob("*.md")))
    _recall([*_tables(text, "recall-64"), *_tables(text, "recall-128")], folder / "recall.png")
    _positions([*_tables(text, "positions")], folder / "positions.png")
    _calibration(next(_tables(text, "calibration_size")), folder / "calibration.png")


def _tables(page: str, part: str) -> Iterator[Table]:
    """Yield title, columns, and the first number of every cell by row, of the tables of a part."""
    text = page.partition(f"<!-- {part}: begin -->")[2].partition(f"<!-- {part}: end -->")[0]
    for found in re.finditer(r"^\*\*(.+)\*\*\n\n((?:\|.+\n)+)", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[2].splitlines())
        yield found[1], head[1:], {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows}


def _recall(found: list[Table], file: Path) -> None:
    figure, axes = _axes(len(found))
    for ax, (title, kept, rows) in zip(axes, found, strict=True):
        for label, values in rows.items():
            if label not in IN_TABLE_ONLY:
                ax.plot([int(k) for k in kept], values, label=label.replace(", output", ""), **_style(label))
        dense = float(title.split("dense ")[1].split()[0])
        ax.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
        ax.set(title=title.split(", Mamba2 with ")[1].split(" per")[0], xlabel="states kept", ylim=(0, 1.03))
        ax.set(ylabel="accuracy")
    _save(figure, axes, file)


def _positions(found: list[Table], file: Path) -> None:
    figure, axes = _axes(len(found))
    for ax, (title, columns, rows) in zip(axes, found, strict=True):
        for label, values in rows.items():
            name, part, length = [*label.split(", "), "", ""][:3]
            if length.endswith("256") and name not in ("random", "magnitude"):
                style = _style(name) | {"linestyle": {"75%": ":", "90%": "-", "97%": "--"}[part]}
                ax.plot([column.partition(" ")[2] for column in columns], values, label=f"{name}, {part}", **style)
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=title.partition(":")[0], xlabel="positions", ylabel="perplexity over dense")
        ax.tick_params(axis="x", labelrotation=30)
    _save(figure, axes, file)


def _calibration(found: Table, file: Path) -> None:
    dashes = {"from books-val": "-", "from WikiText-2": "--", "from self": ":"}
    sizes, (figure, axes) = [int(size.replace(",", "")) for size in found[1]], _axes(2)
    for ax, test in zip(axes, ("books", "WikiText-2"), strict=True):
        for label, values in found[2].items():
            name, part, on, source = label.split(", ")
            if on == f"on {test}" and part != "75%":
                style = _style(name) | {"linestyle": dashes[source], "alpha": 0.5 if part == "97%" else 1.0}
                ax.plot(sizes, values, label=f"{name}, {part}, {source}", **style)
        ax.set(title=f"tested on {test}", xlabel="calibration tokens", ylabel="increase of perplexity, %", xscale="log")
        ax.set_xticks(sizes, found[1])
        ax.minorticks_off()
        ax.axhline(0, color="0.7", linewidth=0.8)
    _save(figure, axes, file)


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, 3.6), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, axes: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=110, facecolor="white")
    pyplot.close(figure)


def _style(label: str) -> dict[str, Any]:
    line = "--" if "refit" in label else ":" if "reconstruct" in label else "-"
    return {"color": COLOURS[label.partition(",")[0]], "linestyle": line, "marker": "o", "markersize": 3.5}


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
