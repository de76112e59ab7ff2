"""`sspruner inspect`: a model's prunable axes and its memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sspruner.cli.console import batches_from, emit, prepare, reports_errors, show
from sspruner.cli.help import command_app
from sspruner.cli.machine import Json, Model, Trust
from sspruner.errors import InputError
from sspruner.recipes.flags import text
from sspruner.recipes.parts import Target
from sspruner.recipes.serving import ENGINES, EngineOptions, engine_of

NAME = "inspect"


@Parameter(name="*", group=Group("What to show", sort_key=1))
@dataclass(frozen=True)
class View:
    """What to show beside the graph."""

    plan: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """File from `sspruner plan`: also show the model after that plan."""

    memory: Annotated[str | None, text("BYTES")] = None
    """Show how many sequences fit in this memory beside the weights, e.g. 24GB."""

    pool: Annotated[str | None, text("BYTES")] = None
    """Show how many sequences the caches of --target (vllm, sglang or llama.cpp) hold in this memory, e.g. 40GiB."""

    context: Annotated[str, text("TOKENS")] = "4096"
    """Tokens per sequence, for the KV cache of hybrids; several for --pool, of which the other tables take the first:
    4k,32k."""

    batch: Annotated[str, text("N,N")] = "1,16,64,256"
    """Batch sizes whose decode steps are shown; what is said at the end is about the largest."""

    bandwidth: Annotated[str | None, text("BYTES/S")] = None
    """Show the maximum tokens per second with this memory bandwidth, e.g. 3.35TB/s."""

    plot: bool = False
    """Draw each layer's size, and its scores if the folder has them."""

    @property
    def contexts(self) -> tuple[int, ...]:
        """Return the tokens per sequence. Raises InputError for malformed texts; 0 is for no KV cache at all."""
        from sspruner.units import parse_tokens

        if self.context == "0" and self.pool is None:
            return (0,)
        return tuple(dict.fromkeys(parse_tokens(part, "--context") for part in self.context.split(",")))

    @property
    def machine(self) -> tuple[tuple[int, ...], float | None, float | None]:
        """Return batches, bytes of memory, and bytes per second. Raises InputError for malformed texts."""
        from sspruner.units import parse_bandwidth, parse_bytes

        room = None if self.memory is None else parse_bytes(self.memory, "--memory")
        rate = None if self.bandwidth is None else parse_bandwidth(self.bandwidth, "--bandwidth")
        return batches_from(self.batch), room, rate


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    view: View = View(),
    target: Target = Target(),
    options: EngineOptions = EngineOptions(),
    trust: Trust = Trust(),
    output: Json = Json(),
) -> None:
    """Run `sspruner inspect`.

    Examples:
        sspruner inspect path/to/model --plan plan.json --memory 24GB --target vllm
        sspruner inspect path/to/model --target vllm --pool 40GiB --context 4k,32k
    """
    from sspruner.formats.targets import chosen, names

    output.check()
    contexts, machine, pool = view.contexts, view.machine, pool_of(view, target, options)
    counted = engine_of(target.runtime)
    memory_alone = pool is not None and counted not in names()
    runtime = None if memory_alone else chosen(target.runtime, target.tp)

    import sspruner
    from sspruner.benchmarking.cache_layers import cache_layers
    from sspruner.benchmarking.engine_memory import engine_memory
    from sspruner.benchmarking.footprint import footprint
    from sspruner.benchmarking.gains import gains
    from sspruner.compute.forward import check_predicts_tokens
    from sspruner.files.strict_json import dumps
    from sspruner.io.skeleton import skeleton
    from sspruner.plans.plan import check_plan
    from sspruner.reporting.terminal import plots
    from sspruner.reporting.when_it_pays import when_it_pays
    from sspruner.surgery.apply import apply_sizes

    plan = None if view.plan is None else sspruner.Plan.load(view.plan)
    prepare(trust.plugin, model)
    loaded = skeleton(model, trust_remote_code=trust.trust_remote_code)
    graph = sspruner.trace(loaded)
    if plan is not None:
        check_plan(plan, graph, model=loaded)
    if target.runtime:
        check_predicts_tokens(loaded, f"--target {target.runtime}")
    engine = None
    if pool is not None:
        layers = cache_layers(loaded, graph), None if plan is None else cache_layers(loaded, graph, plan)
        engine = engine_memory(counted, layers, options, tp=target.tp, pool=pool, contexts=contexts)
    kept_in = engine.dense.state_dtype if engine else options.state_dtype or "float32"
    dense = footprint(loaded, graph, contexts[0]).stored(kept_in)
    supported = [] if memory_alone else offered(loaded, graph, plan, runtime)
    cut = None if plan is None else footprint(loaded, apply_sizes(loaded, plan), contexts[0]).stored(kept_in)
    gained = gains(loaded, graph, dense, cut, batch=max(machine[0]), memory=machine[1])
    data = graph.to_json() | {"footprint": dense.to_json(*machine)}
    data |= {"with_plan": cut.to_json(*machine)} if cut is not None else {}
    data |= {"engine": engine.to_json()} if engine is not None else {}
    data["when_it_pays"] = gained.to_json() | {"text": when_it_pays(gained)}
    data["targets"] = {offer.target.name: offer.to_json() for offer in supported}
    pictures = plots(loaded, model, plan) if view.plot else []
    emit(dumps(data, indent=2), output.json)
    if not output.only:
        show(graph.tree())
        show_tables(dense, cut, supported, machine, assumed=loaded.config.dtype is None)
        if engine is not None:
            from sspruner.reporting.engine_memory import engine_table

            show(engine_table(engine))
        for shown in (*pictures, "", when_it_pays(gained)):
            show(shown)


def offered(model: Any, graph: Any, plan: Any, runtime: Any) -> list[Any]:
    """Return what export offers for a model, or for its cut; nothing for a model that no engine serves."""
    from sspruner.compute.forward import predicts_tokens
    from sspruner.formats.fitting import after, offers

    if not predicts_tokens(model):
        return []
    return offers(model if plan is None else after(model, plan, graph), runtime)


def pool_of(view: View, target: Target, options: EngineOptions) -> float | None:
    """Return the bytes of --pool, None without it. Raises InputError for a pool without an engine, or the reverse."""
    from sspruner.formats.targets import names
    from sspruner.units import parse_bytes

    if view.pool is not None:
        if not engine_of(target.runtime):
            raise InputError(f"--pool: is the memory of an engine's caches: add --target {' or '.join(ENGINES)}")
        if target.tp < 1:
            raise InputError(f"tp {target.tp}: must be at least 1")
        return parse_bytes(view.pool, "--pool")
    given = [name for name in options.given if name != "state-dtype"]  # it decides the bytes of a step, too
    if given:
        raise InputError(f"--{given[0]}: decides the memory of an engine's caches: add --pool, e.g. 40GiB")
    if target.runtime in ENGINES and target.runtime not in names():
        raise InputError(f"target {target.runtime}: only the memory of its caches is known: add --pool, e.g. 40GiB")
    return None


def show_tables(dense: Any, cut: Any, supported: Any, machine: Any, assumed: bool) -> None:
    """Show the memory of a model, before and after a cut, and which targets support it."""
    from sspruner.reporting.footprint import footprint_table
    from sspruner.reporting.targets import targets_table

    batches, room, rate = machine
    show(footprint_table(dense, cut, batches=batches, memory=room, bandwidth=rate, assumed=assumed))
    if supported:
        show(targets_table(supported, with_plan=cut is not None))


app = command_app(NAME, command)
