"""The result of a report in a line or two for each cut and comparison: what stands above the pictures."""

from __future__ import annotations

from sspruner.axes import ELEMENT_AXES, axis_of
from sspruner.comparison.record import Comparison, Cut
from sspruner.pruning.report import OUTPUT_ERROR, RATIO, Report
from sspruner.reporting.folder import Folder
from sspruner.units import as_bytes, change_text, error_text, number_text, percent, span


def headline(folder: Folder) -> list[str]:
    """Return what was cut and what it cost: a sentence or two for each prune, one for each comparison."""
    cuts = [_of_report(report) for report in folder.report.values()]
    return cuts + [line for compared in folder.compare.values() for line in _of_comparison(compared)]


def _of_report(report: Report) -> str:
    sizes = []
    for axis in report.axis.split(", "):
        layers = [size for name, size in report.layers.items() if axis_of(name) == axis]
        if layers and axis not in ELEMENT_AXES:
            before, after = (span(sorted({size[when] for size in layers})) for when in ("before", "after"))
            sizes.append(f"{axis} {before} → {after}")
    cut = ", ".join(sizes) or report.axis
    parts = [f"{report.model or 'The model'}: {report.scorer} cut {cut}."]
    if RATIO in report.pruned:
        cost = change_text(report.pruned[RATIO])
        parts.append(f"Perplexity {cost}, KL {number_text(report.pruned['kl_to_dense'])} nats per token.")
    if OUTPUT_ERROR in report.pruned:
        parts.append(f"Output error on held-out windows {error_text(report.pruned[OUTPUT_ERROR])}.")
    state = [sizes["state_bytes"] for sizes in (report.dense, report.pruned)]
    if state[0] != state[1]:
        sizes_of_state = " → ".join(map(as_bytes, state))
        parts.append(f"State per sequence {sizes_of_state} ({percent(*state)}).")
    if report.proof:
        proof = report.proof
        parts.append(f"Proof: sliced = masked to {proof.error:.1e} (limit {proof.tolerance:.0e}).")
    return " ".join(parts)


def _of_comparison(compared: Comparison) -> list[str]:
    """Return the scorer with the least damage at the deepest cut that any of them made."""
    for sparsity in sorted(compared.sparsities, reverse=True):
        measured = {
            label: cut.measures["perplexity_ratio"]
            for label, row in compared.cells.items()
            if isinstance(cut := row.get(sparsity), Cut) and "perplexity_ratio" in cut.measures
        }
        if measured:
            best = min(measured, key=lambda label: measured[label].value)
            return [
                f"{compared.model or 'The model'}: of {len(measured)} scorers {best} costs least with "
                f"{100 * sparsity:g} % of {compared.axis} removed: perplexity {change_text(measured[best])}."
            ]
    return []
