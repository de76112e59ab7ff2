"""Environments of engines, which `make oracle-env` builds, and how their interpreters are run. Each is optional."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

SCRIPTS = TESTS / "support" / "oracle_env"


def python_of(name: str) -> Path:
    """Return the interpreter of an environment: `oracle`, `llama`, `vllm` or `quant`."""
    return ROOT / f".venv-{name}" / "bin" / "python"


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips tests where an environment was not built."""
    built = (python_of(name).parents[1] / "installed").is_file()
    return pytest.mark.skipif(not built, reason=f"no .venv-{name}: make oracle-env builds it")


def run(name: str, script: str, *arguments: str, timeout: int = 900) -> str:
    """Run a script of tests/support/oracle_env in an environment, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python_of(name)), str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
