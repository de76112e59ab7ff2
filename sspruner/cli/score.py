"""`sspruner score`: write scores, the first step of prune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sspruner.cli.console import from_cache, prepare, reports_errors_of_all, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import OUTPUT, Machine, Model, Places
from sspruner.errors import InputError
from sspruner.recipes.flags import METHOD, REMOVE, text, texts
from sspruner.recipes.parts import CalibrationText, Scoring
from sspruner.recipes.texts import names_by_axis

NAME = "score"


@Parameter(name="*")
@dataclass(frozen=True)
class Scored(Scoring):
    """The axes and scorers."""

    axis: Annotated[str, text("AXIS"), Parameter(group=REMOVE)] = "state"
    """What to score; several separated by commas."""

    scorer: Annotated[tuple[str, ...], texts("NAME"), Parameter(group=METHOD, show_default="ghost")] = ()
    """Scorer, or one per axis: state=ghost,mlp=magnitude. Repeatable: one pass serves all."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the scorers as given; default: ghost."""
        return self.scorer or ("ghost",)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Files:
    """Output of scores and curves."""

    curves: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Also measure the damage of cutting each layer alone, for `plan --allocation adaptive`."""

    out: Annotated[Path | None, Parameter(metavar="FILE", show_default="scores.safetensors, or scores")] = None
    """File to write; with several scorers a folder with one file each."""

    def of(self, names: Sequence[str]) -> list[Path]:
        """Return the file of each scorer. Raises InputError if one cannot be written."""
        from sspruner.files.output import check_file

        out = self.out or Path("scores.safetensors" if len(names) == 1 else "scores")
        if self.curves:
            check_file(self.curves)
            if len(names) > 1:
                raise InputError("--curves measures the layers of one scorer; name one")
        if len(names) == 1:
            check_file(out)
            return [out]
        if out.exists() and not out.is_dir():
            raise InputError(f"output {out}: is a file; of several scorers give a folder")
        check_file(out.parent / f"{out.name}.safetensors")
        return [out / f"{_file_name(name)}.safetensors" for name in names]


@reports_errors_of_all
def command(
    model: Model = None,
    /,
    *,
    scored: Scored = Scored(),
    text: CalibrationText = CalibrationText(),
    machine: Machine = Machine(),
    places: Places = Places(),
    files: Files = Files(),
) -> None:
    """Run `sspruner score`.

    Examples:
        sspruner score path/to/model --axis state,head --out scores.safetensors
        sspruner score path/to/model --scorer ghost --scorer taylor --out scores
    """
    outs = files.of(scored.names)

    import sspruner
    from sspruner.compute.processes import barrier, rank
    from sspruner.compute.progress import bars

    prepare(machine.plugin, model)
    scorers = known_scorers(scored.names)
    with bars() as progress:
        loaded, tokenizer = sspruner.load(model, **machine.arguments, **places.arguments)
        source: Any = text.source
        size: dict[str, Any] = {"samples": text.samples, "seq_len": text.seq_len, "seed": scored.seed}
        if files.curves:  # score and measure on the same text
            source = sspruner.calibration(
                text.source, loaded, tokenizer, **size, text_column=text.text_column, progress=progress
            )
        scores_by_name = sspruner.score(
            loaded,
            scorers,
            axis=[part.strip() for part in scored.axis.split(",")],
            calibration=source,
            tokenizer=tokenizer,
            device=machine.device,
            cache=not machine.no_cache,
            progress=progress,
            options=scored.options,
            text_column=text.text_column,
            **size,
        )
        if files.curves:
            (only,) = scores_by_name.values()
            measured = sspruner.sensitivity(loaded, only, source, device=machine.device, progress=progress)
    if rank() == 0:
        if files.curves:
            measured.save(files.curves)
        if len(outs) > 1:
            outs[0].parent.mkdir(exist_ok=True)
        for file, name, scores in zip(outs, scored.names, scores_by_name.values(), strict=True):
            scores.save(file)
            say(f"{len(scores.importance)} dependency groups scored by {name} in {file}{from_cache(scores)}")
        if files.curves:
            say(f"damage of cutting each layer alone, on {measured.tokens:,} tokens, in {files.curves}")
    barrier()


def known_scorers(names: Sequence[str]) -> list[Any]:
    """Resolve scorers, or those of each axis. Raises InputError for one that is not installed."""
    from sspruner.scoring.known import find_scorer

    scorers = [names_by_axis(name, "--scorer") for name in names]
    for each in scorers:
        for name in each.values() if isinstance(each, dict) else [each]:
            find_scorer(name)
    return scorers


def _file_name(scorer: str) -> str:
    """Return a scorer's name, or its names by axis, as a file name."""
    return "".join(c if c.isalnum() or c in "-_=" else "-" for c in scorer)


app = command_app(NAME, command)
