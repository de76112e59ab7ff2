"""The pictures of docs/benchmarks.md, from the numbers that the parts of `all.py` wrote.

python benchmarks/figures.py /var/tmp/sspruner-bench docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {
    "random": "#999999", "magnitude": "#E69F00", "taylor": "#56B4E9", "rrqr": "#CC79A7", "ghost": "#D55E00",
    "balanced": "#0072B2",
}  # fmt: skip


def draw(work: Path, folder: Path) -> None:
    """Every picture whose numbers are there, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.json"))}
    if recalls := [numbers[name] for name in ("recall-64", "recall-128") if name in numbers]:
        _save(_recall(recalls), folder / "recall.png")
    if "positions" in numbers:
        _save(_positions(numbers["positions"]), folder / "positions.png")
    if "calibration_size" in numbers:
        _save(_calibration(numbers["calibration_size"]), folder / "calibration.png")


def _axes(count: int, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, height), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def _style(label: str) -> dict[str, Any]:
    name = label.partition(",")[0]
    return {"color": COLOURS[name], "linestyle": "--" if "refit" in label else "-", "marker": "o", "markersize": 3.5}


def _recall(found: list[dict[str, Any]]) -> Any:
    figure, axes = _axes(len(found))
    for ax, one in zip(axes, found, strict=True):
        for label, by_kept in one["accuracy"].items():
            if label not in ("ghost, output", "balanced, no weights", "rrqr"):  # level with others: in the table
                means = [mean for mean, _ in by_kept.values()]
                ax.plot([int(k) for k in by_kept], means, label=label.replace(", output", ""), **_style(label))
        ax.axhline(one["dense"][0], color="black", linewidth=0.8, linestyle=":", label="dense")
        title = f"{one['pairs']} pairs, {one['states']} states"
        ax.set(title=title, xlabel="states kept", ylabel="accuracy", ylim=(0, 1.03))
    return _legend(figure, axes)


def _positions(found: dict[str, dict[str, list[float]]]) -> Any:
    labels = ("to 128", "to 256", "to 512", "to 1024", "to 2048")
    figure, axes = _axes(len(found))
    for ax, (model, rows) in zip(axes, found.items(), strict=True):
        for label, values in rows.items():
            cut, _, length = label.rpartition(", calibrated at ")
            if length == "256" and cut.partition(",")[0] not in ("random", "magnitude"):
                dashes = {"75%": ":", "90%": "-", "97%": "--"}[cut.partition(", ")[2]]
                ax.plot(labels, values, label=cut, **_style(cut) | {"linestyle": dashes})
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=model, xlabel="positions", ylabel="perplexity over dense")
        ax.tick_params(axis="x", labelrotation=30)
    return _legend(figure, axes)


def _calibration(found: dict[str, dict[str, dict[str, list[float]]]]) -> Any:
    lines, cuts = {"books-val": "-", "WikiText-2": "--", "self": ":"}, ("ghost, 90%", "balanced, 90%", "balanced, 97%")
    figure, axes = _axes(2)
    for ax, test in zip(axes, ("books", "WikiText-2"), strict=True):
        for cut, source in [(cut, source) for cut in cuts for source in lines]:
            by_size = found[f"{cut}, on {test}"][source]
            style = _style(cut) | {"linestyle": lines[source], "alpha": 0.5 if "97%" in cut else 1.0}
            means = [sum(values) / len(values) for values in by_size.values()]
            ax.plot([int(n) for n in by_size], means, label=f"{cut}, from {source}", **style)
        ax.set(title=f"tested on {test}", xlabel="calibration tokens", ylabel="increase of perplexity, %", xscale="log")
        ax.set_xticks([int(n) for n in by_size], [f"{int(n):,}" for n in by_size])
        ax.minorticks_off()
        ax.axhline(0, color="0.7", linewidth=0.8)
    return _legend(figure, axes)


def _legend(figure: Any, axes: Any) -> Any:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
