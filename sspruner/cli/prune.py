"""`sspruner prune`: score, plan, cut, prove and measure in one command."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from sspruner.cli.console import (
    command_line,
    emit,
    from_cache,
    kept_if_interrupted,
    prepare,
    reports_errors_of_all,
    say,
    show,
    warn,
)
from sspruner.cli.help import command_app
from sspruner.cli.machine import Apart, Machine, Model, Output, RecipeFile
from sspruner.errors import InputError
from sspruner.recipes.recipe import Recipe

NAME = "prune"


@reports_errors_of_all
def command(
    model: Model = None,
    /,
    *,
    file: RecipeFile = None,
    recipe: Recipe = Recipe(),
    machine: Machine = Machine(),
    apart: Apart = Apart(),
    output: Output = Output(),
) -> None:
    """Run `sspruner prune`.

    Examples:
        sspruner prune path/to/model --scorer ghost --sparsity 0.75 --out smaller
        sspruner prune --recipe smaller/recipe.yaml --sparsity 0.6 --json -
    """
    from sspruner.budgets.resolve import check_values
    from sspruner.files.output import check_output, remove_working

    check_values(recipe)
    if output.out:
        check_output(output.out, output.overwrite)
    working = working_of(apart, output)
    output.check()

    import sspruner
    from sspruner.benchmarking.engine_limit import layer_notes
    from sspruner.compute.processes import barrier, rank
    from sspruner.compute.progress import bars
    from sspruner.io.save import check_mask, loading
    from sspruner.io.source import name_of
    from sspruner.pruning.prepare import check_recipe
    from sspruner.pruning.table import result_table

    prepare(machine.plugin, model)
    check_recipe(recipe)
    with bars() as progress, kept_if_interrupted(working):
        loaded, tokenizer = sspruner.load(model, offload=working, **machine.arguments, **apart.arguments)
        if recipe.target.runtime and rank() == 0:
            for line in layer_notes(loaded, sspruner.trace(loaded), recipe.remove.axes, recipe):
                warn(line)
        if output.out and recipe.method.mode == "mask":
            check_mask(sspruner.trace(loaded), recipe.remove.axes)
        result = sspruner.prune(
            loaded,
            recipe,
            tokenizer=tokenizer,
            device=machine.device,
            cache=not machine.no_cache,
            resume=apart.resume,
            progress=progress,
        ).named(name_of(model), command_line())
    if rank() == 0:
        if output.out:
            with kept_if_interrupted(working):
                sspruner.save(result.model, output.out, tokenizer, result=result, overwrite=output.overwrite)
        if working:
            remove_working(working)
        emit(result.report.to_json(), output.json)
        if not output.only:
            show(result_table(result.report))
            if result.scores.from_cache:
                say(f"scores of {result.report.scorer}{from_cache(result.scores)}")
            if output.out:
                load, measured = loading(result.model, output.out), not result.report.left_out
                further = next_steps(model, output.out, load.startswith("load it: AutoModel"), measured)
                say(f"saved to {output.out}\n{load}\n{further}")
            else:
                say("nothing saved; add --out DIR to keep the pruned model")
    barrier()


def next_steps(model: str | None, out: Path, stock: bool, measured: bool = True) -> str:
    """Return what to do with a pruned model: measure it, look at it, serve it; without a MODEL, prune one's own.

    stock: stock classes load it, and so do the engines that serve. measured: it predicts tokens, which both need.
    """
    from sspruner.io.source import DEFAULT

    folder, dense = quote(str(out)), quote(model or DEFAULT)
    evaluate = {"measure it": f"sspruner evaluate {folder} --against {dense} --text held-out.txt"}
    steps = (evaluate if measured else {}) | {"see it": f"sspruner report {folder}"}
    if stock and measured:
        steps["serve it"] = f"vllm serve {folder}, or sspruner export {folder} --to gguf --out served (docs/serving.md)"
    if model is None:
        steps = {
            "your model": "sspruner prune path/to/model --sparsity 0.5 --calibration text.txt --out smaller",
            **steps,
        }
    return "\n".join(["next:", *(f"  {what + ':':12}{command}" for what, command in steps.items())])


def working_of(apart: Apart, output: Output) -> Path | None:
    """Return the folder for the finished blocks of a blockwise run. Raises InputError for contradictory options."""
    from sspruner.files.output import working_folder

    blockwise = apart.offload or apart.device_map is not None
    if apart.offload and apart.device_map:
        raise InputError("--offload leaves all blocks on disk, --device-map those that fit nowhere else; give one")
    if blockwise and not output.out:
        raise InputError(
            f"--{'offload' if apart.offload else 'device-map'} writes the cut blocks on the way: add --out DIR"
        )
    if apart.resume and not blockwise:
        raise InputError("--resume goes on with an interrupted --offload or --device-map: add that, too")
    return working_folder(output.out) if blockwise and output.out else None


app = command_app(NAME, command)
