"""What scoring a layer with GHOST costs: time against the layer's plain forward and against storing the states; memory.

    python benchmarks/scoring_cost.py --data ../shared/data

Two shapes: the reference model (hidden 256, 8 heads x 64, N 128) on text, and random weights of the shape of
Mamba2-130M (hidden 768, 24 layers, 24 heads x 64, N 128; vocabulary 4096, to keep the logits out of it) on random
tokens. All in fp32, 2048 tokens. Times are interleaved; every ratio is taken within one repeat, and repeats that
other processes disturbed are retaken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import progress, provenance, table
from transformers import Mamba2Config, Mamba2ForCausalLM

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.state import ghost_sum
from sspruner.calibrate.view import Observation, SSMView
from sspruner.graph.family import Projected
from sspruner.scoring.known import find_scorer

BATCH, SEQ_LEN, SEED = 8, 256, 0
BLOCK = 3  # the layer that is timed; its input is what the real blocks before it make
QUIET = 0.1  # cores that others may use while a repeat is timed
TARGETS = "Targets: GHOST at most 3 x the plain forward, below 0.5 x the scorer that stores the states."


class Materialising(sspruner.Scorer):
    """GHOST's score from states that are stored for all steps: what the closed form avoids.

    buffer: memory for the states, (T, b, H, P, N), reused from batch to batch; default: allocated each time.
    """

    name, axes, needs = "materialising", {"state"}, "activations"

    def __init__(self, buffer: torch.Tensor | None = None) -> None:
        self.tokens, self.total = 0, torch.zeros(1, 1)  # total: (G, N)
        self.buffer = buffer

    def states_energy(self, view: SSMView) -> torch.Tensor:
        """sum_p h_t[p,n]^2 of every step and head: (T, b, H, N)."""
        return all_states(view.projected, self.buffer).square_().sum(-2)  # in place: one copy of the states, not two

    def observe(self, view: SSMView) -> None:
        self.tokens += view.tokens
        b, T, G, N = view.C.shape
        energy = self.states_energy(view).view(T, b, G, -1, N).sum(3)  # (T, b, G, N)
        seen = view.C.square() * view.mask[..., None, None]  # (b, T, G, N)
        self.total = self.total + (energy * seen.transpose(0, 1)).sum((0, 1))

    def importance(self) -> torch.Tensor:
        return (self.total / self.tokens).sqrt()


class Streaming(Materialising):
    """The same from the plain recurrence, one step at a time: stores one state, not all."""

    name = "streaming"

    def states_energy(self, view: SSMView) -> torch.Tensor:
        x, B, decay = steps(view.projected)
        state = x.new_zeros(*x.shape[1:], B.shape[-1])  # (b, H, P, N)
        square = torch.empty_like(state)
        energy = x.new_empty(*x.shape[:3], B.shape[-1])  # (T, b, H, N)
        for t in range(len(x)):
            state.mul_(decay[t]).addcmul_(x[t][..., None], B[t][..., None, :])
            torch.sum(torch.mul(state, state, out=square), -2, out=energy[t])
        return energy


def steps(p: Projected) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dt x (T, b, H, P), B (T, b, H, N) and exp(dt A) (T, b, H, 1, 1): steps first, so that each is contiguous."""
    heads = p.x.shape[2] // p.B.shape[2]
    x = (p.dt[..., None] * p.x).transpose(0, 1).contiguous()
    B = p.B.repeat_interleave(heads, 2).transpose(0, 1).contiguous()
    return x, B, (p.dt * p.A).exp().transpose(0, 1)[..., None, None]


def all_states(p: Projected, out: torch.Tensor | None = None) -> torch.Tensor:
    """h_t for all steps: (T, b, H, P, N). In place, bound by memory; Q x Q matrix products were slower (docs)."""
    x, B, decay = steps(p)
    h = torch.mul(x[..., :, None], B[..., None, :], out=out)
    for t in range(1, len(h)):
        h[t].addcmul_(h[t - 1], decay[t])
    return h


class Case:
    """One layer of one model with its real input: runs its forward, or a scorer on it as the engine does."""

    def __init__(self, model: Any, tokens: torch.Tensor, block: int) -> None:
        self.model, self.tokens = model, tokens
        graph = sspruner.trace(model)
        self.replay = Replay(model, graph, [(tokens, torch.ones_like(tokens, dtype=torch.bool))], "cpu")
        for before in self.replay.blocks[:block]:
            self.replay.advance(before)
        self.path = self.replay.blocks[block]
        self.layer = graph.layers[block]
        self.group = graph.groups[f"{self.layer.path}:state"]
        self.mixer = model.get_submodule(self.layer.path)

    @torch.no_grad()
    def forward(self, chunk_size: int | None = None) -> torch.Tensor:
        """The stock block. chunk_size: that of its scan; default: the model's own."""
        self.mixer.chunk_size = chunk_size or self.model.config.chunk_size
        return self.replay.run(self.path, 0, self.replay.hidden[0])[0]

    def view(self) -> SSMView:
        """The layer as a scorer sees it."""
        views: list[SSMView] = []

        def observe(path: str, hidden: torch.Tensor, mask: torch.Tensor, inputs: Any) -> None:
            seen = Observation(self.model, path, mask, family=self.layer.family, hidden=hidden, inputs=inputs)
            views.append(SSMView(seen, self.group))

        self.replay.observe(self.path, [self.layer.path], observe)
        return views[0]

    @torch.no_grad()
    def score(self, scorer: sspruner.Scorer) -> torch.Tensor:
        """Norm, projection, conv and the scorer's sums: (G, N)."""
        scorer.observe(self.view())
        return scorer.importance()


def ghost() -> sspruner.Scorer:
    """A fresh instance of the scorer that ships."""

    return find_scorer("ghost")[0]()


def random_model(
    hidden: int = 256, heads: int = 8, layers: int = 1, head_dim: int = 64, state: int = 128, chunk_size: int = 256
) -> Any:
    """A Mamba2 with random weights, fp32."""
    torch.manual_seed(SEED)
    config = Mamba2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        expand=heads * head_dim // hidden,
        state_size=state,
        n_groups=1,
        chunk_size=chunk_size,
        vocab_size=4096,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Mamba2ForCausalLM(config).eval()


def random_tokens(batch: int, length: int) -> torch.Tensor:
    """int64 (batch, length)."""
    return torch.randint(1, 4096, (batch, length), generator=torch.Generator().manual_seed(SEED))


def interleaved(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, torch.Tensor]:
    """Seconds of every job in every repeat, (repeats,) each; one untimed round first.

    Each repeat waits for the machine to be quiet and starts with another job. If other processes disturb some, up to
    3 x repeats are taken, and the least disturbed are kept: chosen by what the others used, never by the time that
    came out.
    """
    for job in jobs.values():
        job()
    names = list(jobs)
    rounds: list[tuple[float, list[float]]] = []  # (cores used by others, seconds of each job)
    while len(rounds) < 3 * repeats and sum(used <= QUIET for used, _ in rounds) < repeats:
        first = len(rounds) % len(names)
        wait_until_quiet()
        busy, start = cpu_seconds_of_others(), time.perf_counter()
        seconds = {name: timed(jobs[name]) for name in names[first:] + names[:first]}
        others = (cpu_seconds_of_others() - busy) / (time.perf_counter() - start)
        rounds.append((others, [seconds[name] for name in names]))
    kept = sorted(rounds)[:repeats]
    progress(
        f"{' | '.join(jobs)}: {len(rounds)} repeats, {len(kept)} kept; others used at most {kept[-1][0]:.2f} cores"
    )
    columns = torch.tensor([seconds for _, seconds in kept], dtype=torch.float64).unbind(1)
    return dict(zip(jobs, columns, strict=True))


def timed(job: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def cpu_seconds_of_others() -> float:
    """CPU seconds used so far by every process but this one, and by the host's other guests (Linux; else 0)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def wait_until_quiet(limit: int = 30) -> None:
    """Return after a second in which others used little CPU, or after `limit` seconds."""
    for _ in range(limit):
        before = cpu_seconds_of_others()
        time.sleep(1)
        if cpu_seconds_of_others() - before <= QUIET:
            return


def spread(values: torch.Tensor, unit: str = "") -> str:
    """Median (quartile to quartile)."""
    low, median, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    digits = 0 if median >= 100 else 2
    return f"{median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def time_layer(name: str, case: Case, repeats: int) -> tuple[list[str], list[str]]:
    """Two rows: milliseconds, and GHOST's ratio to each of the others."""
    batch, length = case.tokens.shape
    buffer = torch.zeros(length, batch, case.mixer.num_heads, case.mixer.head_dim, case.mixer.ssm_state_size)
    jobs: dict[str, Callable[[], Any]] = {
        "GHOST": lambda: case.score(ghost()),
        "forward, chunk 64": lambda: case.forward(64),
        "forward, chunk 256": lambda: case.forward(256),
        "storing": lambda: case.score(Materialising()),
        "storing, buffer reused": lambda: case.score(Materialising(buffer)),
        "streaming": lambda: case.score(Streaming()),
    }
    seconds = interleaved(jobs, repeats)
    taken = [name, *[spread(1000 * s) for s in seconds.values()]]
    ratios = [name, *[spread(seconds["GHOST"] / s) for other, s in seconds.items() if other != "GHOST"]]
    return taken, ratios


def time_model(name: str, case: Case, repeats: int) -> list[str]:
    """sspruner.score of all layers against one plain forward of the model, each chunk size of the model in turn."""
    model, tokens = case.model, case.tokens
    calibration = sspruner.calibration(tokens, model, samples=len(tokens), held_out=0)

    def set_chunk(size: int) -> None:
        for layer in sspruner.trace(model).layers:
            model.get_submodule(layer.path).chunk_size = size

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    row = [name]
    for size in (64, 256):
        set_chunk(size)
        seconds = interleaved(
            {"forward": forward, "score": lambda: sspruner.score(model, "ghost", calibration=calibration)}, repeats
        )
        row += [spread(s) for s in seconds.values()] + [spread(seconds["score"] / seconds["forward"])]
    set_chunk(model.config.chunk_size)
    return row


def peak_bytes(job: Callable[[], Any]) -> int:
    """Peak of the bytes that torch's CPU allocator handed out while `job` ran, above what was in use before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    peak = used = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


MEMORY_JOBS: dict[str, Callable[[Case], Any]] = {
    "forward": lambda case: case.forward(64),
    "GHOST": lambda case: case.score(ghost()),
    "storing": lambda case: case.score(Materialising()),
    "streaming": lambda case: case.score(Streaming()),
}


def resident_growth(job: str, shape: dict[str, int], batch: int, length: int) -> int:
    """Growth of this process's peak resident memory while a job of MEMORY_JOBS runs (Linux). For a fresh process."""
    model = random_model(**shape)
    MEMORY_JOBS[job](Case(model, random_tokens(1, 64), 0))  # libraries and thread pools are loaded by now
    case = Case(model, random_tokens(batch, length), 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    MEMORY_JOBS[job](case)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """The function's result in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def memory_row(name: str, shape: dict[str, int], batch: int, length: int) -> list[str]:
    """Peak extra MiB of every job, allocated and (resident)."""
    case = Case(random_model(**shape), random_tokens(batch, length), 0)
    row = [name]
    for job, run in MEMORY_JOBS.items():
        run(case)
        growth = in_fresh_process(resident_growth, job, shape, batch, length)
        row.append(f"{mib(peak_bytes(lambda run=run: run(case)))} ({mib(growth)})")
    return row


def sweep_row(length: int, head_dim: int, state: int) -> list[str]:
    """Peak extra MiB at batch 1, 8 heads: what grows with T, and what does not."""
    case = Case(random_model(head_dim=head_dim, state=state), random_tokens(1, length), 0)
    view = case.view()
    with torch.no_grad():
        projected = view.projected
        sums = peak_bytes(lambda: ghost_sum(projected, view.mask))
    total = {name: peak_bytes(lambda job=job: MEMORY_JOBS[job](case)) for name, job in
             (("ghost", "GHOST"), ("storing", "storing"), ("forward", "forward"))}  # fmt: skip
    stored = length * 8 * head_dim * state * 4
    return [f"{length}", f"{head_dim}", f"{state}", mib(stored), mib(total["storing"]), mib(total["ghost"]), mib(sums),
            mib(total["forward"]), f"{total['ghost'] / total['storing']:.3f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books-val.txt")
    parser.add_argument("--repeats", type=int, default=21, help="timed repeats of one layer")
    parser.add_argument("--model-repeats", type=int, default=5, help="timed repeats of a whole model")
    arguments = parser.parse_args()

    model, tokenizer = sspruner.load(dtype="float32")
    file = arguments.data / "books-val.txt"
    shape_130m = {"hidden": 768, "heads": 24, "layers": 24}
    large = random_model(**shape_130m)
    cases: dict[str, Case] = {}
    for batch, length in ((BATCH, SEQ_LEN), (1, BATCH * SEQ_LEN)):
        text = sspruner.calibration(file, model, tokenizer, samples=batch, seq_len=length, held_out=0, seed=SEED)
        cases[f"reference, {batch} x {length}"] = Case(model, text.tokens, BLOCK)
        cases[f"130M shape, {batch} x {length}"] = Case(large, random_tokens(batch, length), BLOCK)
    for name, case in cases.items():
        exact = case.score(ghost())
        for other in (Materialising(), Streaming()):
            error = float(((case.score(other) - exact) / exact).abs().max())
            progress(f"{name}: GHOST and {other.name} differ by {error:.1e} at most (relative)")
    rows = [time_layer(name, case, arguments.repeats) for name, case in cases.items()]
    head = ["GHOST", "forward, chunk 64", "forward, chunk 256"]
    head += ["storing the states", "storing, memory reused", "streaming"]
    print(table("One layer, milliseconds: median (quartiles)", ["shape, tokens", *head], [row[0] for row in rows]))
    ratio_head = ["shape, tokens", *[f"GHOST / {other}" for other in head[1:]]]
    print(table("The same as ratios within a repeat", ratio_head, [row[1] for row in rows]))
    print("\n" + TARGETS)

    rows = [time_model(name, case, arguments.model_repeats) for name, case in list(cases.items())[:2]]
    head = [f"{what}, chunk {chunk}" for chunk in (64, 256) for what in ("forward, s", "score, s", "score / forward")]
    print(table("All layers: `sspruner.score` against one forward of the model", ["shape, tokens", *head], rows))
    del cases, model, large

    rows = [
        memory_row(name, shape, BATCH, SEQ_LEN)
        for name, shape in (("reference", {}), ("130M shape", {**shape_130m, "layers": 1}))
    ]
    head = ["shape", "forward, chunk 64", "GHOST", "storing the states", "streaming"]
    print(table(f"One layer, peak extra MiB for {BATCH} x {SEQ_LEN} tokens: allocated (resident)", head, rows))

    points = [(t, 64, 128) for t in (256, 512, 1024, 2048)] + [(256, p, 128) for p in (128, 256)]
    points += [(256, 64, n) for n in (256, 512)] + [(2048, 128, 256)]
    head = ["T", "P", "N", "the states themselves", "storing", "GHOST", "of it beyond projections"]
    head += ["forward, chunk 64", "GHOST / storing"]
    print(table("Peak extra MiB, allocated; batch 1, 8 heads", head, [sweep_row(*point) for point in points]))
    print("\n" + provenance(f"seed {SEED}; {arguments.repeats} and {arguments.model_repeats} interleaved repeats"))


if __name__ == "__main__":
    main()
