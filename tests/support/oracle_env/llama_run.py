"""Run by the interpreter of .venv-llama: llama.cpp reads GGUF files, and computes.

llama_run.py JOBS OUT: JOBS is JSON, a list of {file, prompts, new, texts}. OUT.npz gets the logits `<job>.<prompt>`;
printed is JSON, for each job the greedy tokens after its prompts, the tokens of its texts, and an error or "".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Model

if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    logits: dict[str, np.ndarray] = {}
    found: list[dict[str, Any]] = []
    for i, job in enumerate(jobs):
        try:
            model = Model(job["file"], vocab_only=not job["prompts"])
        except RuntimeError as error:
            found.append({"error": str(error)})
            continue
        made: list[list[int]] = []
        if job["prompts"]:
            rows, made = model.run(job["prompts"], job.get("new", 0))
            logits |= {f"{i}.{k}": row for k, row in enumerate(rows)}
        found.append({"made": made, "texts": [model.tokenize(text) for text in job.get("texts", [])], "error": ""})
        model.close()
    np.savez(out, **logits)
    print(json.dumps(found))
