"""`sspruner train`: training methods, with torchrun or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from sspruner.cli.console import emit, prepare, reports_errors_of_all, say
from sspruner.cli.help import examples
from sspruner.cli.machine import MACHINE, MODEL, OUTPUT, Device, Json, RecipeFile, RunsCode, Tokenizer
from sspruner.errors import InputError
from sspruner.recipes.train import DistilRecipe, GradualRecipe, TrainText, TwistRecipe

NAME = "train"
MODEL_FOLDER, WHOLE = "model", "whole"  # subfolders: the result; with twist, the whole trained model

Pruned = Annotated[str, Parameter(group=MODEL, help="Pruned model: folder or hub id.")]
Trained = Annotated[str, Parameter(group=MODEL, help="Model: folder or hub id.")]


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Machine:
    """Device of the training, and settings for loading models."""

    device: Device = None
    tokenizer: Tokenizer = None
    trust_remote_code: RunsCode = False

    def read(self, model: str | None) -> tuple[Any, Any]:
        """Load a model and its tokenizer."""
        import sspruner

        return sspruner.load(model, tokenizer=self.tokenizer, trust_remote_code=self.trust_remote_code)

    def read_teacher(self, model: str) -> Any:
        """Load a model without its tokenizer."""
        import sspruner

        return sspruner.load(model, trust_remote_code=self.trust_remote_code)[0]

    @staticmethod
    def teacher_of(model: str) -> str:
        """Return the name of the model that a pruned model's report says it was made from.

        Raises InputError if there is no report, or if that model is not there any more.
        """
        from sspruner.io.source import REFERENCES
        from sspruner.pruning.report import Report

        why = "--teacher is missing: which dense model was this one pruned from?"
        file = Path(model).expanduser() / "report.json"
        if not file.is_file():
            raise InputError(f"{why} {model} has no report.json that says it")
        report = Report.load(file)
        name = report.base_model or report.model.removesuffix(" (reference)")
        if report.base_model or Path(name).expanduser().is_dir() or (REFERENCES / name).is_dir():
            return name
        raise InputError(f"{why} It was {name}, which is not here")


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Run(Json):
    """The folder of the run."""

    out: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder of the run; the model is in its `model`."""

    def folder(self, text: TrainText) -> Path:
        """Check the output, and return the folder. Raises InputError if --text or --out is missing."""
        self.check()
        examples = getattr(text, "examples", None)
        if text.text and examples:
            raise InputError("--text and --examples: train on one of them")
        if not (text.text or examples) or self.out is None:
            raise InputError(f"{'--out' if text.text or examples else '--text'} is missing")
        return self.out


@contextmanager
def running(device: str | None) -> Iterator[tuple[Any, Callable[[dict[str, float], int, int], None]]]:
    """Yield the device, and a progress bar for the metrics of steps; libraries are quiet inside."""
    from sspruner.compute.device import resolve_device
    from sspruner.compute.progress import bars

    prepare(None)
    with bars() as report:
        yield (
            resolve_device(device),
            lambda metrics, step, steps: report(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s", step, steps
            ),
        )


@reports_errors_of_all
def distil(
    model: Pruned,
    /,
    *,
    file: RecipeFile = None,
    recipe: DistilRecipe = DistilRecipe(),
    machine: Machine = Machine(),
    run: Run = Run(),
) -> None:
    """Distil a pruned model from text and from its dense model; the same command continues an interrupted run.

    Examples:
        sspruner train distil smaller --teacher dense --text a.txt --out recovered
        sspruner train distil smaller --text a.txt --text b.jsonl --bf16 --out other
    """
    folder = run.folder(recipe.text)

    from sspruner.training.distil import distil as train
    from sspruner.training.text import Text

    with running(machine.device) as (where, progress):
        teacher = recipe.method.teacher or machine.teacher_of(str(model))
        student, tokenizer = machine.read(model)
        dense = machine.read_teacher(teacher)
        text = Text.of(recipe.text, recipe.settings, tokenizer)
        student, record = train(student.to(where), dense.to(where), text, folder, recipe, progress=progress)
        finish(student.cpu(), tokenizer, record, folder, run)


@reports_errors_of_all
def gradual(
    model: Trained,
    /,
    *,
    file: RecipeFile = None,
    recipe: GradualRecipe = GradualRecipe(),
    machine: Machine = Machine(),
    run: Run = Run(),
) -> None:
    """Prune by weight and gradient during training; the same command continues an interrupted run.

    Examples:
        sspruner train gradual dense --sparsity 0.7 --text a.txt --out sparse
        sspruner train gradual dense --axis head --text a.txt --out fewer-heads
    """
    folder = run.folder(recipe.text)

    from sspruner.training.examples import Examples
    from sspruner.training.gradual import gradual as train
    from sspruner.training.text import Text

    with running(machine.device) as (where, progress):
        loaded, tokenizer = machine.read(model)
        dense = machine.read_teacher(recipe.method.teacher).to(where) if recipe.method.teacher else None
        text, settings = recipe.text, recipe.settings
        data = Examples.of(text, settings) if text.examples else Text.of(text, settings, tokenizer)
        loaded, _, record = train(loaded.to(where), data, folder, recipe, teacher=dense, progress=progress)
        finish(loaded.cpu(), tokenizer, record, folder, run)


@reports_errors_of_all
def twist(
    model: Trained,
    /,
    *,
    file: RecipeFile = None,
    recipe: TwistRecipe = TwistRecipe(),
    machine: Machine = Machine(),
    run: Run = Run(),
) -> None:
    """Train random sub-networks, one per process of torchrun, so that any of them can be kept at the end.

    Examples:
        sspruner train twist dense --keep 0.5 --text a.txt --out drawn
        sspruner train twist dense --axis head,state --text a.txt --out drawn
    """
    folder = run.folder(recipe.text)

    import sspruner
    from sspruner.training.text import Text
    from sspruner.training.twist import twist as train

    with running(machine.device) as (where, progress):
        loaded, tokenizer = machine.read(model)
        text = Text.of(recipe.text, recipe.settings, tokenizer)
        loaded, drawn, record = train(loaded.to(where), text, folder, recipe, progress=progress)
        keep_draws(loaded.cpu(), tokenizer, drawn, folder)
        finish(sspruner.apply(loaded, drawn.plans[drawn.best]), tokenizer, record, folder, run, drawn.to_json())


def keep_draws(model: Any, tokenizer: Any, drawn: Any, out: Path) -> None:
    """Save the whole trained model, and the plans of its drawn sub-networks, in the first process."""
    import sspruner
    from sspruner.compute.processes import rank

    if rank() == 0:
        sspruner.save(model, out / WHOLE, tokenizer, overwrite=True)
        for number, plan in enumerate(drawn.plans):
            plan.save(out / f"draw-{number}.json")


def finish(model: Any, tokenizer: Any, record: Any, out: Path, run: Run, more: dict[str, Any] | None = None) -> None:
    """Save the result and print its record, with `more` as JSON, in the first process."""
    import dataclasses
    import json

    import sspruner
    from sspruner.compute.processes import barrier, rank

    where = out / MODEL_FOLDER
    if rank() == 0:
        sspruner.save(model, where, tokenizer, overwrite=True)
        emit(json.dumps(dataclasses.asdict(record) | {"model": str(where)} | (more or {}), indent=2) + "\n", run.json)
        if not run.only:
            before, after = record.perplexity or record.held_out_loss
            unit, measure = ("tokens", "perplexity") if record.perplexity else ("examples", "loss")
            say(
                f"{record.steps:,} steps, {record.tokens:,} {unit}, {record.seconds / 60:.1f} minutes"
                f"{'' if record.finished else ' (stopped early by --max-minutes)'}: held-out {measure} "
                f"{before:.3f} -> {after:.3f}\n{where}"
            )
    barrier()


app = App(name=NAME)
METHODS: tuple[Any, ...] = (distil, gradual, twist)
for place, method in enumerate(METHODS):
    app.command(method, sort_key=place, help_epilogue=examples(method))
