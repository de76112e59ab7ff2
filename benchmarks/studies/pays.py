"""Tabulate when a smaller state pays: bytes of published shapes, what they allow, and what engines measured beside it.

Nothing is measured here. Bytes are those of `sspruner inspect`; measurements are read from the page on decode.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from common import NO, Made, table

import sspruner
from sspruner.benchmarking.footprint import Footprint, footprint
from sspruner.benchmarking.gains import Gains, kept
from sspruner.benchmarking.shapes import SHAPES, shape_model
from sspruner.units import as_bytes

DECODE = Path(__file__).resolve().parents[2] / "docs/results/decode.md"


def published(name: str, config: dict[str, Any]) -> Any:
    """Return a published shape without weights, in bf16."""
    if name in SHAPES:
        return shape_model(name, dtype=torch.bfloat16, device="meta")
    from transformers import AutoConfig, AutoModelForCausalLM

    if layers := config.pop("layers", None):
        field, most, some, at = layers
        config[field] = [some if i in at else most for i in range(config["num_hidden_layers"])]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def ways(model: Any, recipe: dict[str, Any], context: int) -> tuple[Footprint, dict[str, Footprint]]:
    """Return the footprint of a model, and those that each way leaves it with."""
    graph = sspruner.trace(model)
    dense, cuts = footprint(model, graph, context), {}
    for name, (axis, part, dtype) in recipe["ways"].items():
        cut = dense if part == 1 else kept(model, graph, axis, part, dense)
        cuts[name] = cut.stored(dtype) if cut else dense
    return dense, cuts


def tables(s: Any) -> Made:
    """Return the bytes of each shape, how much faster each way can be by batch, and how many sequences fit."""
    recipe = yaml.safe_load(s.file.read_text(encoding="utf-8"))
    contexts, memory, bytes_, speed, fit = recipe["contexts"], float(recipe["memory"]), [], [], []
    for name in [*recipe["shapes"]][-1:] if s.quick else recipe["shapes"]:
        model = published(name, recipe["shapes"][name])
        dense, cuts = ways(model, recipe, 1)
        read = [as_bytes(dense.step_parts(batch)["weights"]) for batch in recipe["batches"]]
        kv = [as_bytes(dense.kv_bytes_per_token * n) if dense.kv_bytes_per_token else NO for n in contexts.values()]
        sizes = as_bytes(dense.weight_bytes), " / ".join(dict.fromkeys(read)), as_bytes(dense.state_bytes)
        bytes_.append([name, *sizes, " / ".join(dict.fromkeys(kv))])
        for label, context in contexts.items() if dense.kv_bytes_per_token else [("", 1)]:
            row = f"{name}, {label}" if label else name
            here = replace(dense, context=context)
            smaller = {way: replace(cut, context=context) for way, cut in cuts.items()}
            found = Gains(here, smaller, 1)
            shares = [Gains(here, {}, batch).shares["states"] for batch in recipe["batches"]]
            times = [[f"{found.times(way, batch):.2f}" for batch in recipe["batches"]] for way in smaller]
            speed.append([row, " / ".join(f"{100 * x:.0f}" for x in shares), *map(" / ".join, times)])
            many = [one.sequences(memory) for one in (here, *smaller.values())]
            fit.append([row, f"{many[0]:,}", *(f"{n:,} ({n / many[0]:.2f})" for n in many[1:])])
    by = "batch " + " / ".join(map(str, recipe["batches"]))
    head = ["shape", "weights", f"read in a step, {by}", "state of a sequence", f"KV cache, {' / '.join(contexts)}"]
    return [
        table("Bytes: weights in bf16, states in fp32", head, bytes_),
        table(f"At most so many times as fast as with the fp32 state, {by}",
              ["shape, context", "states, % of bytes", *recipe["ways"]], speed),
        table(f"Sequences that fit beside the weights in {as_bytes(memory)} (over fp32)",
              ["shape, context", "fp32 state", *recipe["ways"]], fit),
    ], "computed, not measured"  # fmt: skip


def measured(s: Any) -> Made:
    """Return what engines measured for cuts of the state, beside what their bytes allow in fp32."""
    recipe, rows = yaml.safe_load(s.file.read_text(encoding="utf-8")), []
    text, cuts = DECODE.read_text(encoding="utf-8"), {64: "half", 32: "a quarter", 16: "an eighth"}
    for part, (engine, shape) in recipe["measured"].items():
        body = text.partition(f"<!-- {part}: begin -->")[2].partition(f"<!-- {part}: end -->")[0]
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", body, re.M)]
        model = shape_model(shape, device="meta") if shape in SHAPES else sspruner.load(shape, dtype="float32")[0]
        graph = sspruner.trace(model)
        dense = footprint(model, graph, 1)
        smaller = {name: kept(model, graph, "state", states / 128, dense) for states, name in cuts.items()}
        for line in lines[2:]:
            batch, cells = int(line[0].rpartition(" ")[2]), []
            for states, name in cuts.items():
                allowed = dense.step_bytes(batch) / smaller[name].step_bytes(batch)
                cells += [f"{allowed:.2f}", line[lines[0].index(f"state {states} / dense")]]
            rows.append([f"{engine}, {shape}, batch {batch}", *cells])
    head = [cell for name in cuts.values() for cell in (f"{name}: bytes allow", f"{name}: measured")]
    return [table("Decode with fewer states, times as fast: what bytes allow, and measured", ["what", *head], rows)], (
        "measurements of [decode](results/decode.md#decode-in-engines), median (low to high); bytes computed, in fp32"
    )
