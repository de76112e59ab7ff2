"""The result of a prune as a printed table: dense beside pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.axes import ELEMENT_AXES
from sspruner.evaluation.paired import FEW
from sspruner.pruning.report import OUTPUT_ERROR, RATIO, Report
from sspruner.units import as_bytes, change_text, error_text, number_text, percent, span


def result_table(report: Report) -> RenderableType:
    """Return a table of dense, pruned and change, then settings, proof, and the continuations of both models."""
    table = Table(title=f"{escape(report.model)}: {report.scorer} on axis {report.axis}", title_justify="left")
    for header in ("", "dense", "pruned", "change"):
        table.add_column(header, justify="left" if not header else "right")
    dense, pruned = report.dense, report.pruned
    for axis in report.axis.split(", "):
        if axis in ELEMENT_AXES:
            continue
        units = [layer for name, layer in report.layers.items() if name.rpartition(":")[2] == axis]
        if not units:
            continue
        before, after = (sorted({layer[when] for layer in units}) for when in ("before", "after"))
        change = percent(sum(layer["before"] for layer in units), sum(layer["after"] for layer in units))
        table.add_row(f"{axis}{' units' if axis != 'state' else ' size'}", span(before), span(after), change)
    for label, key, show in (
        ("state bytes per sequence", "state_bytes", as_bytes),
        ("parameters", "parameters", "{:,}".format),
        ("weight bytes", "weight_bytes", as_bytes),
        ("perplexity, held out", "perplexity", number_text),
    ):
        if key in pruned:
            change = increase(pruned) if key == "perplexity" else ""
            table.add_row(label, show(dense[key]), show(pruned[key]), change or percent(dense[key], pruned[key]))
    if "kl_to_dense" in pruned:
        table.add_row("KL to dense, nats/token", "", number_text(pruned["kl_to_dense"]), "")
    if OUTPUT_ERROR in pruned:
        table.add_row("output error, held out", "", "", error_text(pruned[OUTPUT_ERROR]))
        if report.refit:
            without = error_text(report.refit["without"][OUTPUT_ERROR])
            table.add_row(f"without refit {report.refit['kind']}: output error", "", "", without)
    if report.refit and "perplexity" in pruned:
        without = report.refit["without"]
        change = increase(without) or percent(dense["perplexity"], without["perplexity"])
        shown = number_text(without["perplexity"])
        table.add_row(f"without refit {report.refit['kind']}: perplexity", "", shown, change)
        table.add_row("without refit: KL", "", number_text(without["kl_to_dense"]), "")
    if report.sparsity:
        table.add_row("element sparsity", "", f"{100 * report.sparsity['sparsity']:.2f} %", "")
    return Group(table, *_search(report), *_notes(report), *_continuations(report))


def increase(pruned: Mapping[str, Any]) -> str:
    """Return the change of perplexity with its interval; "" in reports of before, which lack it."""
    return change_text(pruned[RATIO]) if RATIO in pruned else ""


def _search(report: Report) -> list[RenderableType]:
    """Return what the search measured: the curve of cuts, the scorers, and one size for all layers."""
    parts: list[RenderableType] = []
    search = report.search
    if "curve" in search:
        table = Table(title="cuts looked at, on calibration text", title_justify="left")
        for header in ("removed", "state bytes", "parameters", "perplexity", "KL"):
            table.add_column(header, justify="right")
        if "dense_perplexity" in search:
            dense, perplexity = report.dense, search["dense_perplexity"]
            size = as_bytes(dense["state_bytes"]), f"{dense['parameters']:,}"
            table.add_row("dense", *size, f"{perplexity:.3f}", f"{0:.4f}")
        for point in search["curve"]:
            shown = ("–", "–") if point["kl"] is None else (f"{point['perplexity']:.3f}", f"{point['kl']:.4f}")
            size = as_bytes(point["state_bytes"]), f"{point['parameters']:,}"
            chosen = "chosen: " if point["sparsity"] == search.get("chosen") else ""
            table.add_row(f"{chosen}{100 * point['sparsity']:.1f} %", *size, *shown)
        parts.append(table)
    if "limits" in search:
        parts += [Text(line) for line in _limits(report)]
    if "scorers" in search:
        measured = {name: cost for name, cost in search["scorers"].items() if not isinstance(cost, str)}
        costs = [f"{name} {measured[name]:.3f}" for name in sorted(measured, key=lambda name: float(measured[name]))]
        parts.append(Text(f"perplexity by scorer, on calibration text: {', '.join(costs)}"))
        skipped = {name: why for name, why in search["scorers"].items() if isinstance(why, str)}
        parts += [Text(f"not compared: {name}: {why}") for name, why in sorted(skipped.items())]
    if refits := search.get("refits"):
        kind = next(name for name in refits if name not in ("none", "seconds"))
        taken = f"{kind} was kept" if report.refit else "the cut was left as it was"
        parts.append(
            Text(
                f"perplexity without a refit {refits['none']:.3f}, with {kind} {refits[kind]:.3f}, calibration text; "
                f"{taken} (it took {refits['seconds']:.0f} s)"
            )
        )
    if others := search.get("bases_not_tried"):
        ways = ", ".join(f"--basis {basis}" for basis in others)
        parts.append(Text(f"auto chose between coordinates of the state; directions may cost less: {ways}"))
    if "one_size" in search:
        one = search["one_size"]
        parts.append(
            Text(
                f"one size for all layers ({one['kept']} kept), which stock classes load: perplexity "
                f"{one['perplexity']:.3f}, KL {one['kl_to_dense']:.4f}, held out, not refitted"
            )
        )
    return parts


def _limits(report: Report) -> list[str]:
    """Return a line for each limit: what was allowed, and what was reached."""
    limits, search, pruned = report.search["limits"], report.search, report.pruned
    chosen: dict[str, Any] = next((p for p in search.get("curve", ()) if p["sparsity"] == search.get("chosen")), {})
    lines = []
    if (limit := limits.get("perplexity_increase")) is not None and "dense_perplexity" in search:
        reached = chosen["perplexity"] / search["dense_perplexity"] - 1
        lines.append(f"perplexity: {100 * limit:+.2f} % allowed, {100 * reached:+.2f} % reached, on calibration text")
    if (limit := limits.get("kl")) is not None and chosen.get("kl") is not None:
        lines.append(f"KL: {limit:.4f} allowed, {chosen['kl']:.4f} reached, nats per token, on calibration text")
    if (limit := limits.get("state_bytes")) is not None:
        lines.append(f"state per sequence: {as_bytes(limit)} allowed, {as_bytes(pruned['state_bytes'])} used")
    if (limit := limits.get("parameters")) is not None:
        most = limit * (report.dense["parameters"] if limit <= 1 else 1)
        lines.append(f"parameters: {most:,.0f} allowed, {pruned['parameters']:,} used")
    if engine := search.get("engine"):
        before, after = engine["sequences"]["dense"], engine["sequences"]["pruned"]
        what = f"{limits['max_batch']:.0f} sequences of {engine['context']:,} tokens in {engine['name']}"
        lines.append(f"{what} wanted, {before:,} before, {after:,} fit in {as_bytes(engine['pool_bytes'])} for caches")
        return [*lines, *engine["notes"]]
    if (limit := limits.get("state_memory")) is not None:
        lines.append(f"memory for the states of {limits['max_batch']:.0f} sequences: {as_bytes(limit)} allowed")
    if (limit := limits.get("memory")) is not None:
        lines.append(f"memory for {limits['max_batch']:.0f} sequences with the weights: {as_bytes(limit)} allowed")
    return lines


def _notes(report: Report) -> list[Text]:
    data = report.calibration
    where = (
        "held out" if data["held_out_is_separate"] else "NOT held out: a single sequence, or a text that repeats itself"
    )
    what = "output error" if report.left_out else "perplexity and KL"
    measured = f"{what} on {data['held_out_tokens']:,} others ({where})"
    windows = round(data["held_out_tokens"] / max(data["seq_len"], 1))
    if windows < FEW:
        measured += f", in {windows} window{'s' * (windows > 1)}: too few for a 95 % interval"
    measured = f"{measured}; " if data["held_out_tokens"] else ""
    lines = [
        f"calibration: {data['source']}, {data['tokens']:,} {data.get('unit', 'tokens')}; {measured}seed {report.seed}",
        *([f"left out: {report.left_out}"] if report.left_out else []),
        f"seconds: {', '.join(f'{phase} {s:.1f}' for phase, s in report.seconds.items())}; "
        f"peak memory {as_bytes(report.peak_memory_bytes)}",
    ]
    if target := report.target:
        what = f"{target['name']} on {target['tp']} GPUs" if target["tp"] > 1 else target["name"]
        lines += [f"rounded for {what}: {line}" for line in target["rounded"]]
        lines += [f"{target['name']}: {line}" for line in target["notes"]]
    if layers := report.refit.get("layers"):
        before, after = (sum(pair[i] for pair in report.refit["errors"].values()) / len(layers) for i in range(2))
        lines.append(
            f"reconstructed: mean error of a layer on held-out text {before:.4f} -> {after:.4f} of its energy; "
            f"{sum(layer['step'] > 0 for layer in layers.values())} of {len(layers)} layers have new values"
        )
        lines += [f"{path}: {layer['stopped']}" for path, layer in layers.items() if layer["stopped"]]
    for axis, found in report.zero_scores.items():
        lines.append(
            f"{axis}: {found['zero']:,} of {found['units']:,} are {found['what']}, and score 0 "
            f"(in {len(found['groups'])} of the layers): more text may tell them apart"
        )
    if report.sparsity:
        sparsity = report.sparsity
        lines.append(
            f"zeros: {sparsity['zeros']:,} of {sparsity['elements']:,} elements in "
            f"{len(sparsity['tensors'])} tensors, which stay dense: "
            "zeros make nothing faster with dense kernels, and no file smaller"
        )
    if report.proof:
        p = report.proof
        lines.append(
            f"proof: sliced = masked logits to {p.error:.1e} (limit {p.tolerance:.0e}); gone, as predicted: "
            f"{p.parameters_removed:,} parameters, {as_bytes(p.state_bytes_removed)} of state"
            + (f"; added: {p.parameters_added:,} parameters" if p.parameters_added else "")
            + (f"; {p.zeros:,} zeros in their places" if p.zeros else "")
        )
    return [Text(line) for line in lines]


def _continuations(report: Report) -> list[Text]:
    if not report.continuation:
        return []
    texts = report.continuation
    lines = [("prompt", texts["prompt"]), ("dense", texts["dense"]), ("pruned", texts["pruned"])]
    return [Text()] + [Text.assemble((f"{label:>7}: ", "bold"), " ".join(text.split())) for label, text in lines]
