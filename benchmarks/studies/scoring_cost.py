"""What scoring a layer with GHOST costs: time against the layer's plain forward and against storing the states; memory.

Two shapes: the reference model (hidden 256, 8 heads x 64, N 128) on text, and random weights of the shape of
Mamba2-130M (hidden 768, 24 layers, 24 heads x 64, N 128; vocabulary 4096, to keep the logits out of it) on random
tokens. All in fp32, 2048 tokens. Times are interleaved; every ratio is taken within one repeat, and repeats that
other processes disturbed are retaken.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    QUIET,
    Made,
    Subject,
    cpu_seconds_of_others,
    growth,
    in_fresh_process,
    mib,
    progress,
    random_model,
    random_tokens,
    span,
    table,
    timed,
    wait_until_quiet,
)  # fmt: skip

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.state import ghost_sum
from sspruner.calibrate.view import Observation, SSMView
from sspruner.graph.family import Projected
from sspruner.scoring.known import find_scorer

BATCH, SEQ_LEN = 8, 256
BLOCK = 3  # the layer that is timed; its input is what the real blocks before it make
SHAPES: dict[str, dict[str, int]] = {"reference": {}, "130M shape": {"hidden": 768, "heads": 24, "layers": 24}}
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
    """Return a fresh instance of the scorer that ships."""
    return find_scorer("ghost")[0]()


JOBS: dict[str, Callable[[Case], Any]] = {
    "GHOST": lambda case: case.score(ghost()),
    "forward, chunk 64": lambda case: case.forward(64),
    "forward, chunk 256": lambda case: case.forward(256),
    "storing the states": lambda case: case.score(Materialising()),
    "streaming": lambda case: case.score(Streaming()),
}
IN_MEMORY = ("forward, chunk 64", "GHOST", "storing the states", "streaming")


def interleaved(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, torch.Tensor]:
    """Return the seconds of every job in every repeat, (repeats,) each; one untimed round first.

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
    progress(f"{' | '.join(jobs)}: {len(rounds)} repeats; others used at most {kept[-1][0]:.2f} cores in those kept")
    columns = torch.tensor([seconds for _, seconds in kept], dtype=torch.float64).unbind(1)
    return dict(zip(jobs, columns, strict=True))


def quartiles(values: torch.Tensor) -> str:
    """Return the median (quartile to quartile)."""
    low, median, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return span((median, low, high), 0 if median >= 100 else 2)


def time_layer(case: Case, repeats: int) -> tuple[list[str], list[str]]:
    """Return milliseconds of every job, and GHOST's ratio to each of the others."""
    batch, length = case.tokens.shape
    buffer = torch.zeros(length, batch, case.mixer.num_heads, case.mixer.head_dim, case.mixer.ssm_state_size)
    jobs: dict[str, Callable[[], Any]] = {name: lambda job=job: job(case) for name, job in JOBS.items()}  # type: ignore[misc]
    last = jobs.pop("streaming")
    jobs |= {"storing, memory reused": lambda: case.score(Materialising(buffer)), "streaming": last}
    seconds = interleaved(jobs, repeats)
    own = seconds["GHOST"]
    return [quartiles(1000 * s) for s in seconds.values()], [quartiles(own / s) for s in list(seconds.values())[1:]]


def time_model(case: Case, repeats: int) -> list[str]:
    """Return sspruner.score of all layers against one plain forward, with two chunk sizes of the model."""
    model, tokens, row = case.model, case.tokens, []
    data = sspruner.calibration(tokens, model, samples=len(tokens), held_out=0)
    jobs: dict[str, Callable[[], Any]] = {
        "forward": torch.no_grad()(lambda: model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)),
        "score": lambda: sspruner.score(model, "ghost", calibration=data),
    }
    for size in (64, 256, model.config.chunk_size):
        for layer in sspruner.trace(model).layers:
            model.get_submodule(layer.path).chunk_size = size
        if len(row) < 6:
            seconds = interleaved(jobs, repeats)
            row += [*map(quartiles, seconds.values()), quartiles(seconds["score"] / seconds["forward"])]
    return row


def peak_bytes(job: Callable[[], Any]) -> int:
    """Return the peak of what torch's CPU allocator handed out while `job` ran, above what was in use before."""
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


def resident_growth(job: str, shape: dict[str, int]) -> int:
    """Return the growth of peak resident memory while a job runs. For a fresh process."""
    JOBS[job](Case(random_model(**shape), random_tokens(1, 64), 0))  # libraries and thread pools are loaded by now
    case = Case(random_model(**shape), random_tokens(BATCH, SEQ_LEN), 0)
    return growth(lambda: JOBS[job](case))


def memory_row(shape: dict[str, int]) -> list[str]:
    """Return peak extra MiB of every job, allocated and (resident)."""
    case, row = Case(random_model(**shape), random_tokens(BATCH, SEQ_LEN), 0), []
    for job in IN_MEMORY:
        JOBS[job](case)
        resident = in_fresh_process(resident_growth, job, shape)
        row.append(f"{mib(peak_bytes(lambda job=job: JOBS[job](case)))} ({mib(resident)})")  # type: ignore[misc]
    return row


def sweep_row(length: int, head_dim: int, state: int) -> list[str]:
    """Return peak extra MiB at batch 1, 8 heads: what grows with T, and what does not."""
    case = Case(random_model(head_dim=head_dim, state=state), random_tokens(1, length), 0)
    view = case.view()
    with torch.no_grad():
        projected = view.projected
        sums = peak_bytes(lambda: ghost_sum(projected, view.mask))
    plain, own, storing = (peak_bytes(lambda job=job: JOBS[job](case)) for job in IN_MEMORY[:3])  # type: ignore[misc]
    sizes = length * 8 * head_dim * state * 4, storing, own, sums, plain
    return [*map(str, (length, head_dim, state)), *map(mib, sizes), f"{own / storing:.3f}"]


def tables(s: Any) -> Made:
    """Return times of a layer and of a model, and memory. Settings: repeats, model_repeats, shapes."""
    shapes, cases = getattr(s, "shapes", list(SHAPES)), {}
    subject, large = Subject("mamba2-books-4m", s.data), random_model(**SHAPES["130M shape"])
    for batch, length in ((BATCH, SEQ_LEN), (1, BATCH * SEQ_LEN)):
        text = subject.text("books-val.txt", batch, length).tokens
        cases[f"reference, {batch} x {length}"] = Case(subject.model, text, BLOCK)
        if len(shapes) > 1:
            cases[f"130M shape, {batch} x {length}"] = Case(large, random_tokens(batch, length), BLOCK)
    for name, case in cases.items():
        exact = case.score(ghost())
        errors = [float(((case.score(other) - exact) / exact).abs().max()) for other in (Materialising(), Streaming())]
        progress(f"{name}: GHOST and the others differ by {max(errors):.1e} at most (relative)")
    rows = {name: time_layer(case, s.repeats) for name, case in cases.items()}
    head = [*list(JOBS)[:4], "storing, memory reused", "streaming"]
    first = [[name, *row] for name, (row, _) in rows.items()]
    made = table("One layer, milliseconds: median (quartiles)", ["shape, tokens", *head], first)
    ratios = [[name, *row] for name, (_, row) in rows.items()]
    head = ["shape, tokens", *[f"GHOST / {other}" for other in head[1:]]]
    made += "\n" + table("The same as ratios within a repeat", head, ratios) + f"\n\n{TARGETS}"
    few = list(cases.items())[: len(shapes)]
    head = [f"{what}, chunk {chunk}" for chunk in (64, 256) for what in ("forward, s", "score, s", "score / forward")]
    title = "All layers: `sspruner.score` against one forward of the model"
    rows_of = [[name, *time_model(case, s.model_repeats)] for name, case in few]
    made += "\n" + table(title, ["shape, tokens", *head], rows_of)
    del cases, subject, large
    title = f"One layer, peak extra MiB for {BATCH} x {SEQ_LEN} tokens: allocated (resident)"
    rows_of = [[name, *memory_row(SHAPES[name] | {"layers": 1})] for name in shapes]
    made += "\n" + table(title, ["shape", *IN_MEMORY], rows_of)
    points = [(t, 64, 128) for t in (256, 512, 1024, 2048)] + [(256, p, 128) for p in (128, 256)]
    points += [(256, 64, n) for n in (256, 512)] + [(2048, 128, 256)]
    head = ["T", "P", "N", "the states themselves", "storing", "GHOST", "of it beyond projections", IN_MEMORY[0]]
    swept = [sweep_row(*point) for point in points[: 1 if s.quick else None]]
    made += "\n" + table("Peak extra MiB, allocated; batch 1, 8 heads", [*head, "GHOST / storing"], swept)
    return made, f"seed 0; {s.repeats} and {s.model_repeats} interleaved repeats", None
