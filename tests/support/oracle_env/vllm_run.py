"""Run by the interpreter of .venv-vllm: vLLM on a CPU, in fp32 and eager, decodes folders greedily.

vllm_run.py REQUESTS ANSWERS, both JSON files. A request has `folder`, `prompts` (lists of token ids, decoded as one
batch), `tokens` (how many), and optionally `engine`: more arguments of vllm.LLM. Its answer has, for each prompt, the
`tokens` and the log-probabilities of the likeliest ones at each step; or the `error` with which vLLM ended. One engine
after the other, in this process: importing vLLM takes longer than they do.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

LIKELIEST = 4  # log-probabilities at each step


def decoded(request: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM makes of one folder."""
    options = {"max_model_len": 256, "max_num_seqs": 8, "skip_tokenizer_init": True, "enable_prefix_caching": False}
    engine = LLM(
        request["folder"], dtype="float32", enforce_eager=True, seed=0, **(options | request.get("engine", {}))
    )
    how = SamplingParams(
        temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False, logprobs=LIKELIEST
    )
    answers = []
    for _ in range(request.get("times", 1)):
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        answers = [one.outputs[0] for one in engine.generate(prompts, how, use_tqdm=False)]
    return {
        "answers": [
            {
                "tokens": list(one.token_ids),
                "likely": [{str(token): p.logprob for token, p in step.items()} for step in one.logprobs],
            }
            for one in answers
        ]
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return decoded(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    requests, answers = map(Path, sys.argv[1:])
    found = [answer(request) for request in json.loads(requests.read_text())]
    answers.write_text(json.dumps(found))
