"""What the benchmarks share: models and texts, cuts and their losses, times, records that are kept, and tables."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sspruner
from sspruner.benchmarking import resident
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.last_word import passages
from sspruner.evaluation.measures import Inputs, Values, measure
from sspruner.evaluation.paired import perplexity_ratio

WINDOWS_PER_BATCH, QUIET = 8, 0.1  # QUIET: cores that others may use while something is timed
Made = tuple[str, str, Any]  # what a part returns: its tables, a note for the provenance line, its numbers


class Subject:
    """A model with its graph, windows of texts for it, and cuts of it that are scored once on the dense model."""

    def __init__(self, name: str | Path, data: Path, dtype: str = "float32") -> None:
        self.name, self.data = Path(name).name, data
        self.model, self.tokenizer = sspruner.load(name, dtype=dtype)
        self.graph = sspruner.trace(self.model)
        self._scores: dict[Any, Any] = {}
        self._curves: dict[Any, Any] = {}

    def text(
        self, source: str, windows: int, seq_len: int = 256, seed: int = 0, held_out: int = 0
    ) -> sspruner.Calibration:
        """Return seeded windows of a file in the data folder, or of the model's own text ("self")."""
        file: Any = source if source == "self" else self.data / source
        return sspruner.calibration(
            file, self.model, self.tokenizer, samples=windows, seq_len=seq_len, held_out=held_out, seed=seed
        )

    def passages(self, count: int, seed: int = 0) -> list[Any]:
        """Return seeded passages of LAMBADA."""
        with (self.data / "lambada-test.jsonl").open(encoding="utf-8") as file:
            return list(passages(self.tokenizer, [json.loads(line)["text"] for line in file], count, seed))

    def plan(self, data: sspruner.Calibration, scorer: str = "ghost", **how: Any) -> sspruner.Plan:
        """Return the plan of a one-shot cut. how: axis, options and seed of the scorer, and fields of the budget."""
        scoring = {key: how.pop(key) for key in ("axis", "options", "seed") if key in how}
        key = (id(data), scorer, json.dumps(scoring))
        if key not in self._scores:
            self._scores[key] = (data, sspruner.score(self.model, scorer, calibration=data, **scoring))
        scores, more = self._scores[key][1], {}
        if how.get("allocation") == "adaptive":
            if key not in self._curves:
                multiple = how.get("multiple_of", 1)
                self._curves[key] = sspruner.sensitivity(self.model, scores, data, multiple_of=multiple).curves
            more = {"curves": self._curves[key]}
        return sspruner.plan(self.graph, scores, **how, **more)

    def masked(self, plan: sspruner.Plan) -> Any:
        """Return what `measure` takes: the model under the mask of a plan."""
        return partial(sspruner.masked, self.model, plan, self.graph)

    def measure(self, versions: Sequence[Any], text: sspruner.Calibration | None, passages: Sequence[Any] = ()) -> Any:
        """Return the values of the dense model and of each version, on windows of text and on passages."""
        batches = list(text.batches(WINDOWS_PER_BATCH)) if text else []
        with quick_on_cpu(self.model, torch.device("cpu")):
            dense, *others = measure(
                self.model, [lambda: nullcontext(self.model), *versions], Inputs(batches, tuple(passages), None)
            )
        return dense, others


def by_token(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Return negative log-likelihood and KL to the dense model of each window, nats per token: (windows,) each."""
    assert values.text is not None
    assert values.text.kl is not None
    return values.text.nll / values.text.tokens, values.text.kl / values.text.tokens


def costs(values: Values) -> tuple[float, float]:
    """Return perplexity, and KL to the dense model in nats per token."""
    nll, kl = by_token(values)
    return float(nll.mean().exp()), float(kl.mean())


def kept(file: Path, key: Any, make: Callable[[], Any]) -> Any:
    """Return the record of a file, if it was made for this key and holds no error; else make it and write it."""
    key = json.loads(json.dumps(key))
    text = file.read_text() if file.exists() else ""
    if text and '"error":' not in text and (old := json.loads(text))["key"] == key:
        return old["record"]
    record = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "record": record}))
    return record


def file_name(label: str) -> str:
    """Return a label as the name of a file."""
    return "".join(c if c.isalnum() else "-" for c in label)


def adamw(model: Any, rate: float, decay: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices alone."""
    parts = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": part, "weight_decay": d} for part, d in zip(parts, (decay, 0.0), strict=True)]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def train_step(model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """Take one step at a learning rate, with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def random_model(
    hidden: int = 256, heads: int = 8, layers: int = 1, head_dim: int = 64, state: int = 128, chunk_size: int = 256
) -> Any:
    """Return a Mamba2 with random weights, fp32, vocabulary 4096."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_heads=heads, head_dim=head_dim, state_size=state,
        expand=heads * head_dim // hidden, n_groups=1, chunk_size=chunk_size, vocab_size=4096,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def random_tokens(batch: int, length: int, vocabulary: int = 4096) -> torch.Tensor:
    """Return seeded tokens: int64 (batch, length)."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def timed(job: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def cpu_seconds_of_others() -> float:
    """Return the CPU seconds used so far by all processes but this one, and by other guests (Linux; else 0)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def wait_until_quiet(limit: int = 30) -> None:
    """Return after a second in which others used little CPU, or after `limit` seconds."""
    for _ in range(limit):
        before = cpu_seconds_of_others()
        time.sleep(1)
        if cpu_seconds_of_others() - before <= QUIET:
            return


def in_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every job in every repeat; jobs take turns, after one round that is not timed."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            seconds = timed(job)
            took[name] += [seconds] * bool(turn)
    return took


def growth(job: Callable[[], Any]) -> int:
    """Return by how many bytes this process's resident memory grew at its peak while `job` ran (Linux)."""
    before = resident.start()
    if before is None:
        raise SystemExit("this system does not tell what is resident")
    job()
    return resident.peak() - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Put another value in a module for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def ratio(difference: torch.Tensor) -> str:
    """Return exp of the mean with a bootstrap 95 % interval over windows. difference: nats per token, fp64 (W,)."""
    return span(perplexity_ratio(difference, torch.zeros_like(difference), torch.ones_like(difference)), 3)


def span(found: Sequence[float], digits: int = 2) -> str:
    """Return `middle (low to high)`."""
    return "{0:.{3}f} ({1:.{3}f} to {2:.{3}f})".format(*found, digits)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, ± the standard deviation of several."""
    data = torch.tensor(values, dtype=torch.float64)
    mean = f"{float(data.mean()):.{digits}f}"
    return f"{mean} ± {float(data.std()):.{digits}f}" if len(data) > 1 else mean


def mib(size: int) -> str:
    """Return bytes as MiB."""
    return f"{size / 2**20:.1f}"


def progress(text: str) -> None:
    """Print one line on standard error."""
    print(text, file=sys.stderr, flush=True)


def provenance(note: str) -> str:
    """Return the command that runs, the date, the machine, the versions, and `note` (seeds, repeats)."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    cores, threads = os.cpu_count(), torch.get_num_threads()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sspruner"))
    return (
        f"`{command}` · {datetime.date.today()} · {platform.machine()}, {cores} CPU cores, "
        f"{threads} torch threads · Python {platform.python_version()}, {versions} · {note}"
    )


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table under a bold title; all columns but the first are right-aligned."""
    head = list(head)
    lines = [f"\n**{title}**\n", head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines)


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: there is no {begin} with an {end} after it")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
