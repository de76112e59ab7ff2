"""What a model's class leaves out of a checkpoint is said when it is loaded: what is saved later lacks it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sspruner
from support.zoo import zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 with two layers of multi-token prediction and a vision part, which its text class ignores."""
    path = tmp_path_factory.mktemp("qwen") / "model"
    zoo("qwen3_5_text").save_pretrained(path)
    file = path / "model.safetensors"
    extra = {
        "mtp.fc.weight": torch.ones(2),
        "mtp.layers.0.weight": torch.ones(3),
        "model.visual.a.weight": torch.ones(1),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return path


def test_weights_that_a_class_ignores_are_counted_by_part(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = sspruner.load(folder)
    (said,) = [record.getMessage() for record in caplog.records if "does not load" in record.getMessage()]
    assert "does not load 3 of its weights" in said
    assert "mtp (2)" in said
    assert "model.visual.a (1)" in said
    assert not any("mtp" in name for name, _ in model.named_parameters())


def test_it_is_said_of_a_model_that_stays_on_disk(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sspruner.load(folder, offload=tmp_path / "work")
    assert "does not load 3 of its weights" in caplog.text


def test_nothing_is_said_of_a_whole_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo("qwen3_5_text").save_pretrained(tmp_path)
    sspruner.load(tmp_path)
    assert "does not load" not in caplog.text
