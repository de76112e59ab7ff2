"""A folder goes to a hub and comes back the same. The hub is a stand-in on this machine (support/hub.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from support.command import refused
from support.hub import Hub, hub
from support.tiny import tiny_model, tokens

# The client reads its address when it is imported, so that it runs in a process of its own.
PUSH = "import sys, json, sspruner; print(sspruner.push_to_hub(*sys.argv[1:3], **json.loads(sys.argv[3])))"
LOGITS = """
import sys, torch, sspruner
model, _ = sspruner.load(sys.argv[1])
tokens = torch.arange(8)[None]
torch.save(model(input_ids=tokens).logits, sys.argv[2])
"""


def pruned(folder: Path, state: int = 8) -> Path:
    model = tiny_model(layers=2, state=state)
    result = sspruner.prune(model, "magnitude", allocation="global", sparsity=0.5, calibration=tokens(6, 24))
    return sspruner.save(model, folder, result=result)


def process(server: Hub, cache: Path, code: str, *words: object, token: str = "") -> subprocess.CompletedProcess[str]:
    made = {"HF_ENDPOINT": server.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | made
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def push(server: Hub, cache: Path, folder: Path, name: str, token: str = "", **how: Any) -> Any:
    return process(server, cache, PUSH, folder, name, json.dumps(how), token=token)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_folder_goes_there_and_comes_back(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "cut")
    (folder / ".hidden").write_text("not of the model")
    with hub() as server:
        sent = push(server, tmp_path / "home", folder, "me/cut", private=True, message="Half of the state")
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout.strip() == f"{server.address}/me/cut"
        there = server.repositories["me/cut"]
        assert there == {name: data for name, data in contents(folder).items() if name != ".hidden"}
        assert {"README.md", "plan.json", "report.json", "recipe.yaml", "config.json"} <= set(there)
        assert (server.private, server.messages) == ({"me/cut"}, ["Half of the state"])
        read = process(server, tmp_path / "other", LOGITS, "me/cut", tmp_path / "logits.pt")
        assert read.returncode == 0, read.stderr
    model, _ = sspruner.load(folder)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=torch.arange(8)[None]).logits)


@pytest.mark.slow
def test_weights_of_another_model_go_and_other_files_stay(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "cut")
    with hub() as server:
        server.repositories["me/cut"] = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
        sent = push(server, tmp_path / "home", folder, "me/cut")
        assert sent.returncode == 0, sent.stderr
        assert set(server.repositories["me/cut"]) == {*contents(folder), "notes.txt"}


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_so(tmp_path: Path) -> None:
    folder = pruned(tmp_path / "cut")
    with hub(token="secret") as server:
        sent = push(server, tmp_path / "home", folder, "me/cut", token="wrong")
        assert "sspruner.errors.InputError: push me/cut: the hub refuses it (401); log in: hf auth login" in sent.stderr
        assert push(server, tmp_path / "home", folder, "me/cut", token="secret").returncode == 0


def test_what_is_no_model_or_no_name_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path, ("holds no model",), "push", tmp_path, "me/cut")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, ("'a/b/c' is no name of a repository",), "push", tmp_path, "a/b/c")
