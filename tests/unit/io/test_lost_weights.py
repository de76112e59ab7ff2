"""What a model's class leaves out of a checkpoint is said when it is loaded: what is saved later lacks it."""

from __future__ import annotations

import json
import shutil
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


def test_it_is_said_of_a_hub_id(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded from the cache of the hub into memory, in one file or in shards with an index."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, cut in {"one": folder, "shards": tmp_path / "shards"}.items():
        if name == "shards":
            sharded(folder, cut)
        repository, revision = tmp_path / "hub" / f"models--someone--{name}", "0123456789" * 4
        shutil.copytree(cut, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        caplog.clear()
        sspruner.load(f"someone/{name}")
        assert f"model someone/{name}: Qwen3_5ForCausalLM does not load 3 of its weights" in caplog.text


def sharded(folder: Path, to: Path) -> None:
    """Copy a model, with its weights in two files and their index."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, to / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))


def test_nothing_is_said_of_a_whole_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo("qwen3_5_text").save_pretrained(tmp_path)
    sspruner.load(tmp_path)
    assert "does not load" not in caplog.text
