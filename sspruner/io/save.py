"""Save a model as a Hugging Face folder that `sspruner.load`, and stock classes where they can, read back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sspruner.io.output import atomic_folder


def save(
    model: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    result: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` and `tokenizer` to the folder `out`, and return its path.

    With `result` (what `sspruner.prune` returned) also plan.json, report.json and sspruner/scores.safetensors. The
    folder appears whole or not at all. Raises InputError if it exists and is not empty, unless `overwrite` is given and
    it holds an earlier model.
    """
    with atomic_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if result is not None:
            result.plan.save(folder / "plan.json")
            # In a folder of its own: some runtimes read every *.safetensors that lies beside config.json.
            (folder / "sspruner").mkdir()
            result.scores.save(folder / "sspruner" / "scores.safetensors")
            result.report.save(folder / "report.json")
    return Path(out)
