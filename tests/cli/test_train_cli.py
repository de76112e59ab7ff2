"""`sspruner train`: what it writes, what it refuses, and that kill -9 at any moment costs nothing but time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.cli.train import Machine
from support.command import done, refused

SMALL = "--max-tokens 192 --batch 2 --at-once 2 --seq-len 16 --held-out 2 --every 2 --learning-rate 0.001 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut of the reference model, and a text."""
    found = tmp_path_factory.mktemp("train")
    (found / "train.txt").write_text("The rain fell in torrents, except at occasional intervals. " * 60, "utf-8")
    model, tokenizer = sspruner.load()
    sspruner.prune(model, "magnitude", sparsity=0.9, calibration=torch.randint(4096, (4, 16)))
    sspruner.save(model, found / "cut", tokenizer)
    return found


def command(folder: Path, out: str, *more: str) -> list[str]:
    return [
        "train",
        "distil",
        str(folder / "cut"),
        "--teacher",
        "mamba2-books-4m",
        "--text",
        str(folder / "train.txt"),
        "--out",
        str(folder / out),
        *SMALL.split(),
        *more,
    ]


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """A run that nothing interrupts: its weights, and its metrics."""
    result = done(*command(folder, "whole", "--json", "-"))
    return found(folder / "whole") | {"said": json.loads(result.stdout)}


def found(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("seconds", "tokens_per_second")
    lines = [{name: value for name, value in line.items() if name not in clock} for line in lines]
    return {"weights": sspruner.load(run / "model")[0].state_dict(), "metrics": lines}


@pytest.mark.slow
def test_a_run_says_what_it_came_to(folder: Path, whole: dict[str, Any]) -> None:
    said = whole["said"]
    assert (said["steps"], said["tokens"], said["finished"]) == (6, 192, True)
    assert said["perplexity"][1] < said["perplexity"][0]
    assert said["model"] == str(folder / "whole/model")
    assert sspruner.trace(sspruner.load(folder / "whole/model")[0]).groups.keys()
    result = done(*command(folder, "whole"))  # again: there is nothing left to do
    assert "6 steps, 192 tokens" in result.stdout
    again = found(folder / "whole")
    assert again["metrics"] == whole["metrics"]
    assert all(torch.equal(value, whole["weights"][name]) for name, value in again["weights"].items())


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 2, 5, 8])
def test_kill_9_costs_nothing_but_time(lines: int, folder: Path, whole: dict[str, Any]) -> None:
    """Killed after so many lines of its metrics, the same command ends with the same weights, to the bit."""
    out = f"killed-{lines}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-m", "sspruner", *command(folder, out)], env=environment)
    file, start = folder / out / "metrics.jsonl", time.monotonic()
    while run.poll() is None and time.monotonic() - start < 120:
        if file.exists() and len(file.read_text(encoding="utf-8").splitlines()) >= lines:
            break
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() in (-signal.SIGKILL, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done(*command(folder, out))
    finally:
        torch.set_num_threads(before)
    again = found(folder / out)
    assert [line["step"] for line in again["metrics"]] == [line["step"] for line in whole["metrics"]]
    for name, value in again["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alpha", "2"], "alpha 2.0 (0 to 1)"),
        (["--seq-len", "4096"], "of which 2 are held out"),
        (["--text", "none.txt"], "no such file"),
        (["--batch", "0"], "batch 0: must be at least 1"),
        (["--max-tokens", "-5"], "max_tokens -5: must be at least 1"),
        (["--learning-rate", "0"], "learning_rate 0.0: must be above 0"),
        (["--device", "nosuch"], "not available here"),
    ],
)
def test_what_makes_no_sense_is_one_line(more: list[str], said: str, folder: Path) -> None:
    refused(folder, (said,), *command(folder, "refused", *more))


@pytest.mark.slow
def test_the_teacher_is_what_the_model_was_pruned_from(folder: Path, tmp_path: Path) -> None:
    """As its report says; where that cannot be told the user is asked: it is never the reference model by default."""
    model, tokenizer = sspruner.load()
    result = sspruner.prune(model, "magnitude", sparsity=0.9, calibration=torch.randint(4096, (4, 16)))
    for name, says in (("mamba2-books-4m (reference)", "mamba2-books-4m"), (str(folder / "cut"), str(folder / "cut"))):
        sspruner.save(model, tmp_path / "cut", result=result.named(name, ""), overwrite=True)
        assert Machine.teacher_of(str(tmp_path / "cut")) == says
    sspruner.save(model, tmp_path / "gone", tokenizer, result=result.named("elsewhere/dense", ""))
    arguments = ("--text", folder / "train.txt", "--out", folder / "x")
    refused(folder, ("--teacher is missing", "cut has no report.json"), "train", "distil", folder / "cut", *arguments)
    says = ("--teacher is missing", "It was elsewhere/dense, which is not here")
    refused(folder, says, "train", "distil", tmp_path / "gone", *arguments)


@pytest.mark.slow
def test_what_is_missing_is_named_and_a_run_goes_on_as_it_was_asked(folder: Path, whole: dict[str, Any]) -> None:
    assert whole["metrics"]
    refused(folder, ("--text is missing",), "train", "distil", folder / "cut", "--out", folder / "x")
    refused(folder, ("--out is missing",), "train", "distil", folder / "cut", "--text", folder / "train.txt")
    refused(folder, ("another learning_rate (0.001, now 0.5)",), *command(folder, "whole", "--learning-rate", "0.5"))


@pytest.mark.slow
def test_gradual_through_the_command_line(folder: Path) -> None:
    """Half of the states of the reference model, in six steps; the model that is saved is smaller, and is read back."""
    command = ["train", "gradual", "mamba2-books-4m", "--text", folder / "train.txt", "--out", folder / "gradual"]
    result = done(*command, *SMALL.split(), "--axis", "state", "--mask-every", "1", "--json", folder / "said.json")
    assert "6 steps, 192 tokens" in result.stdout
    model, tokenizer = sspruner.load(folder / "gradual/model")
    assert tokenizer is not None
    assert {group.units for group in sspruner.trace(model).on_axis("state").values()} == {64}
    assert json.loads((folder / "said.json").read_text())["perplexity"][1] > 1
