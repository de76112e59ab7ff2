"""Draw the tables of experiments, from the cells that experiment.py measured: a function for each kind of table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import commands
from common import NO, Made, perplexity, ratio, spread, table, with_error
from experiment import Cell, Found, Section, run

Rows = list[list[str]]
Show = Callable[[Found, str, str], str]
RATIO = "Perplexity ratio (95 % interval over windows); "
LEAST = 0.005  # a share of less damage than this is a ratio to nothing


def tables(s: Any) -> Made:
    """Run an experiment, and draw its tables; or a command's recipe."""
    if hasattr(commands, s.file.stem):
        command: Made = getattr(commands, s.file.stem)(s)
        return command
    experiment, found = run(s)
    made: list[str] = globals()[experiment.table](found)
    return made, note(found[0].section, experiment.note)


def note(section: Section, more: str) -> str:
    """Return what was observed and reported, and what the experiment says of itself."""
    observed = f"{section.observed['windows']} windows observed, " if "windows" in section.observed else ""
    reported = section.reported.get("windows", f"{section.passages} passages")
    return f"seed 0; {observed}{reported} reported; {more}"


def damage(found: list[Found]) -> list[str]:
    """Draw perplexity and KL by row and cut, and ratios of perplexity of pairs of rows."""
    (one,) = found
    cuts, pairs = list(one.section.cuts), [pair for pair in one.section.show["pairs"] if set(pair) <= set(one.rows)]
    head = ["scorer", *[f"{cut} (keeps {kept(one, cut)})" for cut in cuts]]
    return [
        table(f"{one.model}: perplexity by {one.section.axis} cut; dense {dense(one)}", head, grid(one, ppl)),
        table("KL to the dense model, nats per token", head, grid(one, kl)),
        table(f"{RATIO}above 1: the first does more damage", ["pair", *cuts], [ratios(one, *pair) for pair in pairs]),
    ]


def published(found: list[Found]) -> list[str]:
    """Draw increases of perplexity that others published, beside those of our models for the same cuts."""
    show, rows = found[0].section.show, []
    for row in found[0].rows:
        for number, cut in enumerate(found[0].section.cuts):
            theirs = 100 * (show["published"][row][number] / show["dense"] - 1)
            ours = [increases(one, row, cut).partition(",")[0] for one in found]
            rows.append([f"{row}, {cut}", f"{theirs:+.1f} %", *ours])
    title = "Increase of perplexity, published and ours (95 % interval over windows)"
    return [table(title, ["scorer, state removed", show["head"], *[one.model for one in found]], rows)]


def stored(found: list[Found]) -> list[str]:
    """Draw KL first, then perplexity, by how recurrent states are stored and by cut."""
    (one,) = found
    kinds: dict[str, Show] = {"KL to the dense model, nats per token": partial(value, "kl", 5, 1)}
    kinds[f"perplexity; dense {dense(one)}"] = ppl
    return [table(f"{one.model}: {t}", ["stored in", *one.section.cuts], grid(one, show)) for t, show in kinds.items()]


def allocation(found: list[Found]) -> list[str]:
    """Draw one line for each cut, one column for each allocation."""
    rows, names = [], found[0].rows
    for one, cut in ((part, cut) for part in found for cut in part.section.cuts):
        label, last = f"{one.model} {one.section.axis}, {one.section.base['scorer']}, {cut}", one.cells[names[-1], cut]
        ends = f"{last[0].record['kept'][0]} to {last[0].record['kept'][-1]}"
        rows.append([label, dense(one), *(f"{ppl(one, row, cut)} ({kl(one, row, cut)})" for row in names), ends])
    head = ["cut", "dense", *names, f"sizes, {names[-1]}"]
    return [table("Perplexity (KL to dense, nats per token) by allocation", head, rows)]


def refit(found: list[Found]) -> list[str]:
    """Draw one line for each cut, one column for each refit: the increase of perplexity, and that on a second text."""
    names = list(dict.fromkeys(row for one in found for row in one.rows))
    each = [(one, cut, f"{one.model} {one.section.axis}, {cut}") for one in found for cut in one.section.cuts]
    rows = [[label, dense(one), *(increases(one, row, cut) for row in names)] for one, cut, label in each]
    return [table("Increase of perplexity (95 % interval), KL; then on other text", ["cut", "dense", *names], rows)]


def increases(one: Found, row: str, cut: str) -> str:
    """Write the increase of perplexity of a cell with its KL, and the increase on the second text, if there is one."""
    if (row, cut) not in one.cells:
        return NO
    (cell,) = one.cells[row, cut]
    first, *second = (ratio(getattr(cell, on) - getattr(one.dense, on), True) for on in ("nll", "also") if on in cell)
    return "; ".join([f"{first}, {float(cell.kl.mean()):.4f}", *second])


def modules(found: list[Found]) -> list[str]:
    """Draw what it costs to remove elements of one module, a table for each model."""
    title = "{}: increase of perplexity and KL by the module whose elements are removed; dense {}"
    return [
        table(title.format(one.model, dense(one)), ["module", *one.section.cuts], grid(one, increases)) for one in found
    ]


def reference(found: list[Found]) -> list[str]:
    """Draw the dense models' perplexity on two texts, and that of a cut on one."""
    section, rows = found[0].section, []
    for one, cut in ((part, cut) for part in found for cut in part.section.cuts):
        cells = f"{perplexity(one.dense.record['also']):.2f}", dense(one), ppl(one, one.rows[0], cut)
        rows.append([f"{one.model}, {one.section.dtype}", *cells])
    files = [text["file"] for text in (section.also, section.reported)]
    title = f"Perplexity, first {section.reported['windows'] * 256:,} tokens"
    return [table(title, ["run in", *files, f"{files[1]}, 75% cut by ghost"], rows)]


def auto(found: list[Found]) -> list[str]:
    """Draw every scorer on other text, and the one that costs least on the text that chooses."""
    made = []
    for one in found:
        rows = [row for row in grid(one, ppl) if NO not in row]
        took, costs = ["auto takes"], ["auto (over the best here)"]
        for cut in one.section.cuts:
            tried = {row: one.cells[row, cut][0] for row, *_ in rows if row not in one.section.show["beside"]}
            took.append(min(tried, key=lambda row, tried=tried: float(tried[row].also.mean())))  # type: ignore[misc]
            own, best = mean(tried[took[-1]]), min(map(mean, tried.values()))
            costs.append(f"{own:.2f} ({own / best:.4f})")
        title = f"{one.model}, axis {one.section.axis}: perplexity on books-test; dense {dense(one)}"
        made.append(table(title, ["scorer", *one.section.cuts], [*rows, took, costs]) + reasons(one))
    return made


def last_words(found: list[Found]) -> list[str]:
    """Draw how far off the last word of LAMBADA's passages is, in nats."""
    made, head = [], ["cut", "nats per last word", "more than dense, same passages", "hit, %"]
    for one in found:
        rows = [["dense", with_error(one.dense.word_nll), "", f"{100 * float(one.dense.word.mean()):.2f}"]]
        for (row, cut), (cell,) in one.cells.items():
            values = with_error(cell.word_nll), with_error(cell.word_nll - one.dense.word_nll)
            rows.append([f"{row}, {cut}", *values, f"{100 * float(cell.word.mean()):.2f}"])
        made.append(table(f"{one.model}: LAMBADA's last word", head, rows))
    return made


def positions(found: list[Found]) -> list[str]:
    """Draw perplexity over the dense model's by position, a table for each model; sections are lengths of windows."""
    made, ends = [], found[0].section.show["ends"]
    head = ["cut", *[f"{a + 1} to {b}" for a, b in zip((0, *ends[:-1]), ends, strict=True)]]
    for model in dict.fromkeys(one.model for one in found):
        parts = [one for one in found if one.model == model]
        rows = [["dense, perplexity", *[f"{float(nll.mean().exp()):.2f}" for nll in parts[0].dense.nll.T]]]
        for part in parts:
            for (row, cut), (cell,) in part.cells.items():
                label = f"{row}, {cut}, calibrated at {part.section.observed['seq_len']}"
                rows.append([label, *map(ratio, (cell.nll - part.dense.nll).T)])
        title = f"{model}: perplexity over the dense model's, by position (95 % interval over windows)"
        made.append(table(title, head, rows))
    return made


def calibration_size(found: list[Found]) -> list[str]:
    """Draw the increase of perplexity on two texts, by source and size of the calibration text."""
    (one,) = found
    rows, shown = Rows(), []

    def increase(key: str, one: Found, row: str, cut: str) -> str:
        start = perplexity(one.dense.record[key])
        return spread([100 * (perplexity(cell.record[key]) / start - 1) for cell in one.cells[row, cut]])

    for test, key in {"books": "nll", "WikiText-2": "also"}.items():
        made = grid(one, partial(increase, key))
        rows += [[row.replace(", from", f", on {test}, from"), *cells] for row, *cells in made]
        shown.append(f"{test} {perplexity(one.dense.record[key]):.2f}")
    title = f"Increase of perplexity, %, by calibration tokens (dense: {', '.join(shown)})"
    return [table(title, ["cut and calibration", *one.section.cuts], rows)]


def recall(found: list[Found]) -> list[str]:
    """Draw accuracy on associative recall by row and states kept; of the random scorer the mean over seeds."""
    (one,) = found

    def right(one: Found, row: str, cut: str) -> str:
        values = one.mean(row, cut, "right")
        return NO if values is None else with_error(values)

    title = f"Associative recall, {one.section.show['model']}: accuracy by states kept; dense "
    return [table(title + with_error(one.dense.right), ["scorer", *one.section.cuts], grid(one, right))]


def distil(found: list[Found]) -> list[str]:
    """Draw what training takes back, ratios to the dense model trained alike, and learning rates that were tried."""
    one, *tried = found
    untrained, *budgets = one.section.cuts
    start, shown, pairs, rows = mean(one.dense), Rows(), Rows(), Rows()
    for row, how in one.section.rows_of(one.model).items():
        before = mean(one.cells[row, untrained][0])
        cost, cells = before - start, []
        for cell in [one.cells.get((row, cut), [None])[0] for cut in budgets]:
            share = f" ({100 * (before - mean(cell)) / cost:.0f}%)" if cell and cost > LEAST * start else ""
            cells.append(f"{mean(cell):.2f}{share}" if cell else NO)
        shown.append([row, f"{before:.2f}", f"{100 * cost / start:+.2f}%" if "against" in how else NO, *cells])
        pairs += [[row, *ratios(one, row, how["against"])[1:]]] if "against" in how else []
    for part in tried:
        (row,), ways = part.rows, part.section.cuts
        values = {cut: perplexity(part.cells[row, cut][0].record["also"]) for cut in ways}
        rates = {cut: how["train"]["rate"] for cut, how in ways.items() if "train" in how}
        cells = [f"{values[cut]:.2f} at {rate:g}" for cut, rate in rates.items()]
        rows.append([row, f"{values[untrained]:.2f}", *cells, f"{rates[min(rates, key=values.__getitem__)]:g}"])
    title = "Perplexity of the cut over that of the dense model, both trained for the same tokens (95 % interval)"
    tried_head = ["cut", untrained, "first", "second", "third", "chosen"]
    return [
        table(f"Perplexity after training (share of the damage that it took back); dense {start:.2f}",
              ["cut", untrained, "damage", *budgets], shown),
        table(title, ["cut", "neither trained", *budgets], pairs),
        table(f"Perplexity on books-val.txt after {budgets[0]}, by learning rate", tried_head, rows),
    ]  # fmt: skip


def gradual(found: list[Found]) -> list[str]:
    """Draw perplexity of masks made at once, trained, and made while the model trained; then the same of units."""
    one, *units = found
    cuts = list(one.section.cuts)
    made = [table("Perplexity (over dense); trained: 100,000 tokens", ["what", *cuts], grid(one, percent))]
    pairs = [ratios(one, "gradual", row) for row in one.rows if row != "gradual"]
    made.append(table(f"{RATIO}below 1: gradual is better", ["pair", *cuts], pairs))
    for part in units:
        ways = list(part.section.cuts)
        last = [ratio(part.cells[row, ways[-1]][0].nll - part.cells[row, ways[-2]][0].nll) for row in part.rows]
        rows = [[*row, against] for row, against in zip(grid(part, percent), last, strict=True)]
        head = ["cut, learning rate", *ways, "gradual / trained (95 % interval)"]
        made.append(table("Units that end in a slice: perplexity (over dense), 50,000 tokens", head, rows))
    return made


def losses(found: list[Found]) -> list[str]:
    """Draw perplexity after training by loss, and what the dense model's answers alone gain over the text alone."""
    (one,) = found
    first, *_, last = [cut for cut in one.section.cuts if "alpha" in cut]
    gain = [ratio(one.cells[row, last][0].nll - one.cells[row, first][0].nll) for row in one.rows]
    rows = [[*cells, gained] for cells, gained in zip(grid(one, percent), gain, strict=True)]
    head = ["cut by GHOST", *one.section.cuts, f"{last} / {first} (95 % interval over windows)"]
    return [table(f"Perplexity (over dense) by loss; dense {mean(one.dense):.2f}", head, rows)]


def scorers(found: list[Found]) -> list[str]:
    """Draw perplexity, KL and the last word by row and cut of each axis, a ratio, and why cells are missing."""
    return [one_axis(one) for one in found]


def one_axis(one: Found) -> str:
    """Return the table of an axis, with what its cuts keep and its failures."""
    cuts, at, against = list(one.section.cuts), one.section.show["at"], one.section.show["against"]
    every = [one.dense, *(cell for row in one.cells.values() for cell in row)]
    hit = any(True in cell.record.get("word", ()) for cell in every)
    kinds: dict[str, Show] = {"ppl": ppl, "KL": partial(value, "kl", 4, 1), "word": partial(value, "word_nll", 2, 1)}
    kinds |= {"hit": partial(value, "word", 1, 100)} if hit else {}
    rows = [[row, *[show(one, row, cut) for show in kinds.values() for cut in cuts]] for row in one.rows]
    rows = [[*row, NO if row[0] == against else over(one, row[0], against, at)] for row in rows]
    title = f"{one.model}, {one.section.axis}: dense perplexity {dense(one)}, "
    title += f"last word {float(one.dense.word_nll.mean()):.2f} nats"
    title += f", {100 * float(one.dense.word.mean()):.1f} % hit" if hit else ""
    head = ["scorer", *[f"{name} {cut}" for name in kinds for cut in cuts], f"ppl {at} to that of {against}"]
    same = [f"{cut} {kept(one, cut)}" for cut in cuts if kept(one, cut).isdigit()]
    made = table(title, head, rows) + (f"\n\nKept: {', '.join(same)}." if same else "")
    made += "" if hit else f"\n\nNo last word of the {one.section.passages} is hit, by the dense model or by any row."
    return made + reasons(one)


def reasons(one: Found) -> str:
    """Return why cells are missing: a line for each reason."""
    failed: dict[str, list[str]] = defaultdict(list)  # reason -> rows and cuts
    for (row, cut), cells in one.cells.items():
        if "error" in cells[0]:
            failed[" ".join(cells[0].record["error"].split())[:300]].append(f"{row}, {cut}")
    return "".join(f"\n\n– {'; '.join(where)}: {reason}" for reason, where in failed.items())


def grid(one: Found, show: Show) -> Rows:
    """Return a line for each row, with a cell for each cut."""
    return [[row, *[show(one, row, cut) for cut in one.section.cuts]] for row in one.rows]


def ratios(one: Found, row: str, against: str) -> list[str]:
    """Return a line of ratios of two rows' perplexities at every cut."""
    return [f"{row} / {against}", *[over(one, row, against, cut) for cut in one.section.cuts]]


def over(one: Found, row: str, against: str, cut: str) -> str:
    """Return the ratio of two rows' perplexities, with its interval; – where one of them is missing."""
    own, other = one.mean(row, cut), one.mean(against, cut)
    return NO if own is None or other is None else ratio(own - other)


def ppl(one: Found, row: str, cut: str) -> str:
    """Return perplexity: the mean over seeds, ± their standard deviation if there are several."""
    means = [mean(cell) for cell in one.cells.get((row, cut), ()) if "nll" in cell]
    if not means:
        return NO
    middle = sum(means) / len(means)
    return f"{middle:.1e}" if middle >= 1e6 else spread(means, 2 if middle < 200 else 0)


def kl(one: Found, row: str, cut: str) -> str:
    """Return KL to the dense model: the mean over seeds, ± their standard deviation if there are several."""
    return spread([float(cell.kl.mean()) for cell in one.cells[row, cut]], 4)


def value(key: str, digits: int, scale: int, one: Found, row: str, cut: str) -> str:
    """Return the mean of something that was measured."""
    found = one.mean(row, cut, key)
    return NO if found is None else f"{scale * float(found.mean()):.{digits}f}"


def percent(one: Found, row: str, cut: str) -> str:
    """Return perplexity, and what it is over the dense model's."""
    found = mean(one.cells[row, cut][0])
    return f"{found:.2f} ({100 * (found / mean(one.dense) - 1):+.1f}%)"


def mean(cell: Cell) -> float:
    """Return the perplexity of a cell."""
    return perplexity(cell.record["nll"])


def dense(one: Found) -> str:
    """Return the perplexity of the dense model."""
    return f"{mean(one.dense):.2f}"


def kept(one: Found, cut: str) -> str:
    """Return what is kept in the groups of a cut; nothing where rows differ."""
    cells = [cell for row in one.rows for cell in one.cells.get((row, cut), ()) if "kept" in cell]
    found = {tuple(sorted(set(cell.record["kept"]))) for cell in cells}
    return ", ".join(map(str, found.pop())) if len(found) == 1 else ""
