"""Draw one picture for light and one for dark paper: axes in the style of both, with names at the lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: Paper -> the colours of the text and of the grid.
INKS = {"light": ("#1F2328", "#D8DEE4"), "dark": ("#E6EDF3", "#3D444D")}
#: Colours of lines: on light paper, and on dark.
ORANGE, GREEN, BLUE = ("#B84F00", "#F0883E"), ("#00735A", "#2BBF9A"), ("#0072B2", "#58A6FF")


def draw_both(file: Path, size: tuple[float, float], ticks: list[int], lines: Callable[[Any, int], None]) -> None:
    """Write FILE-light.svg and FILE-dark.svg.

    size: in inches. ticks: of the x axis, powers of two. lines: draws on axes; it is given them, and which of the two
    colours of a line this paper wants.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for number, (paper, (ink, grid)) in enumerate(INKS.items()):
        style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style |= {"svg.hashsalt": "sspruner", "font.size": 12, "axes.edgecolor": grid}
        with pyplot.rc_context(style):
            figure, ax = pyplot.subplots(figsize=size, layout="constrained")
            ax.set_xscale("log", base=2)
            lines(ax, number)
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.minorticks_off()
            ax.grid(True, axis="y", color=grid, linewidth=0.6)
            ax.spines[["top", "right", "left"]].set_visible(False)
            figure.savefig(f"{file}-{paper}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)
