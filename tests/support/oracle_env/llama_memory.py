"""Run by the interpreter of .venv-llama: what llama.cpp allocates for one sequence of 512 tokens, as it logs it.

llama_memory.py FILES: printed is JSON, for each GGUF file MiB with two digits, {R, S, K, V}.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "sspruner" / "runtime" / "engines"))

import llama_api

SIZES = re.compile(r"(?:llama_memory_recurrent|llama_kv_cache): size = .*")
PART = re.compile(r"\b([RSKV]) \(f\d+\): +([\d.]+) MiB")

if __name__ == "__main__":
    found = []
    for file in sys.argv[1:]:
        llama_api.LOG.clear()
        model = llama_api.load(file, vocab_only=False)
        llama_api.free(llama_api.context(model, n_ctx=512, n_seq_max=1, n_threads=1, n_threads_batch=1))
        found.append(dict(PART.findall(" ".join(SIZES.findall("".join(llama_api.LOG))))))
    print(json.dumps(found))
