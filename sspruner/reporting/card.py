"""Model card, README.md of a folder: what was removed, the damage, how to load the model, how to reproduce it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sspruner.compute.forward import predicts_tokens
from sspruner.errors import InputError, ModelError
from sspruner.files.provenance import hub_name
from sspruner.formats.stock import loaded_by
from sspruner.graph.trace import trace
from sspruner.pruning.report import OUTPUT_ERROR, Report
from sspruner.pruning.table import increase
from sspruner.surgery.mask import is_masked
from sspruner.surgery.record import recorded
from sspruner.units import as_bytes, error_text, number_text, percent

CARD = "README.md"
FOLDER = "path/to/this/folder"  # in the loading code

SSPRUNER = f'import sspruner\n\nmodel, tokenizer = sspruner.load("{FOLDER}")'
STOCK = f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{FOLDER}")'
REMOTE = STOCK[:-1] + ", trust_remote_code=True)"
TOKENIZER = f'from transformers import AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained("{FOLDER}")'
NATIVE = (
    "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n\n"
    f'model = MambaLMHeadModel.from_pretrained("{FOLDER}", device="cuda")'
)
LLAMA = f"llama-server --model {FOLDER}/model.gguf"
READERS = {  # target of an export -> (library, a sentence, the loading code)
    "sspruner": ("sspruner", "With sspruner:", SSPRUNER),
    "stock": ("transformers", "With transformers, or with `sspruner.load`:", STOCK),
    "hf": ("transformers", "With transformers alone:", STOCK),
    "hf-padded": ("transformers", "With transformers alone; smaller layers are padded with zeros:", STOCK),
    "hf-remote": ("transformers", "With transformers and the code in `modeling_pruned.py`:", REMOTE),
    "gguf": ("llama.cpp", "With llama.cpp:", LLAMA),
    "gguf-padded": ("llama.cpp", "With llama.cpp; smaller layers are padded with zeros:", LLAMA),
    "mamba-ssm": ("mamba-ssm", "With the package mamba_ssm, or with `sspruner.load`:", NATIVE),
}


def write_card(
    folder: Path, model: Any, reader: str, report: Report | None, *, tokenizer: bool = False, written: Any = None
) -> None:
    """Write README.md. Arguments as for `model_card`."""
    text = model_card(model, reader, report, tokenizer=tokenizer, written=written)
    (folder / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")


def model_card(model: Any, reader: str, report: Report | None, *, tokenizer: bool = False, written: Any = None) -> str:
    """Return the card as Markdown, with the front matter for the Hugging Face hub.

    reader      a key of READERS
    report      of the prune that made `model`; without it the card shows what the config records
    tokenizer   whether the folder has one
    written     the model that is saved, if it is not `model`
    """
    from huggingface_hub import ModelCardData

    cuts = [] if report else [_layers(cut.plan) for cut in recorded(model.config)]
    base_model = report.base_model if report else hub_name(model)
    pruned = bool(report or cuts or is_masked(model))
    data = ModelCardData(
        library_name=READERS[reader][0],
        pipeline_tag="text-generation" if predicts_tokens(model) else None,
        base_model=base_model or None,
        tags=["sspruner", *(["pruned"] if pruned else []), model.config.model_type],
    )
    name = _code(report.model) if report and report.model else f"`{type(model).__name__}`"
    title = f"# {name}, {'pruned' if pruned else 'saved'} by sspruner"
    origin = f"Made from {_code(base_model)}." if base_model else ""
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n{title}",
        origin,
        *(_of_report(report) if report else _of_record(model, cuts)),
        *_this_folder(model if written is None else written, report),
        *_loading(reader, tokenizer, model),
        *(_reproducing(report) if report else []),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def report_beside(model: Any, folder: str | Path) -> Report | None:
    """Return the report in the folder that a model was loaded from; None if there is none that fits it."""
    try:
        report = Report.load(Path(folder).expanduser() / "report.json")
        _ = _of_report(report), _reproducing(report)  # raises if it lacks what a card needs
        return report if report.pruned["parameters"] == trace(model).parameters else None
    except (InputError, ModelError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _of_report(report: Report) -> list[str]:
    """Return the sections on what was removed, how, and with what damage."""
    data, dense, pruned = report.calibration, report.dense, report.pruned
    how = {
        "scorer": _cell(report.scorer) + (f" with {_cell(json.dumps(report.options))}" if report.options else ""),
        "basis of the state": _cell(report.basis) if "state" in report.axis.split(", ") else "",
        "budget": _cell(json.dumps(report.budget)),
        "order": "all layers scored on the dense model" if report.one_shot else "layer by layer, each on what is left",
        "refit": _refit(report.refit),
        "calibration": f"{_cell(data['source'])}, {data['tokens']:,} {_unit(report)} in windows of {data['seq_len']}",
        "seed": str(report.seed),
    }
    cost = [
        f"| {label} | {show(dense[key])} | {show(pruned[key])} | "
        f"{(key == 'perplexity' and increase(pruned)) or percent(dense[key], pruned[key])} |"
        for label, key, show in (
            ("perplexity", "perplexity", number_text),
            ("parameters", "parameters", "{:,}".format),
            ("weights", "weight_bytes", as_bytes),
            ("recurrent state per sequence, fp32", "state_bytes", as_bytes),
        )
        if key in pruned
    ]
    if "kl_to_dense" in pruned:
        cost.insert(1, f"| KL to the model before, nats per token | | {number_text(pruned['kl_to_dense'])} | |")
    if OUTPUT_ERROR in pruned:
        cost.insert(0, f"| output error, of the energy of the outputs | | | {error_text(pruned[OUTPUT_ERROR])} |")
        if report.refit:
            without = error_text(report.refit["without"][OUTPUT_ERROR])
            cost.insert(1, f"| without the refit: output error | | | {without} |")
    if report.refit and "perplexity" in pruned:
        without = report.refit["without"]
        cost.insert(2, f"| without the refit: perplexity | | {number_text(without['perplexity'])} | |")
        cost.insert(3, f"| without the refit: KL | | {number_text(without['kl_to_dense'])} | |")
    return [
        "## What was removed",
        *_removed(report.layers),
        _zeros(report.sparsity),
        "The cut is a mask: zeros, in tensors of their old size." if report.mode == "mask" else "",
        "\n".join(["| how | |", "|---|---|", *(f"| {what} | {value} |" for what, value in how.items() if value)]),
        "## What it cost",
        "\n".join(["| | before | after | change |", "|---|---:|---:|---:|", *cost]),
        _measured(report),
        f"Left out: {_cell(report.left_out)}." if report.left_out else "",
        _proof(report),
    ]


def _refit(refit: dict[str, Any]) -> str:
    """Say how the weights that stay got new values."""
    if not refit:
        return "none"
    if not (layers := refit.get("layers")):
        return _cell(refit["kind"])
    before, after = (sum(pair[i] for pair in refit["errors"].values()) / len(layers) for i in range(2))
    kept = sum(layer["step"] > 0 for layer in layers.values())
    return (
        f"{_cell(refit['kind'])}: mean error of a layer on held-out text {before:.4f} → {after:.4f} of its energy; "
        f"{kept} of {len(layers)} layers changed, in {sum(layer['seconds'] for layer in layers.values()):.0f} s"
    )


def _measured(report: Report) -> str:
    data = report.calibration
    if not data["held_out_tokens"]:
        return ""
    what, says = ("The output error was", "It says") if report.left_out else ("Perplexity and KL were", "They say")
    unit = _unit(report)
    where = "held out from calibration"
    if not data["held_out_is_separate"]:
        where = "NOT held out from calibration, for the source holds a single sequence or repeats itself"
    other = f"{says} little about {'text' if unit == 'tokens' else 'data'} of other kinds."
    if data["source"] == "self":
        other = f"The model itself wrote that text, before the cut. {other}"
    return f"{what} evaluated on {data['held_out_tokens']:,} {unit} of {_code(data['source'])}, {where}. {other}"


def _unit(report: Report) -> str:
    """Return what the model reads, in the plural."""
    return str(report.calibration.get("unit", "tokens"))


def _proof(report: Report) -> str:
    if not report.proof:
        return ""
    p = report.proof
    return (
        f"Proof: on random tokens the logits of the cut model were those of the masked one to {p.error:.1e} of the "
        f"largest (limit {p.tolerance:.0e}), and exactly the predicted {p.parameters_removed:,} parameters and "
        f"{as_bytes(p.state_bytes_removed)} of state per sequence were gone."
    )


def _of_record(model: Any, cuts: list[dict[str, dict[str, int]]]) -> list[str]:
    """Return the sections that a config alone allows."""
    if is_masked(model):
        return ["The model is masked: zeros, in tensors of their old size. What it cost is not recorded here."]
    if not cuts:
        return ["sspruner cut no units from it."]
    heads = ["## What was removed" if len(cuts) == 1 else f"## What was removed, cut {i + 1}" for i in range(len(cuts))]
    return [
        *(part for head, layers in zip(heads, cuts, strict=True) for part in (head, *_removed(layers))),
        "What it cost is not recorded here.",
    ]


def _removed(layers: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each axis whose layers all lost the same number of units, and a table for the other axes."""
    lines, rows = [], []
    by_axis: dict[str, dict[str, dict[str, int]]] = {}
    for name, size in layers.items():
        path, _, axis = name.rpartition(":")
        by_axis.setdefault(axis, {})[path] = size
    for axis, sizes in by_axis.items():
        if len({(size["before"], size["after"]) for size in sizes.values()}) > 1:
            rows += [f"| {_cell(p)} | {_cell(axis)} | {s['before']:,} | {s['after']:,} |" for p, s in sizes.items()]
            continue
        path, size = next(iter(sizes.items()))
        where = f"in each of {len(sizes)} layers" if len(sizes) > 1 else f"in {_code(path)}"
        lines.append(f"- {_code(axis)}: {size['before']:,} → {size['after']:,} units {where}")
    table = ["| layer | axis | units before | after |", "|---|---|---:|---:|", *rows] if rows else []
    return ["\n".join(lines), "\n".join(table)]


def _zeros(sparsity: dict[str, Any]) -> str:
    if not sparsity:
        return ""
    return (
        f"{sparsity['zeros']:,} of {sparsity['elements']:,} elements of {len(sparsity['tensors'])} tensors are zero, "
        "in place: the tensors stay dense."
    )


def _this_folder(model: Any, report: Report | None) -> list[str]:
    """Return the sizes of the files in the folder, if they differ from the tables above."""
    parameters = list(model.parameters())  # a shared one counts once
    weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
    sizes = {"parameters": sum(p.numel() for p in parameters), "weight_bytes": weight_bytes}
    try:
        sizes["state_bytes"] = trace(model).state_bytes
    except ModelError:  # not a state-space model
        sizes["state_bytes"] = 0
    if report and sizes == {name: report.pruned[name] for name in sizes}:
        return []
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return [
        "## In this folder",
        f"{sizes['parameters']:,} parameters, {as_bytes(weight_bytes)} of weights ({dtype}), and "
        f"{as_bytes(sizes['state_bytes'])} of recurrent state per sequence (fp32) at run time.",
    ]


def _loading(reader: str, tokenizer: bool, model: Any) -> list[str]:
    _, sentence, code = READERS[reader]
    if not predicts_tokens(model):  # a class of its own, or of its own code
        kind, more = loaded_by(model)
        code = code.replace("AutoModelForCausalLM", kind).replace(f'"{FOLDER}")', f'"{FOLDER}"{more})')
    return [
        "## How to load it",
        sentence,
        _fenced(code, "bash" if code == LLAMA else "python"),
        _fenced(TOKENIZER, "python") if tokenizer and code != SSPRUNER else "",
    ]


def _reproducing(report: Report) -> list[str]:
    no_command = "In Python, by `sspruner.prune` with the arguments above: no command was recorded."
    versions = ", ".join(f"{_code(name)} {_code(version)}" for name, version in report.versions.items())
    return [
        "## How to make it again",
        _fenced(report.command, "bash") if report.command else no_command,
        f"Versions: {versions}. Seed {report.seed}.",
    ]


def _layers(plan: Any) -> dict[str, dict[str, int]]:
    """Return sizes by layer, in the order of the layers; a record read from a file has another order."""

    def place(name: str) -> str:
        return re.sub(r"\d+", lambda number: number[0].zfill(9), name)

    names = sorted(plan.groups, key=place)
    return {n: {"before": plan.groups[n].before, "after": plan.groups[n].after} for n in names}


def _code(text: str) -> str:
    """Return any text as a code span of one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) or "-"
    fence = _longer(line, 0)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _cell(text: str) -> str:
    """Return any text as a code span for a table, with pipes escaped."""
    return _code(text).replace("|", r"\|")


def _fenced(text: str, language: str) -> str:
    """Return a fenced code block whose fence is longer than any in the text."""
    fence = _longer(text, 2)
    return f"{fence}{language}\n{text}\n{fence}"


def _longer(text: str, least: int) -> str:
    """Return more backticks than any run of them in a text, and more than `least`."""
    return "`" * (1 + max([least, *map(len, re.findall("`+", text))]))
