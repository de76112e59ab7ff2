"""`sspruner bench`: speed of models, with the ceiling of the machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from cyclopts import Group, Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show
from sspruner.cli.help import command_app
from sspruner.cli.machine import MODEL, Json, Timing
from sspruner.errors import InputError
from sspruner.recipes.flags import FromText, read_texts, text, texts
from sspruner.recipes.lists import numbers_in
from sspruner.recipes.measure import BenchOptions
from sspruner.recipes.texts import several

NAME = "bench"

Models = Annotated[str, Parameter(group=MODEL, help="Folders or hub ids.", show_default="the reference model")]


@Parameter(name="*", group=Group("Shapes", sort_key=0.5))
@dataclass(frozen=True)
class Shapes:
    """Published shapes with random weights, in addition to models or instead of them."""

    shape: Annotated[tuple[str, ...], texts("NAME"), FromText(several, "--shape")] = ()
    """Published shape with random weights: mamba2-130m, 370m, 780m, 1.3b, 2.7b. Repeatable."""

    keep: Annotated[tuple[int, ...], text("N,N"), FromText(numbers_in, "--keep")] = ()
    """With --shape: also with these state sizes, e.g. 64,32,16."""

    balanced: Annotated[tuple[int, ...], text("N,N"), FromText(numbers_in, "--balanced")] = ()
    """With --shape: also with this many directions of the state, e.g. 16."""

    def __post_init__(self) -> None:
        """Read texts such as `64,32`. Raises InputError for sizes without a shape."""
        read_texts(self)
        if (self.keep or self.balanced) and not self.shape:
            raise InputError("--keep and --balanced are for --shape; prune a model, and name its folder, to measure it")


@reports_errors
def command(
    *models: Models,
    shapes: Shapes = Shapes(),
    options: BenchOptions = BenchOptions(),
    machine: Timing = Timing(),
    output: Json = Json(),
) -> None:
    """Run `sspruner bench`.

    Examples:
        sspruner bench path/to/model smaller --batch 1,16 --prompt 512
        sspruner bench --shape mamba2-370m --keep 64,32 --batch 64 --json bench.json
        sspruner bench path/to/model smaller --engine vllm --python env/bin/python
    """
    output.check()

    import sspruner
    from sspruner.compute.progress import bars
    from sspruner.io.named import named_models
    from sspruner.reporting.bench import bench_table

    prepare(machine.plugin, *([] if models or shapes.shape else [None]))
    models_by_name = named_models(
        list(models),
        shapes.shape,
        shapes.keep,
        shapes.balanced,
        dtype=machine.dtype,
        device=machine.device if options.runner.engine == "transformers" else "cpu",
        seed=options.load.seed,
        trust_remote_code=machine.trust_remote_code,
    )
    with bars() as progress:
        measured = sspruner.bench(models_by_name, options, device=machine.device, progress=progress)
    measured = replace(measured, command=command_line())
    emit(measured.to_json(), output.json)
    if not output.only:
        show(bench_table(measured))


app = command_app(NAME, command)
