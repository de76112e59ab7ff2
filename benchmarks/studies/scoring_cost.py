"""Measure what scoring a layer with GHOST costs, against its plain forward and against storing the states.

Two shapes: the reference model (hidden 256, 8 heads x 64, N 128) on text, and random weights of the shape of
Mamba2-130M (hidden 768, 24 layers, 24 heads x 64, N 128; vocabulary 4096, to keep the logits out of it) on random
tokens. All in fp32, 2048 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from common import (
    Made,
    Subject,
    forward,
    in_chunks,
    in_turns,
    mib,
    middle,
    over,
    progress,
    random_model,
    random_tokens,
    table,
)

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.state import ghost_sum
from sspruner.calibrate.view import Observation, SSMView
from sspruner.graph.family import Projected
from sspruner.scoring.known import find_scorer

BATCH, SEQ_LEN = 8, 256
BLOCK = 3  # the layer that is timed; its input is what the real blocks before it make
LARGE = {"hidden": 768, "heads": 24}
TARGETS = "Targets: GHOST at most 3 x the plain forward, below 0.5 x the scorer that stores the states."
POINTS = [(t, 64, 128) for t in (256, 512, 1024, 2048)] + [(256, 128, 128), (256, 256, 128)]  # T, P, N
POINTS += [(256, 64, 256), (256, 64, 512), (2048, 128, 256)]


class Case:
    """One layer of one model with its real input: runs its forward, or shows it to a scorer as the engine does."""

    def __init__(self, model: Any, tokens: torch.Tensor, block: int = 0) -> None:
        self.model, self.tokens = model, tokens
        graph = sspruner.trace(model)
        self.replay = Replay(model, graph, [(tokens, torch.ones_like(tokens, dtype=torch.bool))], "cpu")
        for before in self.replay.blocks[:block]:
            self.replay.advance(before)
        self.path, self.layer = self.replay.blocks[block], graph.layers[block]
        self.group = graph.groups[f"{self.layer.path}:state"]
        self.mixer = model.get_submodule(self.layer.path)

    @torch.no_grad()
    def forward(self, chunk_size: int) -> torch.Tensor:
        """Run the stock block with a chunk size of its scan."""
        self.mixer.chunk_size = chunk_size
        return self.replay.run(self.path, 0, self.replay.hidden[0])[0]

    @torch.no_grad()
    def score(self, scores: Callable[[SSMView], torch.Tensor]) -> torch.Tensor:
        """Run norm, projection, conv and the scores of what a scorer sees of the layer: (G, N)."""
        views: list[SSMView] = []

        def observe(path: str, hidden: torch.Tensor, mask: torch.Tensor, inputs: Any) -> None:
            seen = Observation(self.model, path, mask, family=self.layer.family, hidden=hidden, inputs=inputs)
            views.append(SSMView(seen, self.group))

        self.replay.observe(self.path, [self.layer.path], observe)
        return scores(views[0])


def ghost(view: SSMView) -> torch.Tensor:
    """Return the scores of the scorer that ships: (G, N)."""
    scorer = find_scorer("ghost")[0]()
    scorer.observe(view)
    return scorer.importance()


def materialised(view: SSMView, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Return GHOST's scores from states that are stored for all steps, which the closed form avoids: (G, N).

    buffer: memory for the states, (T, b, H, P, N), reused from batch to batch; default: allocated each time. In place,
    bound by memory; Q x Q matrix products were slower.
    """
    x, B, decay = steps(view.projected)
    h = torch.mul(x[..., :, None], B[..., None, :], out=buffer)
    for t in range(1, len(h)):
        h[t].addcmul_(h[t - 1], decay[t])
    return from_energy(view, h.square_().sum(-2))


def streamed(view: SSMView) -> torch.Tensor:
    """Return the same from the plain recurrence, one step at a time, which stores one state: (G, N)."""
    x, B, decay = steps(view.projected)
    state = x.new_zeros(*x.shape[1:], B.shape[-1])  # (b, H, P, N)
    square, energy = torch.empty_like(state), x.new_empty(*x.shape[:3], B.shape[-1])
    for t in range(len(x)):
        state.mul_(decay[t]).addcmul_(x[t][..., None], B[t][..., None, :])
        torch.sum(torch.mul(state, state, out=square), -2, out=energy[t])
    return from_energy(view, energy)


def steps(p: Projected) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dt x (T, b, H, P), B (T, b, H, N) and exp(dt A) (T, b, H, 1, 1): steps first, so each is contiguous."""
    heads = p.x.shape[2] // p.B.shape[2]
    x = (p.dt[..., None] * p.x).transpose(0, 1).contiguous()
    B = p.B.repeat_interleave(heads, 2).transpose(0, 1).contiguous()
    return x, B, (p.dt * p.A).exp().transpose(0, 1)[..., None, None]


def from_energy(view: SSMView, energy: torch.Tensor) -> torch.Tensor:
    """Return the scores (G, N) from sum_p h_t[p,n]^2 of every step and head: (T, b, H, N)."""
    b, T, G, N = view.C.shape
    seen = view.C.square() * view.mask[..., None, None]  # (b, T, G, N)
    return ((energy.view(T, b, G, -1, N).sum(3) * seen.transpose(0, 1)).sum((0, 1)) / view.tokens).sqrt()


JOBS: dict[str, Callable[[Case], Any]] = {
    "GHOST": lambda case: case.score(ghost),
    "forward, chunk 64": lambda case: case.forward(64),
    "forward, chunk 256": lambda case: case.forward(256),
    "storing the states": lambda case: case.score(materialised),
    "storing, memory reused": lambda case: case.score(partial(materialised, buffer=case.buffer)),
    "streaming": lambda case: case.score(streamed),
}
IN_MEMORY = ("forward, chunk 64", "GHOST", "storing the states", "streaming")


def timed_layer(case: Any, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every job in every repeat, once their scores agree."""
    batch, length = case.tokens.shape
    case.buffer = torch.zeros(length, batch, case.mixer.num_heads, case.mixer.head_dim, case.mixer.ssm_state_size)
    exact = case.score(ghost)
    errors = [float(((case.score(other) - exact) / exact).abs().max()) for other in (materialised, streamed)]
    progress(f"{batch} x {length}: GHOST and the others differ by {max(errors):.1e} at most (relative)")
    return in_turns({name: partial(job, case) for name, job in JOBS.items()}, repeats)


def timed_model(case: Case, repeats: int) -> list[str]:
    """Return sspruner.score of all layers against one plain forward, with two chunk sizes of the model."""
    data, row = sspruner.calibration(case.tokens, case.model, samples=len(case.tokens), held_out=0), list[str]()
    for size in (64, 256):
        model = in_chunks(case.model, size)
        jobs: dict[str, Callable[[], Any]] = {"forward": partial(forward, model, case.tokens)}
        jobs["score"] = partial(sspruner.score, model, "ghost", calibration=data)
        took = in_turns(jobs, repeats)
        row += [*map(middle, took.values()), over(took["score"], took["forward"])]
    return row


def peak_bytes(job: Callable[[], Any]) -> int:
    """Return the peak of what torch's CPU allocator handed out while `job` ran, above what was in use before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def peaks(case: Case) -> dict[str, int]:
    """Return the peak extra bytes of jobs."""
    for job in IN_MEMORY:
        JOBS[job](case)
    return {job: peak_bytes(partial(JOBS[job], case)) for job in IN_MEMORY}


def sweep_row(length: int, head_dim: int, state: int) -> list[str]:
    """Return peak extra MiB at batch 1, 8 heads: what grows with T, and what does not."""
    case = Case(random_model(head_dim=head_dim, state=state), random_tokens(1, length))
    plain, own, storing, _ = peaks(case).values()
    beyond = list[int]()

    def sums(view: SSMView) -> torch.Tensor:
        projected = view.projected
        beyond.append(peak_bytes(lambda: ghost_sum(projected, view.mask)))
        return projected.A

    case.score(sums)
    sizes = length * 8 * head_dim * state * 4, storing, own, beyond[0], plain
    return [*map(str, (length, head_dim, state)), *map(mib, sizes), f"{own / storing:.3f}"]


def tables(s: Any) -> Made:
    """Return times of a layer and of a model, and memory. Settings: repeats, model_repeats, shapes."""
    subject, cases = Subject("mamba2-books-4m", s.data), dict[str, Case]()
    large = random_model(**LARGE, layers=24) if len(s.shapes) > 1 else None
    for batch, length in ((BATCH, SEQ_LEN), (1, BATCH * SEQ_LEN)):
        text = subject.text("books-val.txt", batch, seq_len=length).tokens
        cases[f"reference, {batch} x {length}"] = Case(subject.model, text, BLOCK)
        if large:
            cases[f"130M shape, {batch} x {length}"] = Case(large, random_tokens(batch, length), BLOCK)
    took = {name: timed_layer(case, s.repeats) for name, case in cases.items()}
    rows = [[name, *(middle([1000 * t for t in times], 1) for times in found.values())] for name, found in took.items()]
    made = table("One layer, milliseconds: median (least to most)", ["shape, tokens", *JOBS], rows)
    others = [job for job in JOBS if job != "GHOST"]
    rows = [[name, *(over(found["GHOST"], found[job]) for job in others)] for name, found in took.items()]
    head = ["shape, tokens", *(f"GHOST / {job}" for job in others)]
    made += "\n" + table("The same as ratios within a repeat", head, rows) + f"\n\n{TARGETS}"
    rows = [[name, *timed_model(case, s.model_repeats)] for name, case in [*cases.items()][: len(s.shapes)]]
    head = [f"{what}, chunk {chunk}" for chunk in (64, 256) for what in ("forward, s", "score, s", "score / forward")]
    title = "All layers: `sspruner.score` against one forward of the model"
    made += "\n" + table(title, ["shape, tokens", *head], rows)
    models = {name: random_model(**(LARGE if name != "reference" else {})) for name in s.shapes}
    found = {name: peaks(Case(model, random_tokens(BATCH, SEQ_LEN))) for name, model in models.items()}
    rows = [[name, *map(mib, sizes.values())] for name, sizes in found.items()]
    made += "\n" + table(
        f"One layer, peak extra MiB for {BATCH} x {SEQ_LEN} tokens, allocated", ["shape", *IN_MEMORY], rows
    )
    head = ["T", "P", "N", "the states themselves", "storing", "GHOST", "of it beyond projections", IN_MEMORY[0]]
    rows = [sweep_row(*point) for point in POINTS[: 1 if s.quick else None]]
    made += "\n" + table("Peak extra MiB, allocated; batch 1, 8 heads", [*head, "GHOST / storing"], rows)
    return [made], f"seed 0; {s.repeats} and {s.model_repeats} interleaved repeats"
