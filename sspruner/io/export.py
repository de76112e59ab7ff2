"""Export a model to a folder for readers other than sspruner. One module per format writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sspruner.compute.device import offloaded
from sspruner.compute.forward import check_predicts_tokens
from sspruner.errors import ModelError
from sspruner.files.output import atomic_folder
from sspruner.formats.fitting import check_fits
from sspruner.formats.gguf import gguf_difference, write_gguf
from sspruner.formats.gguf_options import GGUF
from sspruner.formats.native import write_native
from sspruner.formats.remote import write_remote
from sspruner.formats.stock import check_stock, padded, write_stock
from sspruner.formats.targets import chosen
from sspruner.formats.writers import READABLE, gguf_options, writer_of
from sspruner.graph.usable import UNQUANTISED, check_not_quantised
from sspruner.io.save import write_folder
from sspruner.pruning.report import Report
from sspruner.reporting.card import write_card
from sspruner.surgery.mask import is_masked


def export(
    model: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    to: str | GGUF | None = None,
    target: str | None = None,
    tp: int = 1,
    report: Report | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` to the folder `out` in a format, and return its path. The folder appears complete or not at all.

    to: hf         stock classes of transformers; refused, with the nearest cut, if they cannot build its sizes
        hf-remote  transformers with trust_remote_code=True: one file of code beside the weights; any sizes
        hf-padded  stock classes: layers are padded with zeros to one size; same logits, memory of that size
        mamba-ssm  the loader of the package mamba_ssm: Mamba2 and Mamba of one size in all layers
        gguf       llama.cpp: the file model.gguf, with the tokenizer; sizes that llama.cpp builds. `GGUF(type="q8_0",
                   pre="gpt-2")` has its options: element type, name of the pre-tokenizer
        gguf-padded  the same, after layers are padded with zeros to one size
        sspruner   `sspruner.load`: any cut
    target, tp: a runtime, and the number of GPUs over which it splits the model: selects the format that it reads, and
        checks the sizes
    report: of the prune that made the model; the model card in the folder then includes what the cut cost

    Raises InputError for an unknown format or a folder that is not empty, ModelError for a model that cannot be
    expressed.
    """
    options = to if isinstance(to, GGUF) else GGUF()
    to = writer_of(options.format if isinstance(to, GGUF) else to, target, tp)
    options, runtime = gguf_options(to, options), chosen(target, tp)
    check_not_quantised(model, UNQUANTISED)
    if to != "sspruner" and offloaded(model):
        raise ModelError("export reads the whole model: save an offloaded one with sspruner.save, and load that")
    if to != "sspruner" and is_masked(model):
        raise ModelError("the model is masked; cut it with mode slice, or call sspruner.unmask(model) first")
    if to != "sspruner":
        check_predicts_tokens(model, f"export --to {to}")
    differs = gguf_difference if to == "gguf-padded" else None
    written = padded(model, to, differs) if to.endswith("-padded") else model
    if runtime:
        check_fits(written, runtime)
    with atomic_folder(out, overwrite) as folder:
        if to == "sspruner":
            write_folder(model, folder, tokenizer, report)
            return Path(out)
        if to == "hf-remote":
            write_remote(model, folder)
        elif to == "mamba-ssm":
            check_stock(model, to)
            write_native(model, folder)
        elif to in READABLE["gguf"]:
            write_gguf(written, folder, tokenizer, options)
            tokenizer = None  # it is in the file
        else:
            write_stock(written, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, model, to, report, tokenizer=tokenizer is not None, written=written)
    return Path(out)
