"""llama.cpp on the processor, with its default options: a context for each measurement. Loaded by worker.py."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import llama_api

CELLS = 256  # llama.cpp gives every sequence a multiple of it


class Engine:
    """GGUF files in llama.cpp."""

    device = "cpu"

    def __init__(self, request: dict[str, Any]) -> None:
        """Load all models."""
        self.version, self.threads = version("xllamacpp"), request["threads"]
        self.models = [llama_api.load(one["path"]) for one in request["models"]]
        self.state_dtypes = ["float32"] * len(self.models)

    def step_seconds(self, model: int, prompts: list[list[int]], generate: int) -> float:
        """Return the mean seconds of a step in which every sequence decodes one token.

        The tokens are those of the prompt again: llama.cpp leaves the choice of the next token to its callers.
        """
        batch, prompt = len(prompts), len(prompts[0])
        length = prompt + 1 + generate
        context = llama_api.context(
            self.models[model],
            n_ctx=batch * CELLS * -(-length // CELLS),
            n_batch=max(2048, batch, prompt),
            n_ubatch=max(512, batch),
            n_seq_max=batch,
            n_threads=self.threads,
            n_threads_batch=self.threads,
        )
        try:
            for s, ids in enumerate(prompts):
                llama_api.decode(context, [(token, t, s, t == prompt - 1) for t, token in enumerate(ids)])
            for t in range(prompt, length):
                if t == prompt + 1:  # the first step allocates
                    start = time.perf_counter()
                llama_api.decode(context, [(ids[t % prompt], t, s, True) for s, ids in enumerate(prompts)])
            return (time.perf_counter() - start) / generate
        finally:
            llama_api.free(context)
