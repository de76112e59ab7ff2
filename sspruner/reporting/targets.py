"""Table of targets: whether each supports the model, and the sizes to which an axis may be cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sspruner.formats.fitting import Offer, runs

MANY = 4  # number of runs of sizes written out


def targets_table(offers: Sequence[Offer], *, with_plan: bool) -> RenderableType:
    """Return one row for each target; below, why a target does not support the model or an axis, and its notes."""
    table = Table(title="what each target takes", title_justify="left")
    table.add_column("")
    table.add_column("with the plan" if with_plan else "the model")
    table.add_column("may be cut, in every layer, to" if not with_plan else "may be cut further, in every layer, to")
    lines: dict[str, None] = {}
    for offer in offers:
        name = str(offer.target)
        cuts = [f"{axis} {sizes_in_words(sizes)}" for axis, sizes in offer.axes.items()]
        table.add_row(name, "cannot" if offer.reason else "fits", "\n".join(cuts) or "–")
        notes = [*([offer.reason] if offer.reason else []), *offer.notes]
        notes += [f"{axis}: {why}" for axis, why in offer.refused.items()]
        lines |= dict.fromkeys(f"{name}: {line.removeprefix(f'{name} ')}" for line in notes)
    lines |= {"how it is known, unless a line says otherwise: " + "; ".join(_known(offer) for offer in offers): None}
    return Group(table, *map(Text, lines))


def _known(offer: Offer) -> str:
    return f"{offer.target.name} {offer.target.known}"


def sizes_in_words(sizes: tuple[int, ...]) -> str:
    """Format sizes: `64`, `4 to 124 in steps of 4`, `1 to 127`."""
    size_runs = runs(sizes)
    words = [
        str(first) if first == last else f"{first} to {last}" + (f" in steps of {step}" if step > 1 else "")
        for first, last, step in size_runs[-MANY:]
    ]
    return ", ".join([*(["…"] if len(size_runs) > MANY else []), *words])
