"""Load models and texts, measure versions of a model, time jobs, and format tables: shared by all benchmarks."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

import sspruner
from sspruner.benchmarking import resident
from sspruner.benchmarking.shapes import shape_config
from sspruner.calibrate.seen import refuse_seen, seen_by
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.last_word import passages
from sspruner.evaluation.measures import Inputs, Values, measure
from sspruner.evaluation.paired import perplexity_ratio
from sspruner.evaluation.recall import tasks_for

HERE = Path(__file__).resolve().parent
WINDOWS_PER_BATCH, QUIET = 8, 0.1  # QUIET: cores that others may use while something is timed
#: Student's t of a 95 % interval, by number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
Made = tuple[list[str], str]  # what a part returns: its tables, and a note for the provenance line
NO = "–"


class Subject:
    """A model with its graph, windows of texts for it, and cuts of it that are scored once on the dense model."""

    def __init__(self, name: str | Path, data: Path, dtype: str = "float32") -> None:
        self.name, self.data = Path(name).name, data
        self.model, self.tokenizer = sspruner.load(name, dtype=dtype)
        self.graph = sspruner.trace(self.model)
        self._texts: dict[Any, sspruner.Calibration] = {}
        self._scores: dict[Any, Any] = {}
        self._curves: dict[Any, Any] = {}

    def text(self, file: str, windows: int, **how: Any) -> sspruner.Calibration:
        """Return seeded windows of a file in the data folder, of the model's own text (self), or tasks (recall).

        how: seq_len, seed, held_out. first: the first windows of the file instead. part_of: sample as many windows
        once, with seed 0, and return the part that the seed numbers.
        """
        key = json.dumps([file, windows, how], sort_keys=True)
        if key not in self._texts:
            self._texts[key] = self._text(file, windows, **how)
        return self._texts[key]

    def _text(
        self, file: str, windows: int, seq_len: int = 256, seed: int = 0, held_out: int = 0, first: bool = False,
        part_of: int = 0,
    ) -> sspruner.Calibration:  # fmt: skip
        source: Any = file if file == "self" else self.data / file
        if part_of:
            whole, part = self.text(file, part_of, seq_len=seq_len), slice(seed * windows, (seed + 1) * windows)
            return replace(whole, tokens=whole.tokens[part], mask=whole.mask[part])
        if file == "recall":
            source = tasks_for(self.model, windows + held_out, seed)
        elif first:
            ids = self.tokenizer(source.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
            source = torch.tensor(ids[: windows * seq_len]).view(windows, seq_len)
        how: dict[str, Any] = {"samples": windows, "seq_len": seq_len, "held_out": held_out, "seed": seed}
        return sspruner.calibration(source, self.model, self.tokenizer, **how)

    def passages(self, count: int, seed: int = 0) -> list[Any]:
        """Return seeded passages of LAMBADA."""
        with (self.data / "lambada-test.jsonl").open(encoding="utf-8") as file:
            return list(passages(self.tokenizer, [json.loads(line)["text"] for line in file], count, seed))

    def plan(self, data: sspruner.Calibration, scorer: str = "ghost", **how: Any) -> sspruner.Plan:
        """Return the plan of a one-shot cut. how: axis, options and seed of the scorer, and fields of the budget."""
        scoring = {key: how.pop(key) for key in ("axis", "options", "seed") if key in how}
        key = (id(data), scorer, json.dumps(scoring))
        if key not in self._scores:
            self._scores[key] = sspruner.score(self.model, scorer, calibration=data, **scoring)
        if how.get("allocation") == "adaptive":
            if key not in self._curves:
                more = {"multiple_of": how.get("multiple_of", 1)}
                self._curves[key] = sspruner.sensitivity(self.model, self._scores[key], data, **more).curves
            how["curves"] = self._curves[key]
        return sspruner.plan(self.graph, self._scores[key], **how)

    def masked(self, plan: sspruner.Plan) -> Any:
        """Return what `measure` takes: the model under the mask of a plan."""
        return partial(sspruner.masked, self.model, plan, self.graph)

    def measure(self, versions: Sequence[Any], text: Any, passages: Any = (), recall: Any = None) -> list[Values]:
        """Return the values of versions of the model, on windows of text, on passages and on recall tasks."""
        batches = list(text.batches(WINDOWS_PER_BATCH)) if text else []
        with quick_on_cpu(self.model, torch.device("cpu")):
            return measure(self.model, versions, Inputs(batches, tuple(passages), recall))


def as_is(model: Any) -> Any:
    """Return what `measure` takes: a model that is cut already."""
    return lambda: nullcontext(model)


def perplexity(nll: Sequence[float]) -> float:
    """Return the perplexity of negative log-likelihoods, nats per token."""
    return math.exp(sum(nll) / len(nll))


def random_model(hidden: int = 256, heads: int = 8, head_dim: int = 64, state: int = 128, layers: int = 1) -> Any:
    """Return a Mamba2 with random weights, fp32, vocabulary 4096."""
    from transformers import AutoModelForCausalLM

    config = shape_config("mamba2-130m", layers=layers)
    config.hidden_size, config.num_heads, config.head_dim, config.state_size = hidden, heads, head_dim, state
    config.expand, config.vocab_size = heads * head_dim // hidden, 4096
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def random_tokens(batch: int, length: int, vocabulary: int = 4096) -> torch.Tensor:
    """Return seeded tokens: int64 (batch, length)."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor) -> None:
    """Run a model once over tokens: int64 (b, T)."""
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


def timed(job: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def in_turns(jobs: dict[str, Callable[[], Any]], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Return the seconds of every job in every repeat; jobs take turns, after one round that is not timed.

    Each repeat begins with another job. What else the machine does then falls on all jobs: compare within a repeat.
    """
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values() if warm_up else ():
        job()
    for turn in range(repeats):
        first = turn % len(jobs)
        for name in [*jobs][first:] + [*jobs][:first]:
            took[name].append(timed(jobs[name]))
    return took


def over(seconds: Sequence[float], others: Sequence[float]) -> str:
    """Return the ratio of two jobs' seconds within a repeat: median (least to most)."""
    ratios = [a / b for a, b in zip(seconds, others, strict=True)]
    return span((median(ratios), min(ratios), max(ratios)))


def growth(job: Callable[[], Any]) -> int:
    """Return by how many bytes this process's resident memory grew at its peak while `job` ran (Linux)."""
    if (before := resident.start()) is None:
        raise SystemExit("benchmarks: the system does not say how much memory a process has")
    job()
    return resident.peak() - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def torchrun(workers: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a module with arguments in several processes of one thread each."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={workers}", "-m", *map(str, arguments)]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def ratio(difference: torch.Tensor, percent: bool = False) -> str:
    """Return exp of the mean with a bootstrap 95 % interval over windows. difference: nats per token, fp64 (W,)."""
    found = perplexity_ratio(difference, torch.zeros_like(difference), torch.ones_like(difference))
    return "{:+.2%} ({:+.2%} to {:+.2%})".format(*(value - 1 for value in found)) if percent else span(found, 3)


def span(found: Sequence[float], digits: int = 2) -> str:
    """Return `middle (low to high)`."""
    return "{0:.{3}f} ({1:.{3}f} to {2:.{3}f})".format(*found, digits)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, ± the standard deviation of several."""
    data = torch.tensor(values, dtype=torch.float64)
    mean = f"{float(data.mean()):.{digits}f}"
    return f"{mean} ± {float(data.std()):.{digits}f}" if len(data) > 1 else mean


def half_interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean over training seeds, by Student's t (as of ten if there are more)."""
    return T95.get(len(values), T95[10]) * stdev(values) / len(values) ** 0.5


def over_seeds(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Return the mean over training seeds ± half of its 95 % interval, if there are several."""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {half_interval(values):.{digits}f}" if len(values) > 1 else mean


def hash_of(*settings: Any) -> str:
    """Return a short hash of settings, for the names of files that depend on them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_unseen(made_by: dict[str, Any], windows: Iterable[torch.Tensor], what: str) -> None:
    """End the part if a cut was calibrated on windows that are reported: int64 (T,) each. made_by: of its plan."""
    try:
        refuse_seen(seen_by(made_by), windows, what)
    except sspruner.InputError as error:
        raise SystemExit(f"benchmarks: {error}") from error


def with_error(values: torch.Tensor) -> str:
    """Return the mean ± its standard error. values: (items,)."""
    return f"{float(values.mean()):.3f} ± {float(values.std()) / len(values) ** 0.5:.3f}"


def mib(size: int) -> str:
    """Return bytes as MiB."""
    return f"{size / 2**20:.1f}"


def progress(text: str) -> None:
    """Print one line on standard error."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table under a bold title; all columns but the first are right-aligned."""
    first, *others = head
    lines = [[first, *others], ["---", *["---:"] * len(others)], *rows]
    return "\n".join([f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines)])
