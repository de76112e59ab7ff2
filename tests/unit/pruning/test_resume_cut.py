"""A run on an offloaded model that is interrupted while it cuts goes on with the next block and ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.files.journal import Journal
from sspruner.testing import zoo

TEXT = torch.randint(0, 20, (12, 19), generator=torch.Generator().manual_seed(0))


def pruned(folder: Path, out: Path, offload: Path | None, *, resume: bool = False) -> Any:
    model, _ = sspruner.load(folder, offload=offload)
    result = sspruner.prune(model, "magnitude", sparsity=0.5, calibration=TEXT, samples=8, resume=resume)
    sspruner.save(result.model, out, result=result)
    return result


def test_a_cut_that_was_interrupted_goes_on_with_the_next_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    whole = pruned(tmp_path / "model", tmp_path / "whole", None)
    write = Journal.write

    def once(self: Journal, phase: str, *rest: Any) -> None:
        write(self, phase, *rest)
        if phase == "cut":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", once)
    with pytest.raises(KeyboardInterrupt):
        pruned(tmp_path / "model", tmp_path / "parts", tmp_path / "working")
    monkeypatch.undo()
    parts = pruned(tmp_path / "model", tmp_path / "parts", tmp_path / "working", resume=True)
    assert parts.plan == whole.plan
    assert parts.report.proof == whole.report.proof
    ours, theirs = (sspruner.load(tmp_path / name)[0].state_dict() for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
