"""Folders of results for report tests, with hostile text in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sspruner.scoring.scores import Scores

HOSTILE = '</td><script>alert("x")</script><img src=http://x.example/a.png> & $x^{2$ _é日\u202e'


def write(folder: Path, content: dict[str, Any]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        data.save(path) if isinstance(data, Scores) else path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def evaluated(metric: str, value: Any, **more: Any) -> dict[str, Any]:
    """Return a row of evaluation.json."""
    row = {"metric": metric, "value": value, "against": None, "ratio": None, "difference": None, "items": 7}
    return row | more


EVALUATION = {
    "version": 1, "model": "a", "against": "b", "protocol": {},
    "rows": [
        evaluated("perplexity", [12.5, 12, 13], against=[10, 9, 11], ratio=[1.25, 1.2, 1.3]),
        evaluated("accuracy", [0.5, 0.25, 0.75], against=[0.75, 0.5, 1], difference=[-0.25, -0.5, 0], items=9),
        evaluated("alone", 3, items=12_000),
    ],
    "perplexity_by_position": {},
    "perplexity_by_length": {"128": evaluated("perplexity", [20, 19, 21]),
        "256": evaluated("perplexity", [18, 17, 19], against=16), "8k": evaluated("perplexity", [None, None, None])},
    "notes": [], "versions": {}, "command": "",
}  # fmt: skip


def bench_row(**changes: Any) -> dict[str, Any]:
    row = {"model": "m", "batch": 1, "phase": "decode", "tokens_per_second": [5, 4, 6], "ms": [1, 1, 1]}
    row |= {"ceiling_tokens_per_second": 8.0, "peak_bytes": None, "state_bytes": 10, "weight_bytes": 20}
    return row | {"bytes_moved": 6, "operations": 7, "path": "here"} | changes


BENCH = {
    "version": 1, "machine": {}, "versions": {}, "command": "b", "seed": 0, "prompt": 4, "generate": 2, "repeats": 3,
    "rows": [bench_row(), bench_row(batch=2)], "failed": [], "profile": {},
}  # fmt: skip
