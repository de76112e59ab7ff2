"""Export: a model as a folder that other readers than sspruner open. Each of them has a file that writes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sspruner.compute.device import offloaded
from sspruner.errors import InputError, ModelError
from sspruner.files.output import atomic_folder
from sspruner.formats.fitting import check_fits
from sspruner.formats.native import write_native
from sspruner.formats.remote import write_remote
from sspruner.formats.stock import check_stock, padded, write_stock
from sspruner.formats.targets import chosen
from sspruner.io.save import write_folder
from sspruner.pruning.report import Report
from sspruner.reporting.card import write_card
from sspruner.surgery.mask import is_masked

WRITERS = {  # and how what was written is read
    "hf": "AutoModelForCausalLM.from_pretrained({out!r})",
    "hf-remote": "AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)",
    "hf-padded": "AutoModelForCausalLM.from_pretrained({out!r})",
    "mamba-ssm": "MambaLMHeadModel.from_pretrained({out!r})",
    "sspruner": "sspruner.load({out!r})",
}


def check_writer(to: str) -> None:
    """Raise InputError unless something writes for this reader."""
    if to not in WRITERS:
        raise InputError(f"--to {to}: unknown target; known: {', '.join(WRITERS)}")


def reads(to: str, out: str | Path) -> str:
    """The call that reads what was exported."""
    return WRITERS[to].format(out=str(out))


def writer_of(to: str | None, target: str | None, tp: int = 1) -> str:
    """What writes for a reader: `to`, or the writer of a runtime target; "hf" where neither is named.

    Raises InputError for an unknown one, and for a writer whose files the target does not read.
    """
    wanted = chosen(target, tp)
    if to is not None:
        check_writer(to)
    if wanted is None:
        return to or "hf"
    able = {"hf": ("hf", "hf-padded")}.get(wanted.writer, (wanted.writer,))
    if to is not None and to not in able:
        raise InputError(f"--to {to}: {wanted.name} does not read that; it reads --to {' or '.join(able)}")
    return to or wanted.writer


def export(
    model: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    to: str | None = None,
    target: str | None = None,
    tp: int = 1,
    report: Report | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` to the folder `out` for a reader, and return its path. The folder appears whole or not at all.

    to: hf         stock classes of transformers; refused, with the nearest cut, if they cannot build its sizes
        hf-remote  transformers with trust_remote_code=True: one file of code lies beside the weights; any sizes
        hf-padded  stock classes: layers are padded with zeros to one size; the same logits, the memory of that size
        mamba-ssm  the loader of the package mamba_ssm: Mamba2 and Mamba of one size in all layers
        sspruner   `sspruner.load`: whatever a cut made
    target, tp: a runtime, and over how many GPUs it splits the model: what it reads is written, if it takes the sizes

    A model card lies in the folder; with `report`, that of the prune which made the model, it says what the cut cost.
    Raises InputError for another target or a folder that is taken, ModelError for a model that it cannot express.
    """
    to, wanted = writer_of(to, target, tp), chosen(target, tp)
    if to != "sspruner" and offloaded(model):
        raise ModelError("export reads the whole model: save an offloaded one with sspruner.save, and load that")
    if to != "sspruner" and is_masked(model):
        raise ModelError("the model is masked; cut it with mode slice, or call sspruner.unmask(model) first")
    written = padded(model) if to == "hf-padded" else model
    if wanted:
        check_fits(written, wanted)
    with atomic_folder(out, overwrite) as folder:
        if to == "sspruner":
            write_folder(model, folder, tokenizer, report)
            return Path(out)
        if to == "hf-remote":
            write_remote(model, folder)
        elif to == "mamba-ssm":
            check_stock(model, to)
            write_native(model, folder)
        else:
            write_stock(written, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, model, to, report, tokenizer=tokenizer is not None, written=written)
    return Path(out)
