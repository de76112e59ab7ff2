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
from sspruner.recipes.flags import text, whole
from sspruner.recipes.parts import Target

NAME = "inspect"


@Parameter(name="*", group=Group("What to show", sort_key=1))
@dataclass(frozen=True)
class View:
    """What to show beside the graph."""

    plan: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """File from `sspruner plan`: also show the model after that plan."""

    memory: Annotated[str | None, text("BYTES")] = None
    """Show how many sequences fit in this memory beside the weights, e.g. 24GB."""

    context: Annotated[int, whole()] = 4096
    """Tokens per sequence, for the KV cache of hybrids."""

    batch: Annotated[str, text("N,N")] = "1,16,64,256"
    """Batch sizes whose decode steps are shown."""

    bandwidth: Annotated[str | None, text("BYTES/S")] = None
    """Show the maximum tokens per second with this memory bandwidth, e.g. 3.35TB/s."""

    plot: bool = False
    """Draw each layer's size, and its scores if the folder has them."""

    @property
    def machine(self) -> tuple[tuple[int, ...], float | None, float | None]:
        """Return batches, bytes of memory, and bytes per second. Raises InputError for malformed texts."""
        from sspruner.units import parse_bandwidth, parse_bytes

        if self.context < 0:
            raise InputError(f"--context {self.context}: must be at least 0")
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
    trust: Trust = Trust(),
    output: Json = Json(),
) -> None:
    """Run `sspruner inspect`.

    Examples:
        sspruner inspect path/to/model
        sspruner inspect path/to/model --plan plan.json --memory 24GB --target vllm
    """
    from sspruner.formats.targets import chosen

    output.check()
    runtime, machine = chosen(target.runtime, target.tp), view.machine

    import sspruner
    from sspruner.benchmarking.footprint import footprint
    from sspruner.files.strict_json import dumps
    from sspruner.formats.fitting import after, offers
    from sspruner.io.skeleton import skeleton
    from sspruner.plans.plan import check_plan
    from sspruner.reporting.terminal import plots
    from sspruner.surgery.apply import apply_sizes

    plan = None if view.plan is None else sspruner.Plan.load(view.plan)
    prepare(trust.plugin)
    loaded = skeleton(model, trust_remote_code=trust.trust_remote_code)
    graph = sspruner.trace(loaded)
    dense = footprint(loaded, graph, view.context)
    if plan is not None:
        check_plan(plan, graph, model=loaded)
    supported = offers(loaded if plan is None else after(loaded, plan, graph), runtime)
    cut = None if plan is None else footprint(loaded, apply_sizes(loaded, plan), view.context)
    data = graph.to_json() | {"footprint": dense.to_json(*machine)}
    if cut is not None:
        data["with_plan"] = cut.to_json(*machine)
    data["targets"] = {offer.target.name: offer.to_json() for offer in supported}
    pictures = plots(loaded, model, plan) if view.plot else []
    emit(dumps(data, indent=2), output.json)
    if not output.only:
        show(graph.tree())
        show_tables(dense, cut, supported, machine, assumed=loaded.config.dtype is None)
        for picture in pictures:
            show(picture)


def show_tables(dense: Any, cut: Any, supported: Any, machine: Any, assumed: bool) -> None:
    """Show the memory of a model, before and after a cut, and which targets support it."""
    from sspruner.reporting.footprint import footprint_table
    from sspruner.reporting.targets import targets_table

    batches, room, rate = machine
    show(footprint_table(dense, cut, batches=batches, memory=room, bandwidth=rate, assumed=assumed))
    show(targets_table(supported, with_plan=cut is not None))


app = command_app(NAME, command)
