"""Run by the interpreter of .venv-vllm: vLLM on a CPU, in fp32 and eager, decodes folders greedily.

vllm_run.py REQUESTS ANSWERS, both JSON files. A request has `folder`, `prompts` (lists of token ids, decoded as one
batch), `tokens` (how many), and optionally `engine` (more arguments of vllm.LLM) and `times`. Its answer has, for each
prompt, the `tokens` and at each step the log-probabilities of the `likely` ones; or the `error` with which vLLM ended.
One engine after the other, in this process: importing vLLM takes longer.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import vllm_cpu  # noqa: F401 - first
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

LIKELIEST = 4  # log-probabilities at each step
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "seed": 0,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def decoded(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what vLLM makes of the prompts; of a request with `times`, the last time."""
    engine = LLM(request["folder"], **(ENGINE | request.get("engine", {})))
    how = SamplingParams(
        temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False, logprobs=LIKELIEST
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    for _ in range(request.get("times", 1)):
        found = engine.generate(prompts, how, use_tqdm=False)
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "likely": [{token: p.logprob for token, p in step.items()} for step in one.outputs[0].logprobs],
        }
        for one in found
    ]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"answers": decoded(request)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()
        gc.freeze()  # what is left are modules: vLLM collects garbage nine times for each engine


if __name__ == "__main__":
    requests, answers = map(Path, sys.argv[1:])
    gc.freeze()
    found = [answer(request) for request in json.loads(requests.read_text())]
    answers.write_text(json.dumps(found))
