"""`sspruner inspect`: what can be removed from a model."""

from __future__ import annotations

from sspruner.cli import options as o
from sspruner.cli.console import check_json, emit, prepare, reports_errors, show

NAME = "inspect"


@reports_errors
def command(model: o.Model = None, plugin: o.Plugin = None, json: o.Json = None) -> None:
    """Show a model's graph: layers, axes, sizes, parameters, bytes of state per sequence."""
    from json import dumps

    import sspruner

    check_json(json)
    prepare(plugin)
    loaded, _ = sspruner.load(model)
    graph = sspruner.trace(loaded)
    emit(dumps(graph.to_json(), indent=2), json)
    if str(json) != "-":
        show(graph.tree())
