"""Run a function of a test module in several processes, started like torchrun's, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import TESTS

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from sspruner.compute.processes import processes
torch.set_num_threads(1)
import {module} as module
with processes():
    module.{function}({folder!r})
"""


def torchrun(count: int, function: str, module: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `module.function(folder)` in `count` processes. Return the outcome; asserts nothing."""
    script = folder / f"{function}.py"
    text = SCRIPT.format(tests=str(TESTS), module=module, function=function, folder=str(folder))
    script.write_text(text, encoding="utf-8")
    return command(count, [str(script)], *options)


def command(count: int, arguments: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Return the torchrun command for a script and its arguments, or for -m and a module's."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def done(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Run as `torchrun` does, and check that it succeeded."""
    assert result.returncode == 0, result.stderr[-3000:]
    return result
