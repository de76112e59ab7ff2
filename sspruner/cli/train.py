"""`sspruner train`: methods that train, under torchrun or alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sspruner.cli import options as o
from sspruner.cli.console import check_json, emit, names_from, prepare, progress_bar, reports_errors_of_all
from sspruner.errors import InputError

NAME = "train"
MODEL, WHOLE = "model", "whole"  # in the folder of a run: what came of it; of twist, all that was trained

app = typer.Typer(
    name=NAME, help="Train what was cut, or while it is cut; start it with torchrun for several processes."
)

Text = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to train on: a UTF-8 file, .jsonl with `text`, or a datasets name (NAME[:CONFIG[:SPLIT]]). "
        "Repeatable: blocks of all in equal parts."
    ),
]
HeldOut = Annotated[int, typer.Option(help="Blocks at the beginning of each text that are never trained on.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to train on; the learning rate falls over them.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop after so many minutes, with what there is.")]
Batch = Annotated[int, typer.Option(help="Sequences in a step, of all processes together.")]
AtOnce = Annotated[int, typer.Option(help="Sequences in one forward of one process.")]
BlockLen = Annotated[int, typer.Option("--seq-len", help="Tokens in a sequence.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="The largest learning rate.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; none of vectors.")]
Every = Annotated[int, typer.Option(help="Steps between checkpoints, each with the held-out perplexity.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bf16; weights and moments stay in fp32.")]
Recompute = Annotated[bool, typer.Option("--recompute", help="Compute activations twice and keep none: less memory.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Folder of the run; the model is in its `model`.")]


@contextmanager
def running(device: str | None) -> Iterator[tuple[Any, Callable[[dict[str, float], int, int], None]]]:
    """With quiet libraries: the device, and a progress bar for the metrics of steps."""
    from sspruner.compute.device import resolve_device

    prepare(None)
    with progress_bar() as report:
        yield (
            resolve_device(device),
            lambda metrics, step, steps: report(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s", step, steps
            ),
        )


def asked(text: list[str] | None, out: Path | None, *values: Any) -> tuple[Path, Any]:
    """The run's folder and the loop's settings. Raises InputError where --text or --out is missing."""
    from sspruner.training.loop import Settings

    if not text or out is None:
        raise InputError(f"{'--out' if text else '--text'} is missing")
    names = ("max_tokens", "max_minutes", "batch", "at_once", "seq_len", "learning_rate", "weight_decay", "bf16")
    return out, Settings(**dict(zip((*names, "recompute", "every", "seed"), values, strict=True)))


def source(text: Any, tokenizer: Any, seq_len: int, held_out: int, seed: int) -> Any:
    """The training text. Raises InputError for a model without a tokenizer."""
    from sspruner.training.text import Text as Source

    if tokenizer is None:
        raise InputError("training text needs a tokenizer, and this model has none: give --tokenizer")
    return Source(tuple(text), tokenizer, seq_len, held_out, seed)


@app.command("distil")
@reports_errors_of_all
def distil(
    model: Annotated[str, typer.Argument(help="Pruned model: folder or hub id.", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="Dense model: folder or hub id.", show_default="the reference model")
    ] = None,
    text: Text = None,
    alpha: Annotated[float, typer.Option(help="Share of the teacher in the loss; the rest is the text's.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both models' probabilities in the teacher's part.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the error of hidden states after each block.")] = 0.0,
    lora: Annotated[int, typer.Option(help="Train narrow matrices of this rank instead; merged at the end.")] = 0,
    held_out: HeldOut = 16,
    max_tokens: MaxTokens = 1_000_000,
    max_minutes: MaxMinutes = None,
    batch: Batch = 16,
    at_once: AtOnce = 8,
    seq_len: BlockLen = 256,
    learning_rate: Rate = 1e-4,
    weight_decay: WeightDecay = 0.01,
    every: Every = 100,
    bf16: Bf16 = False,
    recompute: Recompute = False,
    device: o.Device = None,
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    out: RunFolder = None,
    json: o.Json = None,
) -> None:
    """Let a pruned model learn from text and from its dense model; goes on where the same command was interrupted."""
    import sspruner
    from sspruner.training.distil import distil as train

    check_json(json)
    folder, settings = asked(
        text, out, max_tokens, max_minutes, batch, at_once, seq_len, learning_rate, weight_decay, bf16, recompute,
        every, seed,
    )  # fmt: skip
    with running(device) as (where, progress):
        student, words = sspruner.load(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        dense, _ = sspruner.load(teacher, trust_remote_code=trust_remote_code)
        student, found = train(
            student.to(where), dense.to(where), source(text, words, seq_len, held_out, seed), folder, settings=settings,
            alpha=alpha, temperature=temperature, hidden=hidden, lora=lora, progress=progress,
        )  # fmt: skip
        finish(student.cpu(), words, found, folder, json)


@app.command("gradual")
@reports_errors_of_all
def gradual(
    model: Annotated[str, typer.Argument(help="Model: folder or hub id.", show_default=False)],
    text: Text = None,
    axis: Annotated[
        str, typer.Option(help="What to remove: weight for single elements, or an axis of units.")
    ] = "weight",
    sparsity: Annotated[float, typer.Option(help="The fraction that is gone at the end.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Exponent of the gradient in |w| |g|^alpha; 0: magnitude.")] = 1.0,
    mask_every: Annotated[int, typer.Option(help="Steps between masks.")] = 10,
    begin: Annotated[float, typer.Option(help="Fraction of the steps after which something goes.")] = 0.0,
    end: Annotated[float, typer.Option(help="Fraction of the steps after which all of it is gone.")] = 0.7,
    allocation: Annotated[
        str, typer.Option(help="Of units: uniform, the same fraction of every layer, or global, one threshold.")
    ] = "uniform",
    teacher: Annotated[
        str | None, typer.Option(help="Learn from this model, too: folder or hub id.", show_default="the text alone")
    ] = None,
    held_out: HeldOut = 16,
    max_tokens: MaxTokens = 1_000_000,
    max_minutes: MaxMinutes = None,
    batch: Batch = 16,
    at_once: AtOnce = 8,
    seq_len: BlockLen = 256,
    learning_rate: Rate = 1e-4,
    weight_decay: WeightDecay = 0.01,
    every: Every = 100,
    bf16: Bf16 = False,
    recompute: Recompute = False,
    device: o.Device = None,
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    out: RunFolder = None,
    json: o.Json = None,
) -> None:
    """Prune by weight and gradient while the model trains; goes on where the same command was interrupted."""
    import sspruner
    from sspruner.training.gradual import gradual as train

    check_json(json)
    folder, settings = asked(
        text, out, max_tokens, max_minutes, batch, at_once, seq_len, learning_rate, weight_decay, bf16, recompute,
        every, seed,
    )  # fmt: skip
    with running(device) as (where, progress):
        loaded, words = sspruner.load(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        dense = sspruner.load(teacher, trust_remote_code=trust_remote_code)[0].to(where) if teacher else None
        loaded, _, found = train(
            loaded.to(where), source(text, words, seq_len, held_out, seed), folder, axis=axis, sparsity=sparsity,
            alpha=alpha, every=mask_every, begin=begin, end=end, allocation=allocation, teacher=dense,
            settings=settings, progress=progress,
        )  # fmt: skip
        finish(loaded.cpu(), words, found, folder, json)


@app.command("twist")
@reports_errors_of_all
def twist(
    model: Annotated[str, typer.Argument(help="Model: folder or hub id.", show_default=False)],
    text: Text = None,
    axis: Annotated[
        str, typer.Option(help="What is dealt to the workers: an axis, or several separated by commas.")
    ] = "head",
    keep: Annotated[float, typer.Option(help="The fraction of the units that every sub-network has.")] = 0.5,
    deal_every: Annotated[int, typer.Option(help="Steps after which workers are averaged and units dealt anew.")] = 15,
    ends: Annotated[int, typer.Option(help="Blocks at each end that every sub-network has whole.")] = 2,
    draws: Annotated[int, typer.Option(help="Sub-networks that are drawn at the end; the best is kept.")] = 8,
    held_out: HeldOut = 16,
    max_tokens: MaxTokens = 1_000_000,
    max_minutes: MaxMinutes = None,
    batch: Batch = 16,
    at_once: AtOnce = 8,
    seq_len: BlockLen = 256,
    learning_rate: Rate = 1e-4,
    weight_decay: WeightDecay = 0.01,
    every: Every = 100,
    bf16: Bf16 = False,
    recompute: Recompute = False,
    device: o.Device = None,
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    out: RunFolder = None,
    json: o.Json = None,
) -> None:
    """Train random sub-networks, one in each process of torchrun, so that any of them can be kept at the end."""
    import sspruner
    from sspruner.training.twist import twist as train

    check_json(json)
    folder, settings = asked(
        text, out, max_tokens, max_minutes, batch, at_once, seq_len, learning_rate, weight_decay, bf16, recompute,
        every, seed,
    )  # fmt: skip
    with running(device) as (where, progress):
        loaded, words = sspruner.load(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        loaded, drawn, found = train(
            loaded.to(where), source(text, words, seq_len, held_out, seed), folder, axis=names_from([axis]), keep=keep,
            every=deal_every, ends=ends, draws=draws, settings=settings, progress=progress,
        )  # fmt: skip
        keep_draws(loaded.cpu(), words, drawn, folder)
        finish(sspruner.apply(loaded, drawn.plans[drawn.best]), words, found, folder, json, drawn.to_json())


def keep_draws(model: Any, tokenizer: Any, drawn: Any, out: Path) -> None:
    """Save the trained model as a whole, and the plans of its drawn sub-networks; the first process does."""
    import sspruner
    from sspruner.compute.processes import rank

    if rank() == 0:
        sspruner.save(model, out / WHOLE, tokenizer, overwrite=True)
        for number, plan in enumerate(drawn.plans):
            plan.save(out / f"draw-{number}.json")


def finish(
    model: Any, tokenizer: Any, found: Any, out: Path, json: Path | None, more: dict[str, Any] | None = None
) -> None:
    """Save what came of it, and say what the run came to, and `more` of it; the first process does."""
    import dataclasses

    import sspruner
    from sspruner.compute.processes import barrier, rank
    from sspruner.files.strict_json import dumps

    where = out / MODEL
    if rank() == 0:
        sspruner.save(model, where, tokenizer, overwrite=True)
        emit(dumps(dataclasses.asdict(found) | {"model": str(where)} | (more or {}), indent=2) + "\n", json)
        if str(json) != "-":
            before, after = found.perplexity
            typer.echo(
                f"{found.steps:,} steps, {found.tokens:,} tokens, {found.seconds / 60:.1f} minutes"
                f"{'' if found.finished else ' (stopped early by --max-minutes)'}: held-out perplexity "
                f"{before:.3f} -> {after:.3f}\n{where}"
            )
    barrier()
