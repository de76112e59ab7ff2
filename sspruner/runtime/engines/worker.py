"""Time decode steps in an engine: `worker.py MODULE` loads several models at once, and answers lines of JSON.

Run by the interpreter of the engine's own environment. MODULE is a file beside this one with a class `Engine`. Lines on
standard input are answered by one on standard output each. The first says which models to load:

    {"models": [{"path": ..., "dtype": "float32", "cache_bytes": ...}], "batch": 32, "length": 24, "threads": 1,
     "eager": true}
    {"version": "0.32.0", "device": "cpu", "state_dtypes": ["float32"]}

batch and length: the largest batch, and the tokens of a sequence. state_dtypes: of the recurrent state in the engine's
cache, by model; null for the engine's default. Every other line is a measurement, of a model by its
index, after prompts of random tokens:

    {"model": 0, "batch": 8, "prompt": 16, "generate": 8, "seed": 0, "vocabulary": 4096}
    {"seconds": 0.0123}

Either answer may be {"error": "one line"}. After one to the first line the process ends, as it does with its input.
What an engine prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Answer the lines of standard input until it ends. load: makes the engine from the first line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        engine = load(json.loads(sys.stdin.readline()))
    except Exception as error:
        answer(error=one_line(error))
        return
    answer(version=engine.version, device=engine.device, state_dtypes=engine.state_dtypes)
    for line in sys.stdin:
        job = json.loads(line)
        drawn = random.Random(job["seed"])
        prompts = [[drawn.randrange(job["vocabulary"]) for _ in range(job["prompt"])] for _ in range(job["batch"])]
        try:
            answer(seconds=engine.step_seconds(job["model"], prompts, job["generate"]))
        except Exception as error:
            answer(error=one_line(error))


def one_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


if __name__ == "__main__":
    serve(import_module(sys.argv[1]).Engine)
