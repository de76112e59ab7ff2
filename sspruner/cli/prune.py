"""`sspruner prune`: the main job."""

from __future__ import annotations

from typing import Any

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    axes_from,
    bounds_from,
    check_json,
    command_line,
    emit,
    from_cache,
    kept_if_interrupted,
    options_from,
    prepare,
    progress_bar,
    ratios_from,
    reports_errors_of_all,
    scorers_from,
    show,
    sizes_from,
)
from sspruner.errors import InputError

NAME = "prune"


@reports_errors_of_all
def command(
    model: o.Model = None,
    scorer: o.Scorer = None,
    basis: o.Basis = None,
    axis: o.Axis = "state",
    sparsity: o.Sparsity = None,
    keep: o.Keep = None,
    allocation: o.Allocation = "uniform",
    multiple_of: o.MultipleOf = 1,
    ratio: o.Ratio = None,
    ignore: o.Ignore = None,
    pattern: o.Pattern = None,
    granularity: o.Granularity = None,
    rows: o.Rows = None,
    normalise: o.Normalise = None,
    floor: o.Floor = None,
    cap: o.Cap = None,
    state_bytes: o.StateBytes = None,
    max_batch: o.MaxBatch = None,
    memory: o.Memory = None,
    params: o.Params = None,
    max_ppl_increase: o.MaxPplIncrease = None,
    max_kl: o.MaxKl = None,
    target: o.Target = None,
    tp: o.Tp = 1,
    mode: o.Mode = "slice",
    one_shot: o.OneShot = False,
    refit: o.Refit = "none",
    calibration: o.Calibration = "self",
    samples: o.Samples = 32,
    seq_len: o.SeqLen = 256,
    option: o.ScorerOption = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    no_cache: o.NoCache = False,
    plugin: o.Plugin = None,
    offload: o.Offload = False,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    resume: o.Resume = False,
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    json: o.Json = None,
) -> None:
    """Score, plan and cut a model layer by layer; prove the cut; show what it cost; save the result."""
    import sspruner
    from sspruner.budgets.asked import make_budget
    from sspruner.compute.processes import barrier, rank
    from sspruner.files.output import check_output, remove_working, working_folder
    from sspruner.formats.targets import chosen
    from sspruner.io.source import name_of
    from sspruner.pruning.table import result_table
    from sspruner.recipes.parts import Limits
    from sspruner.scoring.choice import scorers_asked
    from sspruner.scoring.known import find_scorer

    apart = offload or device_map is not None
    working = working_folder(out) if apart and out else None
    axes, named = axes_from(axis), scorers_from(scorer) if scorer else None
    budget: dict[str, Any] = {
        "axis": axes,
        "sparsity": sparsity,
        "keep": keep,
        "allocation": allocation,
        "multiple_of": multiple_of,
        "ratios": ratios_from(ratio),
        "ignore": ignore or [],
        "pattern": pattern,
        "granularity": granularity,
        "rows": rows or [],
        "normalise": normalise,
        "floor": bounds_from(floor, "--floor"),
        "cap": bounds_from(cap, "--cap"),
        "limits": Limits(
            state_bytes=state_bytes,
            max_batch=max_batch,
            memory=memory,
            params=params,
            max_ppl_increase=max_ppl_increase,
            max_kl=max_kl,
        ),
    }
    chosen(target, tp)
    make_budget(**budget)  # what makes no sense fails before the model is read
    if out:
        check_output(out, overwrite)
    if offload and device_map:
        raise InputError("--offload leaves all blocks on disk, --device-map those that fit nowhere else; give one")
    if apart and not out:
        raise InputError(f"--{'offload' if offload else 'device-map'} writes the cut blocks on the way: add --out DIR")
    if resume and not apart:
        raise InputError("--resume goes on with an interrupted --offload or --device-map: add that, too")
    check_json(json)
    scorer_options = options_from(option)
    prepare(plugin)
    for one in scorers_asked(named, basis, list(axes) if isinstance(axes, dict) else [axes]):
        for name in one.values() if isinstance(one, dict) else [str(one)]:
            find_scorer(name)
    with progress_bar() as progress, kept_if_interrupted(working):
        loaded, tokenizer = sspruner.load(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            offload=working,
            device_map=device_map,
            max_memory=sizes_from(max_memory),
            trust_remote_code=trust_remote_code,
        )
        result = sspruner.prune(
            loaded,
            named,
            basis=basis,
            **budget,
            target=target,
            tp=tp,
            mode=mode,
            one_shot=one_shot,
            refit=refit,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            options=scorer_options,
            device=device,
            seed=seed,
            cache=not no_cache,
            resume=resume,
            progress=progress,
        ).named(name_of(model), command_line())
    if rank() == 0:
        if out:
            with kept_if_interrupted(working):
                sspruner.save(result.model, out, tokenizer, result=result, overwrite=overwrite)
        if working:
            remove_working(working)
        emit(result.report.to_json(), json)
        if str(json) != "-":
            show(result_table(result.report))
            if result.scores.from_cache:
                typer.echo(f"scores of {result.report.scorer}{from_cache(result.scores)}")
            typer.echo(f"saved to {out}" if out else "nothing saved; add --out DIR to keep the pruned model")
    barrier()
