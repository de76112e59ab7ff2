"""Programs that run where sspruner cannot be imported: each in a fork of one process that has imported transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback
sys.modules["sspruner"] = sys.modules["sspruner_plugins"] = None  # importing them fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            sys.argv = ["-c", *job["arguments"]]
            exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    home = tempfile.mkdtemp(prefix="stock-")
    environment = os.environ | {"HF_HOME": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
    command = [sys.executable, "-c", SERVER]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=home, env=environment)


def run_stock(program: str, *arguments: str, log: Path) -> Any:
    """Run a program that prints JSON as its last line; return it. Fails with the log if the program does."""
    server = _server()
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps({"program": program, "arguments": arguments, "log": str(log)}) + "\n")
    server.stdin.flush()
    code, printed = server.stdout.readline().strip(), log.read_text(encoding="utf-8")
    assert code == "0", printed
    return json.loads(printed.splitlines()[-1])
