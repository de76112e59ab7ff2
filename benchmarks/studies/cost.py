"""Measure what the tool costs in time and memory: prune and compare, every scorer, and a model that stays on disk."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import yaml
from common import NO, Made, Subject, forward, in_fresh_process, in_turns, mib, over, progress, random_tokens, table

import sspruner
from sspruner.benchmarking.shapes import shape_model
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.damage import damages
from sspruner.files.provenance import peak_memory_bytes

SCORERS, CUTS = ["ghost", "balanced", "taylor", "magnitude", "random"], (0.25, 0.5, 0.75, 0.9)  # of compare
ON_DISK = {"samples": 2, "held_out": 1}  # sequences of 32 tokens
Row = dict[str, Any]  # fields of a recipe; none: the plain forward


def tool_speed(s: Any) -> Made:
    """Compare prune with a forward, and compare with its evaluations, in one run. Settings: repeats, samples."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        subject = Subject("mamba2-books-4m", s.data, dtype)
        took = in_turns(prune_jobs(subject, subject.text("books-val.txt", s.samples)), s.repeats, warm_up=False)
        rows += [row(f"GHOST prune / forward, {unit}", dtype, took, unit, "at most 3") for unit in ("stock", "quick")]
        rows += [row("reconstruction / forward, quick", dtype, took, "quick", "at most 8", "reconstruct")]
    subject = Subject("mamba2-books-4m", s.data)
    data = subject.text("books-val.txt", max(1, s.samples // 4), held_out=max(1, s.samples // 8))  # as compare takes
    took = in_turns(compare_jobs(subject, data), s.repeats, warm_up=False)
    for label, unit in (("its evaluations, each alone", "alone"), ("the same, dense once", "together")):
        rows.append(row(f"compare, 5 scorers x 4 cuts / {label}", "float32", took, unit, "at most 1.3"))
    head = ["what", "weights", "whole, s", "unit, s", "ratio (least to most)", "target"]
    made = table("The tool against the model: medians", head, rows)
    return [made], f"seed 0; {s.repeats} repeats in turn; windows: {s.samples}, {len(data.tokens)} (compare) observed"


def row(label: str, dtype: str, took: dict[str, list[float]], unit: str, target: str, of: str = "whole") -> list[str]:
    """Return a row of the table: of a whole job against a unit."""
    seconds = [f"{median(took[name]):.1f}" for name in (of, unit)]
    return [label, dtype, *seconds, over(took[of], took[unit]), target]


def prune_jobs(subject: Subject, data: Any) -> dict[str, Callable[[], Any]]:
    """Return a forward over the calibration, stock and quick, prune, and the reconstruction of a tenth of the state."""
    dense, tokenizer = subject.model, subject.tokenizer
    plan = subject.plan(data, scorer="ghost", axis="state", keep=13)

    def forwards(how: AbstractContextManager[None]) -> None:
        with how:
            for tokens, _ in data.batches(16):
                forward(dense, tokens)

    return {
        "stock": lambda: forwards(nullcontext()),
        "quick": lambda: forwards(quick_on_cpu(dense, torch.device("cpu"))),
        "whole": lambda: sspruner.prune(copy.deepcopy(dense), "ghost", calibration=data, tokenizer=tokenizer),
        "reconstruct": lambda: sspruner.refit(dense, plan, "reconstruct", calibration=data),
    }


def compare_jobs(subject: Subject, data: Any) -> dict[str, Callable[[], Any]]:
    """Return compare, scoring too, and its evaluations: one after another, and all in one pass."""
    model, graph = subject.model, subject.graph
    scores = sspruner.score(model, SCORERS, calibration=data)
    plans = [sspruner.plan(graph, scored, sparsity=cut) for scored in scores.values() for cut in CUTS]
    size = max(1, 2048 // data.held_out.shape[1])

    def evaluate(plans: list[Any]) -> Any:
        return damages(model, plans, graph, data.held_out_batches(size))

    return {
        "alone": lambda: [evaluate([plan]) for plan in plans],
        "together": lambda: evaluate(plans),
        "whole": lambda: sspruner.compare(model, SCORERS, sparsities=CUTS, calibration=data),
    }


def tool_speed_large(s: Any) -> Made:
    """Return the phases on the 130M shape with random weights, once. Settings: samples, random tokens observed."""
    model = shape_model("mamba2-130m", layers=2 if s.quick else None)
    ids = random_tokens(s.samples + 4, 256, model.config.vocab_size)
    data = sspruner.calibration(ids, model, samples=s.samples, seq_len=256, held_out=4, seed=0)
    seconds = sspruner.prune(model, "ghost", calibration=data).report.seconds
    phases = [f"{seconds[phase]:.0f}" for phase in ("scoring", "evaluation", "proof")]
    head = ["shape", "scoring, s", "evaluation, s", "proof, s", "in all, minutes (target: below 15)"]
    rows = [["130M, fp32", *phases, f"{sum(seconds.values()) / 60:.1f}"]]
    made = table("GHOST on the 130M shape, half of every state", head, rows)
    return [made], f"seed 0, random weights; {s.samples} x 256 tokens observed, 4 x 256 held out"


def steps(p: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dt x (T, b, H, P), B (T, b, H, N) and exp(dt A) (T, b, H, 1, 1): steps first, so each is contiguous."""
    heads = p.x.shape[2] // p.B.shape[2]
    x = (p.dt[..., None] * p.x).transpose(0, 1).contiguous()
    B = p.B.repeat_interleave(heads, 2).transpose(0, 1).contiguous()
    return x, B, (p.dt * p.A).exp().transpose(0, 1)[..., None, None]


class Storing(sspruner.Scorer):
    """GHOST's score from states that are stored for all steps: what the closed form avoids."""

    name, axes, needs = "storing", {"state"}, "activations"

    def __init__(self) -> None:
        self.tokens, self.total = 0, torch.zeros(1, 1)  # total: (G, N)

    def energy(self, view: sspruner.SSMView) -> torch.Tensor:
        """Return sum_p h_t[p,n]^2 of every step and head: (T, b, H, N)."""
        x, B, decay = steps(view.projected)
        h = x[..., :, None] * B[..., None, :]
        for t in range(1, len(h)):
            h[t].addcmul_(h[t - 1], decay[t])
        return h.square_().sum(-2)

    def observe(self, view: sspruner.SSMView) -> None:
        """Add a batch."""
        b, T, G, N = view.C.shape
        energy = self.energy(view).view(T, b, G, -1, N).sum(3)  # (T, b, G, N)
        seen = view.C.square() * view.mask[..., None, None]  # (b, T, G, N)
        self.tokens, self.total = self.tokens + view.tokens, self.total + (energy * seen.transpose(0, 1)).sum((0, 1))

    def importance(self) -> torch.Tensor:
        """Return the score of every state: (G, N)."""
        return (self.total / self.tokens).sqrt()


class Streaming(Storing):
    """The same from the plain recurrence, one step at a time: stores one state, not all."""

    name = "streaming"

    def energy(self, view: sspruner.SSMView) -> torch.Tensor:
        """Return sum_p h_t[p,n]^2 of every step and head: (T, b, H, N)."""
        x, B, decay = steps(view.projected)
        state, energy = x.new_zeros(*x.shape[1:], B.shape[-1]), []  # (b, H, P, N)
        for t in range(len(x)):
            state.mul_(decay[t]).addcmul_(x[t][..., None], B[t][..., None, :])
            energy.append(state.square().sum(-2))
        return torch.stack(energy)


OWN: dict[str, type[sspruner.Scorer]] = {"storing": Storing, "streaming": Streaming}


def model_and_data(name: str, data: Path, size: tuple[int, int]) -> tuple[Any, sspruner.Calibration]:
    """Return a model, and its calibration of so many sequences and tokens in each."""
    if name != "130M":
        subject = Subject(name, data)
        return subject.model, subject.text("books-val.txt", size[0], seq_len=size[1])
    model = common.random_model(hidden=768, heads=24, layers=24)
    return model, sspruner.calibration(random_tokens(*size), model, samples=size[0], held_out=0)


def run(model: Any, data: sspruner.Calibration, row: Row) -> float:
    """Return the seconds of the phase `scoring` of a prune in mask mode, or of the forward. The model stays."""
    if not row:
        return common.timed(lambda: forward(model, data.tokens))
    own = {"scorer": OWN.get(row["scorer"], row["scorer"])}
    result = sspruner.prune(model, calibration=data, sparsity=0.5, mode="mask", **row | own)
    sspruner.unmask(model)
    return float(result.report.seconds["scoring"])


def measure(name: str, row: Row, repeats: int, data: Path, size: tuple[int, int], threads: int) -> Row:
    """Return bytes of a row, or of the plain forward, and seconds of both. For a fresh process."""
    torch.set_num_threads(threads)
    small, ids = common.random_model(hidden=64, heads=2), random_tokens(2, 32)
    with suppress(sspruner.SSPrunerError):
        run(small, sspruner.calibration(ids, small, samples=2, held_out=0), row)  # libraries are loaded by now
    try:
        model, seen = model_and_data(name, data, size)
        found = {"bytes": common.growth(lambda: run(model, seen, row)), "weights": model.get_memory_footprint()}
        turns = [(run(model, seen, {}), run(model, seen, row)) for _ in range(repeats)]
        return found | {"forward": [plain for plain, _ in turns], "scoring": [own for _, own in turns]}
    except sspruner.SSPrunerError as error:
        return {"error": str(error)}


def one_table(name: str, recipe: Row, s: Any) -> str:
    """Return the table of a model."""
    model, size, without = (recipe["models"][name].get(key, ()) for key in ("model", "tokens", "without"))
    how, lines, failed = (s.data, size, torch.get_num_threads()), [], ""
    plain = in_fresh_process(measure, model, {}, 0, *how)
    rows = [(axis, label, row) for axis, rows in recipe["rows"].items() for label, row in rows.items()]
    taken = dict[str, int]()
    for axis, label, row in [row for row in rows if row[2]["scorer"] not in without][: 2 if s.quick else None]:
        found, cells = in_fresh_process(measure, model, row | {"axis": axis}, s.repeats, *how), [NO] * 5
        if "error" in found:
            failed += f"\n\n– {label}, {axis}: {found['error']}"
        else:
            taken[label] = found["bytes"]
            whole = (plain["weights"] + found["bytes"]) / (plain["weights"] + plain["bytes"])
            cells = [f"{median(found['scoring']):.2f}", over(found["scoring"], found["forward"]), mib(found["bytes"])]
            cells += [f"{found['bytes'] / plain['bytes']:.2f}", f"{whole:.2f}"]
        lines.append([label, axis, *cells])
        progress(f"{name}: {' | '.join(lines[-1])}")
    for turn in ("taylor", "taylor, fisher"):
        if {turn, f"{turn}, one-shot"} <= set(taken):
            share = taken[turn] / taken[f"{turn}, one-shot"]
            failed += f"\n\nPeak extra memory of {turn}, layer by layer to one-shot: {share:.2f}."
    head = ["scorer", "axis", "scoring, s", "/ forward (least to most)", "peak extra MiB", "/ forward's"]
    title = f"{name} tokens: weights {mib(plain['weights'])} MiB, a forward takes {mib(plain['bytes'])} MiB more"
    return table(title, [*head, "/ forward's, weights counted"], lines) + failed


def scorer_cost(s: Any) -> Made:
    """Measure scoring of whole models in seconds and memory, against one plain forward. Settings: models, repeats.

    Both over the same tokens, fp32. Scoring is all that `sspruner.prune` does to know what goes: every block observed
    or differentiated, cut, and run once more for the next one's input (one-shot: not cut). Every row has a process of
    its own: first the growth of peak resident memory over the loaded model (Linux), then forward and scoring in turn.
    """
    recipe = yaml.safe_load(s.file.read_text(encoding="utf-8"))
    asked = [name for name, how in recipe["models"].items() if how["model"] in s.models]
    return [one_table(name, recipe, s) for name in asked], f"seed 0; {s.repeats} repeats"


def prune_on_disk(model: Path, work: Path, scorer: str) -> list[str]:
    """Prune, save, and return what that took. For a fresh process."""
    start, imported = time.perf_counter(), peak_memory_bytes()
    loaded, _ = sspruner.load(model, offload=work / "working")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(loaded.config.vocab_size, (sum(ON_DISK.values()), 32), generator=generator)
    data = sspruner.calibration(tokens, loaded, samples=ON_DISK["samples"], held_out=ON_DISK["held_out"])
    result = sspruner.prune(loaded, scorer, sparsity=0.5, calibration=data)
    sspruner.save(result.model, work / "out", result=result)
    report, whole = result.report, time.perf_counter() - start
    sizes = (report.dense["weight_bytes"], peak_memory_bytes(), imported)
    seconds = (report.seconds["scoring"], report.seconds["evaluation and proof"], whole)
    state = " to ".join(f"{found['state_bytes'] / 1e6:.1f} MB" for found in (report.dense, report.pruned))
    return [scorer, *(f"{size / 1e9:.2f} GB" for size in sizes), *(f"{s:.0f} s" for s in seconds), state]


def offload(s: Any) -> Made:
    """Prune a model of 2.7 billion parameters whose blocks stay on disk. Settings: folder, layers.

    Random weights in bf16 (5.4 GB, kept in the folder for the next time; 17 GB in all); random tokens. Each run is a
    process of its own that reports the peak of its resident memory, as `report.json` does; half of every state goes.
    """
    model, work, rows = Path(s.folder) / f"shape-{s.layers}", Path(s.folder) / "work", []
    if not (model / "config.json").is_file():
        progress("making the checkpoint")
        sspruner.save(shape_model("mamba2-2.7b", layers=s.layers, dtype=torch.bfloat16), model, overwrite=True)
    for scorer in ("magnitude", "ghost"):
        progress(f"pruning by {scorer}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rows.append(in_fresh_process(prune_on_disk, model, work, scorer))
    shutil.rmtree(work)
    head = ["scorer", "weights", "peak memory", "of it after imports", "scoring", "measuring, cutting, proof"]
    head += ["with loading and saving", "state per sequence"]
    note = "2 x 32 calibration tokens, 1 x 32 held out, random; seeds 0 and 1"
    return [table("A model that stays on disk", head, rows)], note
