"""Measure on a GPU, in one call of under ten minutes, what recipes/gpu.yaml lists; write tables with the card's name.

    python benchmarks/gpu.py --minutes 9 --out OUT                     # on a machine with a GPU
    python benchmarks/gpu.py --device cpu --tiny --out OUT             # that everything runs, without one
    python benchmarks/all.py gpu --work OUT                            # puts OUT/gpu.md into its page

Every block has a process of its own and a share of the time that is left. After each job it writes OUT/BLOCK.json, so
that what was measured survives whatever comes later; a job that fails, or does not fit into memory, says so in a line.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from commands import beside, models_of
from common import HERE, NO, Made, over, progress, random_tokens, span, table
from run import provenance

import sspruner
from sspruner.benchmarking.ceiling import synchronise
from sspruner.benchmarking.record import Timing
from sspruner.benchmarking.shapes import STATE, shape_model
from sspruner.benchmarking.statistics import median_interval
from sspruner.compute.device import resolve_device
from sspruner.compute.forward import forward, output_of
from sspruner.files import strict_json
from sspruner.files.output import write_file
from sspruner.recipes.measure import BenchOptions
from sspruner.recipes.train import Settings
from sspruner.surgery.proof import slice_with_proof
from sspruner.testing.models import FAMILIES, VOCABULARY, zoo
from sspruner.testing.plans import random_plan
from sspruner.training.gradual import likelihood
from sspruner.training.loop import adamw, recompute, take_step

RECIPE = HERE / "recipes/gpu.yaml"
KERNELS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}
LEFT, NO_ROOM = "not run: time", "does not fit into memory"
BF16 = 2.0  # how many times as far as the masked model's the sliced model's bf16 logits may be from those in fp32
PRELOADED = ["torch", "transformers", "sspruner.pruning.prune", "sspruner.benchmarking.measure"]
Record = dict[str, Any]
Jobs = dict[str, Callable[[], Record]]


def kernels() -> str:
    """Return the packages of kernels that transformers calls, all that can be imported, with their versions."""
    found = []
    for name, distribution in KERNELS.items():
        try:
            import_module(name)
            found.append(f"{name} {version(distribution)}")
        except PackageNotFoundError:
            found.append(name)
        except Exception:  # like transformers, which takes no notice of a package that cannot be imported
            continue
    return ", ".join(found) or "transformers' own code, no kernels"


def exactness(how: Record, device: torch.device) -> Jobs:
    """Return a job for each family: masked = sliced, on every axis and on all at once."""
    return {family: partial(family_exact, family, how["sizes"], device) for family in how.get("families", FAMILIES)}


def family_exact(family: str, sizes: Record, device: torch.device) -> Record:
    """Cut one tiny model on every axis: errors over what is allowed, in fp32 and bf16; and a line for what is wrong."""
    dense = zoo(family, **sizes).to(device)
    axes = sspruner.trace(dense).axes
    fp32, bf16, wrong = [0.0], [0.0], []
    for cut in [*((axis,) for axis in axes), axes]:
        try:
            model = copy.deepcopy(dense)
            plan = random_plan(sspruner.trace(model), cut, seed=0, multiple_of=8)
            proof = slice_with_proof(model, plan, sspruner.trace(model))
            fp32.append(proof.error / proof.tolerance)
            bf16.append(bf16_error(copy.deepcopy(dense).bfloat16(), plan))
            if not bf16[-1] <= 1:  # also catches NaN
                wrong.append(f"{' and '.join(cut)}: bf16 error {bf16[-1]:.2f} times what is allowed")
        except Exception as error:  # of one axis: the others are cut all the same
            wrong.append(f"{' and '.join(cut)}: {one_line(error)}")
    return {"cuts": len(axes) + 1, "fp32": max(fp32), "bf16": max(bf16), "wrong": wrong}


def bf16_error(model: Any, plan: Any) -> float:
    """Return the mean error of the sliced model's bf16 logits over that of the masked model's, and over BF16.

    Both are errors against the masked model in fp32: bf16 itself costs that much.
    """
    graph, ids = sspruner.trace(model), random_tokens(2, 80, VOCABULARY)

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return output_of(forward(model, ids, use_cache=False)).float()

    with sspruner.masked(model, plan, graph):
        masked, exact = logits(model), logits(copy.deepcopy(model).float())
    sliced = logits(sspruner.apply(model, plan))
    return float((sliced - exact).abs().mean() / (masked - exact).abs().mean()) / BF16


def speed(how: Record, device: torch.device) -> Jobs:
    """Return a job for each phase and batch: `sspruner.bench` of the dense model and its cuts, in turns."""
    models = cache(partial(models_of, how["shape"], how, None, layers=how.get("layers"), device=device))

    def job(phase: str, load: Record, batch: int) -> Record:
        for module in [m for model in models().values() for m in model.modules() if hasattr(m, "chunk_size")]:
            module.chunk_size = min(256, load["prompt"])  # a prompt is padded to it
        options = BenchOptions.of(**load | {"batches": (batch,)}, cuda_graph=phase.endswith("CUDA graph"))
        found = sspruner.bench(models(), options, device=str(device))
        rows = [row.to_json() for row in found.rows if phase.startswith(row.phase)]
        return {"rows": rows, "wrong": [f"{row['model']}: {row['error']}" for row in found.failed]}

    loads = {phase: {key: v for key, v in load.items() if key != "batches"} for phase, load in how["phases"].items()}
    return {
        f"{phase}, batch {batch}": partial(job, phase, loads[phase], batch)
        for phase, load in how["phases"].items()
        for batch in load["batches"]
    }


def scoring(how: Record, device: torch.device) -> Jobs:
    """Return a job for each row: prune a model of a published shape, some times."""

    def job(row: Record) -> Record:
        fields = {name: value for name, value in row.items() if name != "repeats"}
        return {"runs": [pruned(how, fields, device) for _ in range(row["repeats"])]}

    return {label: partial(job, row) for label, row in how["rows"].items()}


def pruned(how: Record, fields: Record, device: torch.device) -> Record:
    """Prune by GHOST: seconds of every phase, peak memory, the proof's error; and a forward over as much text."""
    size, model = how["data"], shape_model(how["shape"], layers=how.get("layers"), dtype=torch.bfloat16, device=device)
    ids = random_tokens(size["samples"] + size["held_out"], size["seq_len"], model.config.vocab_size)
    data = sspruner.calibration(ids, model, **size)
    once = forward_of(model, device, size["samples"], size["seq_len"])
    peak(device)
    report = sspruner.prune(model, "ghost", sparsity=0.5, calibration=data, device=str(device), **fields).report
    found = {"seconds": report.seconds, "error": report.proof.error, "forward": once.to_json()}
    return found | {"peak_bytes": peak(device)}


def training(how: Record, device: torch.device) -> Jobs:
    """Return one job: steps of AdamW of the dense model and of one with a smaller state, in turns."""
    return {"a step": partial(steps, how, device)}


def steps(how: Record, device: torch.device) -> Record:
    """Train both models on one batch: seconds and losses of every step, a forward in bf16, and peak memory of both."""
    settings, shape, layers = Settings(**how["settings"]), how["shape"], how.get("layers")
    states, found = {"dense": STATE, f"state {how['state']}": how["state"]}, dict[str, Record]()
    for name, state in states.items():
        narrow = partial(shape_model, shape, state, layers=layers, dtype=torch.bfloat16, device=device)
        once = forward_of(narrow(), device, settings.batch, settings.seq_len)
        found[name] = {"forward": once.to_json(), "seconds": [], "losses": []}
    peak(device)
    models = {name: shape_model(shape, state, layers=layers, device=device) for name, state in states.items()}
    ids = random_tokens(settings.batch, settings.seq_len, models["dense"].config.vocab_size).to(device)
    for model in models.values():
        recompute(model.requires_grad_(True).train(), "enable")
    optimizers = {name: adamw([*model.parameters()], settings) for name, model in models.items()}
    for step in range(1, how["repeats"] + 2):
        for name, model in models.items():
            synchronise(device)
            start = time.perf_counter()
            found[name]["losses"].append(take_step(model, ids, optimizers[name], settings, step, likelihood)["loss"])
            synchronise(device)
            found[name]["seconds"] += [time.perf_counter() - start] * (step > 1)  # the first one warms up
    return {"rows": found, "peak_bytes": peak(device)}


def forward_of(model: Any, device: torch.device, batch: int, length: int) -> Timing:
    """Return the time of one forward over as many tokens, beside its ceiling."""
    load = {"batches": (batch,), "prompt": length, "generate": 1, "repeats": 3}
    return sspruner.bench({"": model}, device=str(device), **load).row("", batch, "prefill")


def peak(device: torch.device) -> int | None:
    """Return the most bytes of the GPU since the last call, and begin anew; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def attempted(job: Callable[[], Record]) -> Record:
    """Run a job; return what it measured, or one line that says why it did not."""
    try:
        return job()
    except Exception as error:  # the other jobs are run all the same
        full = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        return {"why": NO_ROOM if full else one_line(error)}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """Return an error's type and the beginning of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def run_jobs(jobs: Jobs, file: Path, facts: Record, deadline: float) -> None:
    """Run jobs one after another; write all records to the file before the first and after each.

    deadline: time.time() after which none begins, nor one that would pass it if it took as long as the one before.
    """
    records, last = {what: {"why": LEFT} for what in jobs}, 0.0
    write(file, facts, records)
    for what, job in jobs.items():
        begun = time.time()
        if begun + last < deadline:
            records[what] = attempted(job)
            last = time.time() - begun
            write(file, facts, records)


def block(name: str, how: Record, device: str, file: Path, deadline: float) -> None:
    """Run one block, with fp32 that is not TF32 in convolutions either. For a process of its own."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    where = resolve_device(device)
    jobs: Jobs = globals()[name.partition("-")[0]](how, where)
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else f"no GPU, {where}"
    run_jobs(jobs, file, {"card": card, "kernels": kernels()}, deadline)


def write(file: Path, facts: Record, records: Record) -> None:
    """Write what a block has measured so far."""
    write_file(file, strict_json.dumps({"facts": facts, "jobs": records}, indent=1) + "\n")


def read(file: Path) -> Record:
    """Read what a block has measured."""
    found: Record = strict_json.loads(file.read_text(encoding="utf-8"))
    return found


def measured(device: str, minutes: float, out: Path, tiny: bool) -> Made:
    """Run all blocks that fit into the time, each in a process; return the tables of what is in their files."""
    deadline, blocks = time.time() + 60 * minutes, yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return [f"Not run: torch {torch.__version__} sees no GPU here."], "no GPU"
    out.mkdir(parents=True, exist_ok=True)
    # On a CPU what takes long is imported once. A fork of a process in which an import asked for CUDA has none.
    processes = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    processes.set_forkserver_preload(PRELOADED)
    for name, how in blocks.items():
        file, begun = out / f"{name}.json", time.time()
        write(file, {}, {name: {"why": LEFT}})
        end = begun + how["share"] * (deadline - begun)
        child = processes.Process(target=block, args=(name, how | (how["tiny"] if tiny else {}), device, file, end))
        child.start()
        child.join(max(0.0, end - time.time()))
        progress(f"{name}: {'stopped' if child.is_alive() else 'done'} after {time.time() - begun:.0f} s")
        if child.exitcode:  # nothing says why, such as a fault in a kernel
            because = {"why": f"not run: its process ended with {child.exitcode}"}
            found = read(file)
            write(file, found["facts"], {k: because if v == {"why": LEFT} else v for k, v in found["jobs"].items()})
        child.kill()
        child.join()
    return drawn(out, blocks), f"at most {minutes:g} minutes; seed 0; medians with 95 % intervals"


def drawn(out: Path, blocks: Iterable[str]) -> list[str]:
    """Draw a table of each block, and a line for each job that measured nothing."""
    made = []
    for name in blocks:
        found = read(out / f"{name}.json")
        jobs = {what: record for what, record in found["jobs"].items() if "why" not in record}
        title = f"{name}: {'; '.join(found['facts'].values())}"
        shown = attempted(partial(table_of, name.partition("-")[0], title, jobs))
        made.append(shown.get("text") or f"\n**{title}** {shown['why']}")
        for what, record in found["jobs"].items():
            made += [f"\n– {what}: {line}" for line in record.get("wrong", record.get("why", "").splitlines())]
    return made


def table_of(block: str, title: str, jobs: Record) -> Record:
    """Return the table of a block, or its title where nothing was measured."""
    return {"text": DRAW[block](title, jobs) if jobs else f"\n**{title}**"}


def exactness_table(title: str, jobs: Record) -> str:
    """Draw a line for each family: largest errors over what is allowed."""
    rows = [
        [family, f"{row['cuts']}", f"{row['fp32']:.2f}", f"{row['bf16']:.2f}", "no" if row["wrong"] else "yes"]
        for family, row in jobs.items()
    ]
    title = f"{title}; {sum(not row['wrong'] for row in jobs.values())} of {len(jobs)} families exact"
    return table(title, ["family", "cuts", "fp32 error / allowed", "bf16 error / allowed", "exact"], rows)


def speed_table(title: str, jobs: Record) -> str:
    """Draw a line for each phase and batch, as `commands.speed` does, with the peak memory of each model."""
    rows, cuts = [], dict[str, None]()
    found = {what: {row["model"]: Timing.from_json(row) for row in record["rows"]} for what, record in jobs.items()}
    for models in found.values():
        cuts |= dict.fromkeys(name for name in models if "," in name)
    for what, models in found.items():
        dense = next((row for name, row in models.items() if name not in cuts), None)
        smaller = [models.get(cut) for cut in cuts]
        memory = [gigabytes(row.peak_bytes if row else None) for row in (dense, *smaller)]
        rows.append([what, *beside(dense, smaller), " / ".join(memory)])
    head = ["what", "dense, ms", "of the ceiling", *(f"{cut.partition(', ')[2]} / dense" for cut in cuts)]
    return table(title, [*head, "bytes and operations allow", "peak GB"], rows)


def scoring_table(title: str, jobs: Record) -> str:
    """Draw a line for each row: seconds of scoring and of all phases, and how many forwards over the text that is."""
    rows = []
    for label, record in jobs.items():
        runs = record["runs"]
        once, whole = Timing.from_json(runs[-1]["forward"]), [sum(run["seconds"].values()) for run in runs]
        cells = [span(median_interval(took)) for took in ([run["seconds"]["scoring"] for run in runs], whole)]
        cells += [
            f"{median(whole) / median(once.seconds):.1f}",
            f"{once.ms.value / 1000:.2f}",
            f"{100 * once.fraction:.0f} %",
        ]
        rows.append([label, *cells, gigabytes(runs[-1]["peak_bytes"]), f"{max(run['error'] for run in runs):.0e}"])
    head = [
        "prune",
        "scoring, s",
        "whole, s",
        "in forwards",
        "a forward, s",
        "of its ceiling",
        "peak GB",
        "proof's error",
    ]
    return table(title, head, rows)


def training_table(title: str, jobs: Record) -> str:
    """Draw a line for each model: a step, what three forwards at their ceiling are of it, and that the loss falls."""
    (found,) = jobs.values()
    dense, rows = next(iter(found["rows"].values())), []
    for label, row in found["rows"].items():
        ms, once = median_interval([1000 * s for s in row["seconds"]]), Timing.from_json(row["forward"])
        speed, losses = 1000 * once.tokens / ms.value, row["losses"]
        cells = [
            span(ms, 1),
            f"{300 * speed / once.ceiling:.0f} %",
            over(dense["seconds"], row["seconds"]),
            f"{speed:,.0f}",
        ]
        rows.append([label, *cells, f"{losses[0]:.2f} to {losses[-1]:.2f}"])
    title += f"; both models together at most {gigabytes(found['peak_bytes'])} GB"
    return table(title, ["model", "ms a step", "of the ceiling", "dense / it", "tokens/s", "loss"], rows)


def gigabytes(size: int | None) -> str:
    """Return bytes as GB; – where they are not measured."""
    return f"{size / 1e9:.1f}" if size else NO


DRAW = {"exactness": exactness_table, "speed": speed_table, "scoring": scoring_table, "training": training_table}


def main() -> None:
    """Measure, print the tables, and keep them as OUT/gpu.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it; default: 9")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the results; default: gpu")
    parser.add_argument("--tiny", action="store_true", help="a little of everything, which measures nothing")
    given = parser.parse_args()
    made, note = measured(given.device, given.minutes, given.out, given.tiny)
    given.out.mkdir(parents=True, exist_ok=True)
    write_file(given.out / "gpu.md", text := "\n".join([*made, "", provenance(note)]) + "\n")
    print(text)


if __name__ == "__main__":
    main()
