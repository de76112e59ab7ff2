"""The training loop in several processes: the weights and the losses are those of one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sspruner.compute.processes import rank, world
from sspruner.training import run
from sspruner.training.loop import train
from support.tiny import tiny_model
from support.together import Together, went_well
from support.training import SMALL, likelihood, metrics, text
from support.training_text import sources
from support.zoo import FAMILIES, zoo


def trained(folder: str) -> None:
    """One run; each process keeps the batches that it saw, the first one the weights, too."""
    place, seen, model = Path(folder), [], tiny_model()

    def spied(model: nn.Module, batch: torch.Tensor) -> Any:
        seen.append(batch)
        return likelihood(model, batch)

    found = train(model, text(place), SMALL, spied, place / "run")
    torch.save(seen, place / f"seen-{rank()}.pt")
    if rank() == 0:
        torch.save([model.state_dict(), found.perplexity], place / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_what_one_would(count: int, together: Together, tmp_path: Path) -> None:
    """The same blocks in the same steps, with gloo: weights differ by roundings of the mean alone."""
    sources(tmp_path)
    (tmp_path / "run").mkdir()
    went_well(together(count, trained, str(tmp_path)))
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


def each_family(folder: str, families: list[str]) -> None:
    """Three steps of each family, in so many processes as there are; the first keeps the weights."""
    for family in families:
        model, run = zoo(family), Path(folder) / f"{family}-{world()}"
        if rank() == 0:
            run.mkdir()
        train(model, text(Path(folder)), replace(SMALL, max_tokens=3 * 4 * 8), likelihood, run)
        if rank() == 0:
            torch.save(model.state_dict(), run / "weights.pt")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("families", [FAMILIES[::2], pytest.param(FAMILIES[1::2], marks=pytest.mark.exhaustive)])
def test_every_family_trains_in_processes(families: list[str], together: Together, tmp_path: Path) -> None:
    """Experts that no token of a process chose, blocks that layers share: no gradient is waited for in vain."""
    sources(tmp_path)
    went_well(together(2, each_family, str(tmp_path), families))
    each_family(str(tmp_path), families)
    for family in families:
        weights = [torch.load(tmp_path / f"{family}-{count}" / "weights.pt") for count in (1, 2)]
        before = zoo(family).state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in weights[0].items())
        for name, value in weights[0].items():
            found = weights[1][name]
            if family == "bamba" and name.endswith("k_proj.bias"):
                # Half of each head of four is rotated. In the other half a bias of all keys changes no attention: its
                # gradient is a rounding (1e-9), which Adam makes as large as any.
                found, value = (tensor.view(-1, 4)[:, :2] for tensor in (found, value))
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=f"{family}: {name}")


def checks_of_the_folder(folder: str) -> int:
    """How often this process looks at what is in the output folder, into which the first one writes."""
    seen = []
    real = run.check_results
    run.check_results = lambda *arguments: seen.append(arguments) or real(*arguments)
    try:
        run.run_folder(Path(folder) / "run", {"kind": "test"})
    finally:
        run.check_results = real
    return len(seen)


@pytest.mark.slow
def test_the_first_process_alone_checks_the_folder(together: Together, tmp_path: Path) -> None:
    """A later process would find files that the first is still writing, and refuse the run's own folder."""
    assert went_well(together(3, checks_of_the_folder, str(tmp_path))) == [1, 0, 0]
    assert [file.name for file in (tmp_path / "run").iterdir()] == [run.MARK]
