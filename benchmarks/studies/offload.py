"""What pruning a model of 2.7 billion parameters takes when its blocks stay on disk: memory and seconds.

    python benchmarks/offload.py --folder /tmp/offload --table docs/benchmarks.md

Random weights in the shape of Mamba2-2.7B, bf16, made here layer by layer (5.4 GB, kept in the folder for the next
time); random tokens for calibration. Memory and time do not need trained weights. Each run is a process of its own that
reports the peak of its resident memory, as `report.json` does; half of every state goes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import insert, progress, provenance, table
from safetensors.torch import save_file

SHAPE = {
    "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 128, "num_heads": 80, "head_dim": 64, "n_groups": 1,
    "vocab_size": 50288, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SAMPLES, HELD_OUT, SEQ_LEN = 2, 1, 32


def make(folder: Path, layers: int) -> None:
    """The checkpoint: one shard for each layer, so that never more than one is in memory."""
    from transformers import AutoModelForCausalLM, Mamba2Config

    config = Mamba2Config(**(SHAPE | {"num_hidden_layers": layers}))
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, (shard, names) in enumerate(shards.items(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        progress(f"making {file}, layer {shard}")
        tensors = {n: _values(n, model.get_parameter(n).shape, generator).bfloat16() for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(folder)  # last: a folder without it is not complete


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values of the size that a trained model's have."""
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if leaf == "dt_bias":
        return torch.rand(shape, generator=generator) * 4 - 6  # softplus: 0.0025 to 0.13
    if leaf == "D" or "norm" in name:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * (0.3 if "conv1d" in name else 0.02)


def run(model: Path, work: Path, scorer: str, layers: int) -> dict[str, Any]:
    """One prune in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(model.parent), "--one", scorer, "--layers", str(layers)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(work, ignore_errors=True)
    return dict(json.loads(out.splitlines()[-1]))


def one(model: Path, work: Path, scorer: str) -> dict[str, Any]:
    """Prune, save, and say what that took."""
    import time

    import sspruner
    from sspruner.files.provenance import peak_memory_bytes

    start, imported = time.perf_counter(), peak_memory_bytes()
    tokens = torch.randint(
        SHAPE["vocab_size"], (SAMPLES + HELD_OUT, SEQ_LEN), generator=torch.Generator().manual_seed(1)
    )
    loaded, _ = sspruner.load(model, offload=work / "working")
    data = sspruner.calibration(tokens, loaded, samples=SAMPLES, held_out=HELD_OUT)
    result = sspruner.prune(loaded, scorer, sparsity=0.5, calibration=data)
    sspruner.save(result.model, work / "out", result=result)
    report = result.report
    return {
        "scorer": scorer, "seconds": report.seconds | {"all": time.perf_counter() - start},
        "peak": peak_memory_bytes(), "imported": imported, "weights": report.dense["weight_bytes"],
        "state": [report.dense["state_bytes"], report.pruned["state_bytes"]],
        "perplexity": [report.dense["perplexity"], report.pruned["perplexity"]],
        "error": report.proof.error if report.proof else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or goes; 17 GB are needed")
    parser.add_argument("--layers", type=int, default=64, help="fewer, to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="a page with the marks <!-- offload: begin --> and end")
    given = parser.parse_args()
    model, work = given.folder / f"shape-{given.layers}", given.folder / "work"
    if given.one:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        print(json.dumps(one(model, work, given.one)))
        return
    if not (model / "config.json").is_file():
        model.mkdir(parents=True, exist_ok=True)
        make(model, given.layers)
    rows = []
    for scorer in ("magnitude", "ghost"):
        progress(f"pruning by {scorer}")
        found = run(model, work, scorer, given.layers)
        seconds = found["seconds"]
        rows.append([
            scorer, f"{found['weights'] / 1e9:.2f} GB", f"{found['peak'] / 1e9:.2f} GB",
            f"{found['imported'] / 1e9:.2f} GB", f"{seconds['scoring']:.0f} s",
            f"{seconds['evaluation and proof']:.0f} s", f"{seconds['all']:.0f} s",
            " to ".join(f"{b / 1e6:.1f} MB" for b in found["state"]),
        ])  # fmt: skip
    head = ["scorer", "weights", "peak memory", "of it after imports", "scoring", "measuring, cutting, proof",
            "with loading and saving", "state per sequence"]  # fmt: skip
    note = f"{SAMPLES} x {SEQ_LEN} calibration tokens, {HELD_OUT} x {SEQ_LEN} held out, random; seeds 0 and 1"
    text = f"{table('A model that stays on disk', head, rows)}\n\n{provenance(note)}\n"
    print(text)
    if given.table:
        insert(given.table, "offload", text)


if __name__ == "__main__":
    main()
