"""Run the command line in this process, and check its output and files."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import sspruner
from sspruner.cli.main import main
from sspruner.compute import progress
from sspruner.io.source import DEFAULT, REFERENCES
from support.tiny import VOCABULARY, tiny_model
from support.zoo import zoo

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


STATE = 16  # units of the axis `state` in the models of `saved_model`


def saved_model(folder: Path, *, vocabulary: int = 4096, tokenizer: bool = True, seed: int = 0, **sizes: Any) -> Path:
    """Save a tiny random Mamba2, two B/C groups of two heads, with the reference tokenizer."""
    model = tiny_model(seed=seed, **{"groups": 2, "head_dim": 8, "state": STATE, **sizes})
    if vocabulary != VOCABULARY:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return sspruner.save(model, folder, AutoTokenizer.from_pretrained(REFERENCES / DEFAULT) if tokenizer else None)


def saved_zoo(folder: Path, family: str, *, tokenizer: bool = True, seed: int = 0, **sizes: Any) -> Path:
    """Save a tiny random model of any family, with the reference tokenizer, or without one and with 31 tokens."""
    model = zoo(family, seed=seed, **({"vocab_size": 4096} if tokenizer else {}), **sizes)
    return sspruner.save(model, folder, AutoTokenizer.from_pretrained(REFERENCES / DEFAULT) if tokenizer else None)


def run(*args: object, charset: str = "utf-8", **env: str) -> Any:
    """Run the console script in this process. Return exit_code, stdout, stderr and exception."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=charset, write_through=True) for _ in range(2))
    code, exception = 0, None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": "120", **env}.items():
            patch.setenv(name, value)
        patch.setattr(progress, "EVERY", 1e9)  # the machine's speed must not decide what is printed
        patch.setattr(sys, "argv", ["sspruner", *map(str, args)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        except Exception as error:
            code, exception = 1, error
    stdout, stderr = (stream.buffer.getvalue().decode(charset) for stream in (out, err))
    return SimpleNamespace(exit_code=code, stdout=stdout, stderr=stderr, output=stdout + stderr, exception=exception)


def done(*args: object, **kwargs: Any) -> Any:
    """Run a command that must succeed without output on standard error, but which model is meant if none is given."""
    result = run(*args, **kwargs)
    assert (result.exit_code, complaints(result)) == (0, ""), f"{result.stderr}\n{result.exception!r}"
    return result


def complaints(result: Any) -> str:
    """Return standard error without its first line where that says which model is meant."""
    first, _, rest = result.stderr.partition("\n")
    return rest if first.startswith("no MODEL given") else result.stderr


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything under a folder: relative path -> content, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(here: Path, says: tuple[str, ...], *args: object, code: int = 2) -> None:
    """Check that the command line prints `says` in one line, exits with `code`, and changes no file under `here`."""
    before = tree(here)
    result = run(*args)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert complaints(result).startswith("sspruner: ")
    assert complaints(result).count("\n") == 1, result.stderr
    for words in says:
        assert words in result.stderr
    assert tree(here) == before
