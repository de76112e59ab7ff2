"""vLLM: an engine for each model, all of them in this process. Loaded by worker.py."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """Models in vLLM, without prefix caching and tokenizers."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Load all models; their caches hold the largest batch."""
        os.environ |= SETTINGS | {"OMP_NUM_THREADS": str(request["threads"])}
        from vllm import LLM, SamplingParams, __version__
        from vllm.platforms import current_platform

        self.version, self.device = __version__, current_platform.device_type
        batch, length = request["batch"], request["length"]
        self.how = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        options = {
            "enforce_eager": request["eager"],
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_num_seqs": batch,
            "max_model_len": 2 * length,
            "max_num_batched_tokens": max(2048, batch * length),
            "seed": 0,
        }
        self.engines = [
            LLM(one["path"], dtype=one["dtype"], kv_cache_memory_bytes=one["cache_bytes"], **options).llm_engine
            for one in request["models"]
        ]
        kept = [engine.vllm_config.cache_config.mamba_ssm_cache_dtype for engine in self.engines]
        self.state_dtypes = [None if dtype == "auto" else dtype for dtype in kept]  # some CPUs: float32, always
        self.names = map(str, itertools.count())

    def step_seconds(self, model: int, prompts: list[list[int]], generate: int) -> float:
        """Return the mean seconds of a step in which every sequence decodes one token."""
        engine, names = self.engines[model], list(itertools.islice(self.names, len(prompts)))
        for name, ids in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, self.how)
        try:
            begun: set[str] = set()
            for _ in range(len(prompts) + 2):
                begun |= {one.request_id for one in engine.step()}
                if len(begun) == len(prompts):
                    break
            start = time.perf_counter()
            decoded = [len(engine.step()) for _ in range(generate)]
            seconds = time.perf_counter() - start
        finally:
            engine.abort_request(names)
            while engine.has_unfinished_requests():
                engine.step()
        if set(decoded) != {len(prompts)}:
            raise RuntimeError(f"a step decoded {min(decoded)} of {len(prompts)} sequences: the cache holds no more")
        return seconds / generate
