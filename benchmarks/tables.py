"""The tables of experiments, from the cells that experiment.py measured; a function for each kind of table."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from common import Made, ratio, spread, table

if TYPE_CHECKING:
    from experiment import Cell, Found

NO = "–"


def damage(found: list[Found]) -> Made:
    """Perplexity and KL by row and cut, and ratios of perplexity of pairs of rows."""
    one = found[0]
    cuts = list(one.section.cuts)
    head = ["scorer", *[f"{cut} (keeps {_kept(one, cut)})" for cut in cuts]]
    title = f"{one.model}: perplexity by {one.section.axis} cut; dense {_perplexity([one.dense])}"
    text = table(title, head, [[row, *[_perplexity(one.cells[row, cut]) for cut in cuts]] for row in one.rows])
    kls = [[row, *[spread([float(c.kl.mean()) for c in one.cells[row, cut]], 4) for cut in cuts]] for row in one.rows]
    text += "\n" + table("KL to the dense model, nats per token", head, kls)
    pairs = [pair for pair in one.section.show["pairs"] if set(pair) <= set(one.rows)]
    rows = [[" / ".join(pair), *[_ratio(one, pair[0], pair[1], cut) for cut in cuts]] for pair in pairs]
    title = "Perplexity ratio (95 % interval over windows); above 1: the first does more damage"
    text += "\n" + table(title, ["pair", *cuts], rows)
    seeds = tuple(range(one.section.seeds))
    return text, f"seeds {seeds} (random scorer, calibration), 0 (reported windows); {_sizes(one)}", None


def published(found: list[Found]) -> Made:
    """Increases of perplexity that others published, beside ours for the same cuts."""
    one = found[0]
    show, dense, rows, numbers = one.section.show, _mean([one.dense]), [], {}
    for row in one.rows:
        for cut, theirs in zip(one.section.cuts, show["published"][row], strict=False):
            values = theirs / show["dense"] - 1, _mean(one.cells[row, cut]) / dense - 1
            numbers[f"{row} {cut}"] = dict(zip(("published", "ours"), values, strict=True))
            rows.append([f"{row}, {cut}", *[f"{100 * value:+.1f} %" for value in values]])
    head = ["scorer, state removed", *show["head"]]
    note = f"seed 0; {_sizes(one)}; published: {show['source']}, dense {show['dense']}"
    return table("Increase of perplexity, published and ours", head, rows), note, numbers


def allocation(found: list[Found]) -> Made:
    """One line for each cut, one column for each allocation."""
    rows, numbers = [], {}
    for one in found:
        for cut in one.section.cuts:
            cells = {row: one.cells[row, cut][0] for row in one.rows}
            label = f"{one.model} {one.section.axis}, {one.section.base['scorer']}, {cut}"
            numbers[label] = {row: _mean([cell]) for row, cell in cells.items()}
            shown = [f"{_perplexity([cell])} ({float(cell.kl.mean()):.4f})" for cell in cells.values()]
            sizes = list(cells.values())[-1].record["kept"]
            rows.append([label, _perplexity([one.dense]), *shown, f"{sizes[0]} to {sizes[-1]}"])
    head = ["cut", "dense", *found[0].rows, f"sizes, {found[0].rows[-1]}"]
    one = found[0]
    sizes = _sizes(one).replace("observed", "observed, the first 4,096 for curves")
    text = table("Perplexity (KL to dense, nats per token) by allocation", head, rows)
    return text, f"seed 0; {sizes}; one-shot", numbers


def auto(found: list[Found]) -> Made:
    """Every scorer on other text, and the one that costs least on the text that chooses."""
    texts, numbers = [], {}
    for one in found:
        cuts, beside = list(one.section.cuts), one.section.show["beside"]
        good = [row for row in one.rows if all("nll" in one.cells[row, cut][0] for cut in cuts)]
        rows = [[row, *[_perplexity(one.cells[row, cut]) for cut in cuts]] for row in good]
        took, costs = ["auto takes"], ["auto (over the best here)"]
        for cut in cuts:
            tried = {row: one.cells[row, cut][0] for row in good if row not in beside}
            took.append(min(tried, key=lambda row, tried=tried: float(tried[row].chosen.mean())))  # type: ignore[misc]
            own, best = _mean([tried[took[-1]]]), min(_mean([cell]) for cell in tried.values())
            costs.append(f"{own:.2f} ({own / best:.4f})")
        numbers[f"{one.model} {one.section.axis}"] = [*rows, took, costs]
        title = f"{one.model}, axis {one.section.axis}: perplexity on books-test; dense {_perplexity([one.dense])}"
        texts.append(table(title, ["scorer", *cuts], [*rows, took, costs]))
    sizes = _sizes(found[0]).replace("observed", "observed and chosen on")
    return "\n\n".join(texts), f"seed 0; {sizes}; one-shot scores", numbers


def last_words(found: list[Found]) -> Made:
    """How far off the last word of LAMBADA's passages is, in nats."""

    def error(values: torch.Tensor) -> str:
        return f"{float(values.mean()):.3f} ± {float(values.std()) / math.sqrt(len(values)):.3f}"

    texts: list[str] = []
    numbers: dict[str, Any] = defaultdict(dict)
    for one in found:
        dense = one.dense
        rows = [["dense", error(dense.word_nll), "", f"{100 * float(dense.word.mean()):.2f}"]]
        for (row, cut), (cell,) in one.cells.items():
            more = cell.word_nll - dense.word_nll
            rows.append([f"{row}, {cut}", error(cell.word_nll), error(more), f"{100 * float(cell.word.mean()):.2f}"])
            numbers[one.model][f"{row}, {cut}"] = float(more.mean())
        head = ["cut", "nats per last word", "more than dense, same passages", "hit, %"]
        texts.append(table(f"{one.model}: LAMBADA's last word", head, rows))
    note = f"seed 0; {_sizes(found[0])}; ± standard error over these; one-shot"
    return "\n\n".join(texts), note, numbers


def scorers(found: list[Found]) -> Made:
    """Perplexity, KL and the last word by row and cut of each axis, the ratio to one row, and why cells are missing."""
    made = "\n".join(_one_axis(one) for one in found)
    return made, "seeds 0 and up (random scorer, calibration), 0 (reported)", None


def _one_axis(one: Found) -> str:
    cuts, at, against = list(one.section.cuts), one.section.show["at"], one.section.show["against"]
    cells = [cell for row in one.cells.values() for cell in row]
    hit = any(cell.record["word"].count(True) for cell in (one.dense, *cells) if "word" in cell)
    kinds = {"ppl": ("nll", 0, 1), "KL": ("kl", 4, 1), "word": ("word_nll", 2, 1), "hit": ("word", 1, 100)}
    kinds = {name: kind for name, kind in kinds.items() if name != "hit" or hit}
    head = [
        "scorer",
        *[f"{name} {cut}" for name in kinds for cut in cuts],
        f"ppl {at} to that of {against}",
    ]
    lines = []
    for row in one.rows:
        line = [row, *[_perplexity(one.cells[row, cut]) for cut in cuts]]
        for key, digits, scale in list(kinds.values())[1:]:
            means = [one.mean(row, cut, key) for cut in cuts]
            line += [NO if values is None else f"{scale * float(values.mean()):.{digits}f}" for values in means]
        lines.append([*line, NO if row == against else _ratio(one, row, against, at)])
    word = f"{float(one.dense.word_nll.mean()):.2f} nats"
    title = f"{one.model}, {one.section.axis}: dense perplexity {_perplexity([one.dense])}, last word {word}"
    title += f", {100 * float(one.dense.word.mean()):.1f} % hit" if hit else ""
    made = table(title, head, lines) + "\n\n" + _how(one, cells)
    if not hit:
        made += f" No last word of the {one.section.passages} is hit, by the dense model or by any row."
    return made + "".join(f"\n\n– {line}" for line in _failures(one))


def _how(one: Found, cells: list[Cell]) -> str:
    """How and when the rows were made, and what the cuts keep."""
    made = [cell.record["made"] for cell in cells]
    dates = sorted({m["date"] for m in made})
    machine = Counter(m["machine"] for m in made).most_common(1)[0][0]
    kept = [f"{cut} {sizes}" for cut in one.section.cuts if "," not in (sizes := _kept(one, cut)) and sizes]
    passages = f"{one.section.reported['windows']} x 256 and {one.section.passages} passages reported"
    return (
        (f"Kept: {', '.join(kept)}. " if kept else "")
        + f"{one.section.observed['windows']} x 256 tokens observed, {passages}; "
        + f"{' to '.join({dates[0]: 0, dates[-1]: 0})}, {machine}."
    )


def _failures(one: Found) -> list[str]:
    """Why cells are missing: rows that failed with the same words share a line."""
    where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # words -> row -> cuts
    for (row, cut), cells in one.cells.items():
        for error in {cell.record["error"] for cell in cells if "error" in cell}:
            where[error][row].append(cut)
    lines = []
    for error, by_row in where.items():
        same: dict[str, list[str]] = defaultdict(list)  # cuts -> rows
        for row, cuts in by_row.items():
            same[", ".join(cuts)].append(row)
        parts = [f"{'; '.join(rows) if len(rows) < len(one.rows) else 'all'}, {cuts}" for cuts, rows in same.items()]
        lines.append(f"{' and '.join(parts)}: {' '.join(error.split())[:300]}")
    return lines


def _mean(cells: list[Cell]) -> float:
    """The perplexity of the first seed."""
    return float(cells[0].nll.mean().exp())


def _perplexity(cells: list[Cell]) -> str:
    """The mean over seeds, ± their standard deviation if there are several."""
    means = [float(cell.nll.mean().exp()) for cell in cells if "nll" in cell]
    if not means:
        return NO
    mean = sum(means) / len(means)
    return f"{mean:.1e}" if mean >= 1e6 else spread(means, 2 if mean < 200 else 0)


def _ratio(one: Found, row: str, against: str, cut: str) -> str:
    """The ratio of two rows' perplexities, with its interval; – where one of them is missing."""
    own, other = one.mean(row, cut, "nll"), one.mean(against, cut, "nll")
    return NO if own is None or other is None else ratio(own - other)


def _kept(one: Found, cut: str) -> str:
    """What is kept in the groups of a cut; nothing where rows differ."""
    found = {tuple(sorted(set(c.record["kept"]))) for row in one.rows for c in one.cells[row, cut] if "kept" in c}
    return ", ".join(map(str, found.pop())) if len(found) == 1 else ""


def _sizes(one: Found) -> str:
    """What was observed and reported, for provenance."""
    reported = f"{one.section.reported['windows']} x 256 reported" if one.section.reported else ""
    reported = reported or f"{one.section.passages} passages"
    return f"{one.section.observed['windows']} x 256 tokens observed, {reported}"
