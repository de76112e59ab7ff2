"""Formats of exported models, the call that loads each, and which one a runtime target reads; without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sspruner.errors import InputError
from sspruner.formats.gguf_options import FILE, GGUF
from sspruner.formats.targets import chosen

WRITERS = {  # format -> the call that loads it
    "hf": "AutoModelForCausalLM.from_pretrained({out!r})",
    "hf-remote": "AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)",
    "hf-padded": "AutoModelForCausalLM.from_pretrained({out!r})",
    "mamba-ssm": "MambaLMHeadModel.from_pretrained({out!r})",
    "gguf": f"llama-server --model {{out}}/{FILE}",
    "gguf-padded": f"llama-server --model {{out}}/{FILE}",
    "sspruner": "sspruner.load({out!r})",
}
READABLE = {"hf": ("hf", "hf-padded"), "gguf": ("gguf", "gguf-padded")}  # what a target's writer also reads


def check_writer(to: str) -> None:
    """Raise InputError for an unknown export format."""
    if to not in WRITERS:
        raise InputError(f"--to {to}: unknown target; known: {', '.join(WRITERS)}")


def reads(to: str, out: str | Path) -> str:
    """Return the call that loads the exported folder."""
    return WRITERS[to].format(out=str(out))


def writer_of(to: str | None, target: str | None, tp: int = 1) -> str:
    """Return the export format: `to`, or that of a runtime target; "hf" if neither is given.

    Raises InputError for an unknown one, and for a format that the target does not read.
    """
    runtime = chosen(target, tp)
    if to is not None:
        check_writer(to)
    if runtime is None:
        return to or "hf"
    readable = READABLE.get(runtime.writer, (runtime.writer,))
    if to is not None and to not in readable:
        raise InputError(f"--to {to}: {runtime.name} does not read that; it reads --to {' or '.join(readable)}")
    return to or runtime.writer


def gguf_options(to: str, options: GGUF) -> GGUF:
    """Return the options of a GGUF file for an export format. Raises InputError for options with another format."""
    if to in READABLE["gguf"]:
        return replace(options, padded=to == "gguf-padded")
    if given := next((name for name, value in (("--gguf-type", options.type), ("--pre", options.pre)) if value), ""):
        raise InputError(f"{given} is an option of --to gguf, not of --to {to}")
    return options
