"""`sspruner doctor`: check the installation."""

from __future__ import annotations

from sspruner.cli.console import emit, prepare, reports_errors, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import Json, Plugins

NAME = "doctor"


@reports_errors
def command(*, plugins: Plugins = Plugins(), output: Json = Json()) -> None:
    """Run `sspruner doctor`.

    Examples:
        sspruner doctor
        sspruner doctor --json doctor.json
    """
    from dataclasses import asdict

    from sspruner.doctor import diagnose
    from sspruner.files.strict_json import dumps

    output.check()
    prepare(plugins.plugin)
    checks = []
    for check in diagnose():
        checks.append(check)
        if not output.only:
            say(f"{'SKIP' if check.skipped else 'PASS' if check.ok else 'FAIL'}  {check.name}: {check.says}")
    ok = all(check.ok for check in checks)
    emit(dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2, ensure_ascii=False), output.json)
    if not ok:
        raise SystemExit(1)


app = command_app(NAME, command)
