"""The tables of `scorers.py`, from the JSON of its rows: means over seeds, bootstrap intervals over windows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from common import table
from damage import perplexity_ratio
from scorer_rows import MODELS, TABLES, Table

Rows = dict[str, list[dict[str, Any]]]  # label -> records of its seeds
Values = torch.Tensor  # (seeds, windows or passages), fp64


def render(results: Path, models: list[str] | None = None, axes: list[str] | None = None) -> str:
    """All tables of which some row is there, in the order of scorer_rows.py."""
    found = {path.name for path in results.iterdir() if path.is_dir()} if results.exists() else set()
    names = models or [*[m for m in MODELS if m in found], *sorted(found - set(MODELS))]
    made = []
    for name in names:
        dense = json.loads((results / name / "dense.json").read_text())
        for spec in TABLES:
            if spec.axis in (axes or [spec.axis]) and (rows := read(results / name / spec.axis, spec, dense["sizes"])):
                made.append(one_table(name, spec, dense, rows))
    return "\n".join(made)


def read(folder: Path, spec: Table, sizes: dict[str, int]) -> Rows:
    """The records in a folder that were made with these sizes, by label in the table's order."""
    records: Rows = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        if record["sizes"] == sizes:
            records[record["label"]].append(record)
    return {row.label: records[row.label] for row in spec.rows if row.label in records}


def values(records: list[dict[str, Any]], cut: str, key: str) -> Values | None:
    """One number per seed and window or passage; None if no seed has any."""
    cells = [r["cells"].get(cut, {}) for r in records]
    cells = [c for c in cells if key in c]
    return torch.tensor([c[key] for c in cells], dtype=torch.float64) if cells else None


def one_table(name: str, spec: Table, dense: dict[str, Any], rows: Rows) -> str:
    """Perplexity, KL and the last word by row and cut; the ratio to one row; what failed, and why."""
    cuts = list(spec.cuts)
    hits = {(label, cut): values(records, cut, "word") for label, records in rows.items() for cut in cuts}
    ever_hit = any(dense["word"]) or any(hit is not None and bool(hit.any()) for hit in hits.values())
    head = ["scorer", *[f"{what} {cut}" for what in ("ppl", "KL", "word", *["hit"] * ever_hit) for cut in cuts]]
    head.append(f"ppl {spec.at} to that of {spec.against}")
    against = values(rows.get(spec.against, []), spec.at, "nll")
    lines = []
    for label, records in rows.items():
        line = [label, *[perplexity(values(records, cut, "nll")) for cut in cuts]]
        line += [number(values(records, cut, "kl"), 4) for cut in cuts]
        line += [number(values(records, cut, "word_nll"), 2) for cut in cuts]
        line += [number(hits[label, cut], 1, 100) for cut in cuts if ever_hit]
        own = values(records, spec.at, "nll")
        comparable = against is not None and own is not None and label != spec.against
        lines.append([*line, perplexity_ratio(own.mean(0), against.mean(0)) if comparable else "–"])
    nll, word = (torch.tensor([dense[key]], dtype=torch.float64) for key in ("nll", "word_nll"))
    title = f"{name}, {spec.axis}: dense perplexity {perplexity(nll)}, last word {number(word, 2)} nats"
    title += f", {number(torch.tensor([dense['word']]).double(), 1, 100)} % hit" if ever_hit else ""
    made = table(title, head, lines) + "\n\n" + note(dense["sizes"], rows, spec)
    if not ever_hit:
        made += f" No last word of the {len(dense['word'])} is hit, by the dense model or by any row."
    return made + "".join(f"\n\n– {line}" for line in failures(rows))


def perplexity(nll: Values | None) -> str:
    """Mean over seeds, ± their standard deviation if there are several. nll: nats per token (seeds, windows)."""
    if nll is None:
        return "–"
    means = nll.mean(1).exp()  # (seeds,)
    mean = float(means.mean())
    digits = 2 if mean < 200 else 0
    text = f"{mean:.{digits}f}" if mean < 1e6 else f"{mean:.1e}"
    return f"{text} ± {float(means.std()):.{digits}f}" if len(means) > 1 and mean < 1e6 else text


def number(data: Values | None, digits: int, scale: float = 1) -> str:
    return "–" if data is None else f"{scale * float(data.mean()):.{digits}f}"


def note(sizes: dict[str, int], rows: Rows, spec: Table) -> str:
    """How and when the rows were made, and what the cuts keep."""
    records = [record for of_label in rows.values() for record in of_label]
    dates = sorted({r["made"]["date"] for r in records})
    machine = Counter(r["made"]["machine"] for r in records).most_common(1)[0][0]
    kept = []
    for cut in spec.cuts:
        counts = {tuple(c["kept"]) for r in records if "kept" in (c := r["cells"].get(cut, {})) and len(c["kept"]) == 1}
        kept += [f"{cut} {counts.pop()[0]}"] if len(counts) == 1 else []
    return (
        (f"Kept: {', '.join(kept)}. " if kept else "")
        + f"{sizes['calibration_windows']} x {sizes['seq_len']} tokens observed, {sizes['reported_windows']} x "
        f"{sizes['seq_len']} and {sizes['passages']} passages reported; {' to '.join({dates[0]: 0, dates[-1]: 0})}, "
        f"{machine}."
    )


def failures(rows: Rows) -> list[str]:
    """Why cells are missing: rows that failed with the same words share a line."""
    where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # words -> label -> cuts
    for label, records in rows.items():
        for record in records:
            for cut, cell in record["cells"].items():
                if "error" in cell and cut not in (cuts := where[cell["error"]][label]):
                    cuts.append(cut)
    lines = []
    for error, by_label in where.items():
        same: dict[str, list[str]] = defaultdict(list)  # cuts -> labels
        for label, cuts in by_label.items():
            same[", ".join(cuts)].append(label)
        parts = [f"{'; '.join(labels) if len(labels) < len(rows) else 'all'}, {cuts}" for cuts, labels in same.items()]
        lines.append(f"{' and '.join(parts)}: {' '.join(error.split())[:300]}")
    return lines
