"""The training loop in several processes: the weights and the losses are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from sspruner.compute.processes import rank, world
from sspruner.training.loop import train
from support.paths import TESTS
from support.tiny import tiny_model
from support.torchrun import done, torchrun
from support.training import SMALL, likelihood, metrics, text
from support.training_text import sources
from support.zoo import FAMILIES, zoo

WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.training import SMALL, likelihood, text
from support.tiny import tiny_model
from sspruner.training.loop import train
from sspruner.compute.processes import processes, rank
torch.set_num_threads(1)
folder = Path({folder!r})
seen = []
def spied(model, batch):
    seen.append(batch)
    return likelihood(model, batch)
with processes():
    model = tiny_model()
    found = train(model, text(folder), SMALL, spied, folder / "run")
    torch.save(seen, folder / f"seen-{{rank()}}.pt")
    if rank() == 0:
        torch.save([model.state_dict(), found.perplexity], folder / "found.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_what_one_would(count: int, tmp_path: Path) -> None:
    """The same blocks in the same steps, by torchrun with gloo: weights differ by roundings of the mean alone."""
    sources(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "worker.py").write_text(WORKER.format(tests=str(TESTS), folder=str(tmp_path)), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    ran = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-3000:]
    weights, perplexities = torch.load(tmp_path / "found.pt")
    (tmp_path / "alone").mkdir()
    model = tiny_model()
    found = train(model, text(tmp_path), SMALL, likelihood, tmp_path / "alone")
    assert perplexities == pytest.approx(found.perplexity, rel=1e-3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    blocks = list(islice(text(tmp_path).training_blocks(), 6 * 4))
    parts = [torch.cat(torch.load(tmp_path / f"seen-{rank}.pt")) for rank in range(count)]  # (blocks, T) of each
    assert [len(part) for part in parts] == [len(blocks) // count] * count
    together = sorted(row for part in parts for row in part.tolist())
    assert together == sorted(block.tolist() for block in blocks)  # no block twice, none left out
    lines, alone = metrics(tmp_path / "run"), metrics(tmp_path / "alone")
    assert [line["step"] for line in lines] == [line["step"] for line in alone]
    assert lines[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-5)


def every_family(folder: str) -> None:
    """Three steps of each family, in so many processes as there are; the first keeps the weights."""
    for family in FAMILIES:
        model, run = zoo(family), Path(folder) / f"{family}-{world()}"
        if rank() == 0:
            run.mkdir()
        train(model, text(Path(folder)), replace(SMALL, max_tokens=3 * 4 * 8), likelihood, run)
        if rank() == 0:
            torch.save(model.state_dict(), run / "weights.pt")


@pytest.mark.slow
def test_every_family_trains_in_processes(tmp_path: Path) -> None:
    """Experts that no token of a process chose, blocks that layers share: no gradient is waited for in vain."""
    sources(tmp_path)
    done(torchrun(2, "every_family", "processes.test_train", tmp_path))
    every_family(str(tmp_path))
    for family in FAMILIES:
        weights = [torch.load(tmp_path / f"{family}-{count}" / "weights.pt") for count in (1, 2)]
        before = zoo(family).state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in weights[0].items())
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=f"{family}: {name}")
