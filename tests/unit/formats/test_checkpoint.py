"""Of several checkpoints in one folder every reader takes the one that transformers takes."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sspruner
from support.tiny import logits, tokens
from support.zoo import zoo

PLACES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def write(folder: Path, place: str, model: Any) -> None:
    """Write a model's weights in one of the ways that transformers reads."""
    state = model.state_dict()
    if place == "model.safetensors":
        model.save_pretrained(folder / "new")
        shutil.move(folder / "new" / place, folder / place)
    elif place.startswith("model"):
        model.save_pretrained(folder / "new", max_shard_size="8KB")
        for file in (folder / "new").glob("model*"):
            shutil.move(file, folder / file.name)
    elif place == "pytorch_model.bin":
        torch.save(state, folder / place)
    else:
        names = sorted(state)
        files = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
        (folder / place).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    if (folder / "new").exists():
        shutil.rmtree(folder / "new")


@pytest.mark.parametrize("places", list(combinations(PLACES, 2)), ids=" + ".join)
def test_two_checkpoints_in_one_folder(places: tuple[str, str], tmp_path: Path) -> None:
    zoo("mamba2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for seed, place in enumerate(places):
        write(tmp_path, place, zoo("mamba2", seed=seed + 1))
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens())
    assert torch.equal(logits(sspruner.load(tmp_path)[0], tokens()), theirs)
    assert torch.equal(logits(sspruner.load(tmp_path, offload=tmp_path / "working")[0], tokens()), theirs)
