"""Run by the interpreter of .venv-llama: llama.cpp's server on the loopback address answers OpenAI's completions.

llama_server.py FILE NEW PROMPT...: prints JSON, for each prompt, all sent at once, the body of the answer.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp


def ask(address: str, prompt: str, new: int) -> dict[str, Any]:
    """Return the answer to one request."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "logprobs": 1, "return_tokens": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


if __name__ == "__main__":
    file, new, *prompts = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_parallel, parameters.n_ctx, parameters.warmup = len(prompts), 1024 * len(prompts), False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(server.listening_address, prompt, int(new)), prompts))
    print(json.dumps(answers), flush=True)
