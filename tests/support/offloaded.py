"""Interrupt a run on an offloaded model, and compare its result with the result in memory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.files import journal
from support.tiny import tokens

TEXT = tokens(12, 19)


def check_same(ours: Any, theirs: Any, folders: tuple[Path, Path]) -> None:
    """Check that two results, one of an offloaded model, and their folders are equal."""
    assert ours.plan == theirs.plan
    assert ours.scores.importance.keys() == theirs.scores.importance.keys()
    assert all(torch.equal(s, theirs.scores.importance[n]) for n, s in ours.scores.importance.items())
    for what in ("dense", "pruned", "proof", "layers", "budget"):
        assert getattr(ours.report, what) == getattr(theirs.report, what), what
    loaded = [sspruner.load(folder)[0] for folder in folders]
    states = [model.state_dict() for model in loaded]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype
        assert torch.equal(value, states[1][name]), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]


def check_same_weights(ours: Path, theirs: Path) -> None:
    """Check that files are equal byte for byte, except the order of fields in the header of scores.safetensors."""
    files = [file for file in theirs.rglob("*.safetensors") if file.name != "scores.safetensors"]
    assert len(files) > 1
    for file in files:
        assert (ours / file.relative_to(theirs)).read_bytes() == file.read_bytes(), file.name


class Interrupted(Exception):
    """Error that a test raises in the middle of a run."""


@contextlib.contextmanager
def interrupted(at: int):
    """Context manager that raises before the `at`-th file of a journal is written."""
    count, write = 0, journal.write_tensors

    def counting(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise Interrupted
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sspruner.files.journal.write_tensors", counting)
        patch.setattr("sspruner.io.offload.write_tensors", counting)
        yield
