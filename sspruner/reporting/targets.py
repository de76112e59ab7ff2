"""What runtimes take of a model, as a table: the model as it is, and the sizes to which an axis may be cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sspruner.formats.fitting import Offer, runs

MANY = 4  # runs of sizes that are written out


def targets_table(offers: Sequence[Offer], *, with_plan: bool) -> RenderableType:
    """One row for each target; below, why a target does not take the model or an axis, and its notes."""
    table = Table(title="what each target takes", title_justify="left")
    table.add_column("")
    table.add_column("with the plan" if with_plan else "the model")
    table.add_column("may be cut, in every layer, to" if not with_plan else "may be cut further, in every layer, to")
    lines: dict[str, None] = {}
    for offer in offers:
        name = str(offer.target)
        cuts = [f"{axis} {sizes_in_words(sizes)}" for axis, sizes in offer.axes.items()]
        table.add_row(name, "cannot" if offer.reason else "fits", "\n".join(cuts) or "–")
        said = [*([offer.reason] if offer.reason else []), *offer.notes]
        said += [f"{axis}: {why}" for axis, why in offer.refused.items()]
        lines |= dict.fromkeys(f"{name}: {line.removeprefix(f'{name} ')}" for line in said)
    read = [offer.target.name for offer in offers if not offer.target.ran]
    if read:
        lines[f"not run here, read in their sources: {', '.join(read)}"] = None
    return Group(table, *map(Text, lines))


def sizes_in_words(sizes: tuple[int, ...]) -> str:
    """`64`, `4 to 124 in steps of 4`, `1 to 127`."""
    found = runs(sizes)
    words = [
        str(first) if first == last else f"{first} to {last}" + (f" in steps of {step}" if step > 1 else "")
        for first, last, step in found[-MANY:]
    ]
    return ", ".join([*(["…"] if len(found) > MANY else []), *words])
