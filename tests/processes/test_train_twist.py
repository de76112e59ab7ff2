"""TwIST in several processes: against the method written out plainly, after restarts, and through the command line."""

from __future__ import annotations

import copy
import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import sspruner
from sspruner.compute.processes import barrier, rank, world
from sspruner.errors import InputError
from sspruner.surgery.slice import slice_model
from sspruner.training import shards as module_of_shards
from sspruner.training import twist as module
from sspruner.training.gradual import likelihood
from sspruner.training.loop import Settings, adamw, perplexity
from sspruner.training.shards import KINDS, Runs, Shards
from sspruner.training.text import Text
from sspruner.training.twist import Deal, twist
from support.flat import flat
from support.letters import Letters
from support.tiny import tiny_model
from support.together import Together, went_well
from support.torchrun import command, done, torchrun
from support.training import metrics
from support.training_text import sources

ME = "processes.test_train_twist"
SMALL = Settings(max_tokens=7 * 6 * 8, batch=6, at_once=2, seq_len=8, learning_rate=1e-2, every=2)
HOW: dict[str, Any] = {"axis": ["state", "head"], "keep": 0.5, "every": 2, "ends": 0, "draws": 3}


def model() -> Any:
    return tiny_model(layers=2, heads_per_group=4, tied=True)


def text(folder: Path) -> Text:
    return Text(sources(folder), Letters(), 8, 2)


def run(folder: Path, name: str, settings: Settings = SMALL) -> None:
    """A whole run; the first process keeps what came of it."""
    found, drawn, trained = twist(model(), text(folder), folder / name, settings=settings, **HOW)
    if rank() == 0:
        torch.save([flat(found), drawn, trained], folder / f"{name}.pt")


def kept(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def whole(folder: str) -> None:
    run(Path(folder), "whole")


ROUNDS = [(0, 2), (1, 2), (2, 2), (3, 1)]  # the number of each deal, and its steps


def plainly(folder: Path, workers: int, rounds: list[tuple[int, int]] = ROUNDS) -> dict[str, torch.Tensor]:
    """The method as it is described: copies of the model are sliced and trained; elements become means of holders.

    Which elements a slice holds is read off a copy of the model whose weights are their own numbers.
    """
    trained, deal = model(), Deal(model(), HOW["axis"], HOW["keep"], HOW["ends"], SMALL.seed)
    graph, names = sspruner.trace(trained), [*dict(trained.named_parameters())]
    moments = {name: [torch.zeros_like(p).flatten() for _ in range(2)] for name, p in trained.named_parameters()}
    blocks, step = text(folder).training_blocks(), 0
    for number, count in rounds:
        batches = [torch.stack(list(islice(blocks, SMALL.batch))) for _ in range(count)]
        sums = {name: torch.zeros(3, p.numel()) for name, p in trained.named_parameters()}
        holders = {name: torch.zeros(p.numel()) for name, p in trained.named_parameters()}
        for worker, hand in enumerate(deal.draw(f"round {number}", workers)):
            one, numbered, ones = (copy.deepcopy(trained) for _ in range(3))
            with torch.no_grad():
                for p in numbered.parameters():
                    p.copy_(torch.arange(p.numel()).view(p.shape))
                for p in ones.parameters():
                    p.fill_(1)
            for each in (one, numbered, ones):
                slice_model(each, hand, graph)
            scale = {n: p.flatten().detach() for n, p in ones.named_parameters()}
            where = {n: (p.detach().flatten() / scale[n]).round().long() for n, p in numbered.named_parameters()}
            optimizer = adamw([*one.parameters()], SMALL)
            for n, p in one.named_parameters():
                first, second = (m[where[n]].view(p.shape).clone() for m in moments[n])
                optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
            for i, batch in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = SMALL.rate(step + i + 1)
                optimizer.zero_grad()
                likelihood(one, batch[worker::workers])[0].backward()
                nn.utils.clip_grad_norm_(one.parameters(), SMALL.clip)
                optimizer.step()
            for n, p in one.named_parameters():
                state = optimizer.state[p]
                rows = [p.detach().flatten() / scale[n], state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()]
                sums[n][:, where[n]] += torch.stack(rows)
                holders[n][where[n]] += 1
        for n, p in trained.named_parameters():
            mean = sums[n] / holders[n].clamp_min(1)
            p.data = torch.where(holders[n] > 0, mean[0], p.detach().flatten()).view(p.shape)
            moments[n] = [torch.where(holders[n] > 0, new, old) for new, old in zip(mean[1:], moments[n], strict=True)]
        step += count
    assert names == [*dict(trained.named_parameters())]
    return flat(trained)


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_it_is_the_method_as_described(workers: int, together: Together, tmp_path: Path) -> None:
    """The same weights as plain code makes in one process; draws are worth what the report says; bytes as counted."""
    went_well(together(workers, whole, str(tmp_path)))
    weights, drawn, trained = kept(tmp_path, "whole")
    for name, value in plainly(tmp_path, workers).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    found = model()
    for name, parameter in found.named_parameters():
        parameter.data = weights[name].view(parameter.shape)
    held_out = text(tmp_path).held_out_blocks()
    for plan, said in zip(drawn.plans, drawn.perplexities, strict=True):
        cut = sspruner.apply(copy.deepcopy(found), plan)
        assert perplexity(cut, held_out, 2) == pytest.approx(said, rel=1e-4)
    assert drawn.mean == pytest.approx(sum(drawn.perplexities) / 3)
    assert drawn.std == pytest.approx(torch.tensor(drawn.perplexities, dtype=torch.float64).std().item())
    assert drawn.perplexities[drawn.best] == min(drawn.perplexities)
    assert trained.perplexity[1] < trained.perplexity[0]
    assert (trained.steps, trained.tokens, trained.finished) == (7, 7 * 6 * 8, True)
    # A worker is sent the part of its slice that lies elsewhere, and sends it back: three numbers of four bytes.
    slices = [sum(p.numel() for p in cut.parameters())] * workers
    formula = 2 * KINDS * 4 * sum(slices) * (workers - 1) / workers
    assert drawn.bytes_per_round == pytest.approx(formula, rel=0.1)


def exchanges(folder: str) -> None:
    """Shards of odd sizes, some empty, against plain means; what a process sends is counted where torch is called."""
    torch.manual_seed(0)
    sizes = {"one": 1, "two": 2, "some": 23, "more": 40, "most": 48}
    full = {name: torch.randn(size, KINDS) for name, size in sizes.items()}
    shards = Shards([(name, value[:, 0]) for name, value in full.items()], torch.device("cpu"))
    for name in sizes:
        assert torch.equal(shards.weights(name), full[name][:, 0])
        full[name][:, 1:] = 0
    sent, real = [0], distributed.batch_isend_irecv

    def counted(steps: list[Any]) -> Any:
        sent[0] += sum(step.tensor.numel() * 4 for step in steps if step.op is distributed.isend)
        return real(steps)

    distributed.batch_isend_irecv = counted
    for number in range(20):
        module_of_shards.TOGETHER = 2**18 if number % 2 else 24  # all in one message, or in four
        workers = [{name: some_runs(size) for name, size in sizes.items()} for _ in range(world())]
        holds = [{name: runs[name].of(torch.arange(size)) for name, size in sizes.items()} for runs in workers]
        routes = shards.routes([runs.__getitem__ for runs in workers])
        assert [len(route.names) for route in routes] == ([5] if number % 2 else [2, 1, 1, 1])
        pulled = shards.pull(routes)
        assert all(torch.equal(pulled[name], full[name][holds[rank()][name]]) for name in sizes)
        changes = [{name: torch.randn(len(places), KINDS) for name, places in hold.items()} for hold in holds]
        shards.push(routes, {name: pulled[name] + changes[rank()][name] for name in sizes})
        for name, size in sizes.items():
            for element in range(size):
                new = [
                    full[name][element] + change[name][hold[name] == element][0]
                    for hold, change in zip(holds, changes, strict=True)
                    if (hold[name] == element).any()
                ]
                if new:  # in the order of the workers, so that it is equal to the bit
                    full[name][element] = sum(new) / len(new)
            assert torch.equal(shards.sharded(name).full_tensor(), full[name])
    assert shards.bytes_sent == sent[0] > 0
    distributed.batch_isend_irecv = real


def some_runs(size: int) -> Runs:
    """Random runs of a random length that divides the size."""
    lengths = [length for length in range(1, size + 1) if size % length == 0]
    length = lengths[int(torch.randint(len(lengths), ()))]
    return Runs((torch.rand(size // length) < 0.5).nonzero().flatten(), length)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_slices_travel_and_come_back_as_means(count: int, together: Together, tmp_path: Path) -> None:
    went_well(together(count, exchanges, str(tmp_path)))


def killed(folder: str) -> None:
    """The same run, in which one worker is killed in the middle of a round, once."""
    first, real, place = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", module.take_step, Path(folder)
    seen: list[torch.Tensor] = []

    def step(model: Any, batch: torch.Tensor, optimizer: Any, settings: Settings, number: int, *rest: Any) -> Any:
        if first and rank() == 1 and number == 6:
            (place / "was-killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(batch)
        return real(model, batch, optimizer, settings, number, *rest)

    module.take_step = step
    run(place, "killed")
    torch.save(torch.cat(seen), place / f"seen-{rank()}.pt")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(together: Together, tmp_path: Path) -> None:
    """torchrun starts all workers again; they go on from the last checkpoint, with all the data after it."""
    went_well(together(2, whole, str(tmp_path)))
    done(torchrun(2, "killed", ME, tmp_path, "--max-restarts=1"))
    assert (tmp_path / "was-killed").exists()
    weights, drawn, _ = kept(tmp_path, "killed")
    expected, same, _ = kept(tmp_path, "whole")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert drawn.perplexities == same.perplexities
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    # It went on after step 4: no shard of the batches of steps 5 to 7 was left out.
    parts = torch.cat([torch.load(tmp_path / f"seen-{process}.pt") for process in range(2)])
    blocks = list(islice(text(tmp_path).training_blocks(skip=4 * 6), 3 * 6))
    assert sorted(parts.tolist()) == sorted(block.tolist() for block in blocks)


def begun(folder: str) -> None:
    """Up to the first checkpoint."""
    real = module.take_step

    def step(model: Any, batch: torch.Tensor, optimizer: Any, settings: Settings, number: int, *rest: Any) -> Any:
        if number == 3:
            barrier()  # who leaves while another still writes the checkpoint cuts it off
            raise InputError("enough")
        return real(model, batch, optimizer, settings, number, *rest)

    module.take_step = step
    try:
        run(Path(folder), "resized")
    except InputError:
        module.take_step = real


def resized(folder: str) -> None:
    """What a checkpoint holds, and the rest of the run."""
    place, real = Path(folder), module.Subnets.make
    first: list[dict[str, torch.Tensor]] = []

    def make(self: Any, plan: Any, values: Any) -> Any:
        first.append(values)
        return real(self, plan, values)

    module.Subnets.make = make
    try:
        run(place, "resized")
    finally:
        module.Subnets.make = real
    if rank() == 0:
        torch.save(first[0], place / "first.pt")


@pytest.mark.slow
def test_fewer_or_more_workers_go_on(together: Together, tmp_path: Path) -> None:
    """A checkpoint of two processes is read by three: the same weights, and the run ends well."""
    went_well(together(2, begun, str(tmp_path)))
    went_well(together(2, whole, str(tmp_path)))
    went_well(together(3, resized, str(tmp_path)))
    lines, expected = metrics(tmp_path / "resized"), metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert lines[:4] == expected[:4]  # what the two did
    before, after = (line["held_out_perplexity"] for line in (lines[0], lines[-1]))
    assert after < before
    _, drawn, trained = kept(tmp_path, "resized")
    assert trained.finished
    assert drawn.mean == pytest.approx(kept(tmp_path, "whole")[1].mean, rel=0.1)


def timed(folder: str) -> None:
    """Time is up after the first of the two steps of the first round; then the run gets all the time it needs."""
    answers = iter([False, False, True, True])
    real, module.over = module.over, lambda *_: next(answers)
    try:
        run(Path(folder), "timed")
    finally:
        module.over = real
    if rank() == 0:
        assert kept(Path(folder), "timed")[2].steps == 1
    barrier()
    run(Path(folder), "timed")


@pytest.mark.slow
def test_time_ends_a_round_and_the_next_run_goes_on_with_its_deal(together: Together, tmp_path: Path) -> None:
    sources(tmp_path)
    went_well(together(2, timed, str(tmp_path)))
    weights, _, trained = kept(tmp_path, "timed")
    assert (trained.steps, trained.finished) == (7, True)
    assert [line["step"] for line in metrics(tmp_path / "timed") if "loss" in line] == [*range(1, 8)]
    for name, value in plainly(tmp_path, 2, [(0, 1), (0, 1), *ROUNDS[1:]]).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def too_small(folder: str) -> None:
    twist(model(), text(Path(folder)), Path(folder) / "run", settings=SMALL, **{**HOW, "keep": 0.2})


@pytest.mark.slow
def test_slices_that_hold_too_little_are_refused_in_every_process(together: Together, tmp_path: Path) -> None:
    sources(tmp_path)
    for error in together(2, too_small, str(tmp_path)):
        assert isinstance(error, InputError)
        assert "2 workers" in str(error)
        assert "m q >= n does not hold" in str(error)
    assert not (tmp_path / "run").exists()


def test_one_process_alone_is_refused(tmp_path: Path) -> None:
    sources(tmp_path)
    with pytest.raises(InputError, match=r"1 workers with 3 of 6 units .*state each: m q >= n does not hold, 3 < 6"):
        twist(model(), text(tmp_path), tmp_path / "run", settings=SMALL, **HOW)
    with pytest.raises(InputError, match="every 0, draws 3: must be at least 1"):
        twist(model(), text(tmp_path), tmp_path / "run", settings=SMALL, **{**HOW, "every": 0})
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_through_the_command_line(tmp_path: Path) -> None:
    """The folder of a run: the best draw, all that was trained, the plans."""
    (tmp_path / "train.txt").write_text("The rain fell in torrents, except at occasional intervals. " * 60, "utf-8")
    small = "--max-tokens 96 --batch 2 --at-once 2 --seq-len 16 --held-out 2 --every 2 --deal-every 2 --draws 2"
    arguments = ["-m", "sspruner", "train", "twist", "mamba2-books-4m", "--text", str(tmp_path / "train.txt")]
    arguments += [*small.split(), "--device", "cpu", "--out", str(tmp_path / "run")]
    result = done(command(2, [*arguments, "--json", str(tmp_path / "said.json")]))
    assert result.stdout.count("3 steps, 96 tokens") == 1
    said = json.loads((tmp_path / "said.json").read_text())
    draws = said["draws"]["perplexity"]
    assert len(draws) == 2
    assert said["perplexity"][1] == pytest.approx(sum(draws) / 2)
    assert said["draws"]["bytes_per_round"] > 0
    best, _ = sspruner.load(tmp_path / "run/model")
    assert [g.units for g in sspruner.trace(best).on_axis("head").values()] == [8, 8, 4, 4, 8, 8]
    every, _ = sspruner.load(tmp_path / "run/whole")
    again = sspruner.apply(every, sspruner.Plan.load(tmp_path / f"run/draw-{said['draws']['best']}.json"))
    ids = torch.randint(4096, (1, 9))
    torch.testing.assert_close(again(ids).logits, best(ids).logits)
