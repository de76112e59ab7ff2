"""Formats of exported models, the call that loads each, and which one a runtime target reads; without torch."""

from __future__ import annotations

from pathlib import Path

from sspruner.errors import InputError
from sspruner.formats.targets import chosen

WRITERS = {  # format -> the call that loads it
    "hf": "AutoModelForCausalLM.from_pretrained({out!r})",
    "hf-remote": "AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)",
    "hf-padded": "AutoModelForCausalLM.from_pretrained({out!r})",
    "mamba-ssm": "MambaLMHeadModel.from_pretrained({out!r})",
    "sspruner": "sspruner.load({out!r})",
}


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
    readable = {"hf": ("hf", "hf-padded")}.get(runtime.writer, (runtime.writer,))
    if to is not None and to not in readable:
        raise InputError(f"--to {to}: {runtime.name} does not read that; it reads --to {' or '.join(readable)}")
    return to or runtime.writer
