"""`sspruner doctor`: is this installation sound?"""

from __future__ import annotations

import typer

from sspruner.cli import options as o
from sspruner.cli.console import check_json, emit, prepare, reports_errors

NAME = "doctor"


@reports_errors
def command(plugin: o.Plugin = None, json: o.Json = None) -> None:
    """Check the installation: versions, known hazards, and every family's code on a tiny random model."""
    from dataclasses import asdict

    from sspruner.doctor import diagnose
    from sspruner.files.strict_json import dumps

    check_json(json)
    prepare(plugin)
    checks = []
    for check in diagnose():
        checks.append(check)
        if str(json) != "-":
            typer.echo(f"{'PASS' if check.ok else 'FAIL'}  {check.name}: {check.says}")
    ok = all(check.ok for check in checks)
    emit(dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2, ensure_ascii=False), json)
    if not ok:
        raise typer.Exit(1)
