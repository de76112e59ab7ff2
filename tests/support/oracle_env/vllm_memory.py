"""Run by the interpreter of .venv-vllm: what vLLM on a CPU, in fp32, reports of its caches when it starts.

vllm_memory.py REQUESTS ANSWERS, both JSON files. A request has `folder` and more arguments of vllm.LLM. Its answer has
what vLLM logs as "KV cache size" (`tokens`) and "Maximum concurrency" (`concurrency`), and the sizes behind them.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import vllm_cpu  # noqa: F401 - first
from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def started(request: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of the caches of one engine."""
    engine = LLM(
        request.pop("folder"), dtype="float32", max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=True, **request
    )
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "tokens": cache.kv_cache_size_tokens,
        "concurrency": cache.kv_cache_max_concurrency,
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "prefix_caching": cache.enable_prefix_caching,
    }


def main() -> None:
    requests, answers = map(Path, sys.argv[1:])
    found = []
    for request in json.loads(requests.read_text()):
        found.append(started(request))
        gc.collect()
        cleanup_dist_env_and_memory()
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
