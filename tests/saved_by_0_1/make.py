"""Write the files of this folder: what sspruner 0.1.0 saved before its packages were moved, and what it read from them.

It ran once, with the code of commit 6bbf324; OUT is what lies in `files`:

    PYTHONPATH=<a checkout of 6bbf324> python make.py OUT

`tests/laws/test_saved_by_0_1.py` reads them with the code of today. Names in here are those of that version.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.planning.plan import Plan
from sspruner.planning.reduction import Selection
from sspruner.testing.models import zoo
from sspruner.train.distil import distil
from sspruner.train.gradual import gradual
from sspruner.train.loop import Settings
from sspruner.train.text import Text

SMALL = {"layers": "MM", "groups": 1, "heads": 2, "channels": 4, "state": 8}
IDS = torch.randint(31, (2, 19), generator=torch.Generator().manual_seed(7))
TEXT = torch.randint(31, (24, 24), generator=torch.Generator().manual_seed(8))
WORDS = ("the quick brown fox jumps over the lazy dog " * 40).strip()


class Letters:
    """A tokenizer of letters, enough for training text."""

    eos_token_id = None

    def __call__(self, text: Any, add_special_tokens: bool = False) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        ids = [[1 + ord(c) % 29 for c in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def dense(family: str = "mamba2", **changes: Any) -> Any:
    return zoo(family, **(SMALL if family == "mamba2" else {}) | changes)


def half(model: Any, axis: str, first_layer_only: bool = False) -> Plan:
    groups = sspruner.trace(model).on_axis(axis)
    names = list(groups)[:1] if first_layer_only else list(groups)
    return Plan({n: Selection(groups[n].units, (tuple(range(0, groups[n].units, 2)),) * groups[n].groups)
                 for n in names})  # fmt: skip


def pruned(scorer: str, model: Any = None, **how: Any) -> Any:
    return sspruner.prune(model or dense(), scorer, calibration=TEXT, seed=3, **how).named("tiny", f"prune {scorer}")


def checkpoints(out: Path) -> None:
    for name, result in {
        "selection": pruned("ghost", sparsity=0.5),
        "balanced": pruned("balanced", sparsity=0.5),
        "elements": pruned("magnitude", axis="weight", sparsity=0.5),
        "refit-biases": pruned("flap", dense(bias=False), axis="head_dim", sparsity=0.5, refit="bias"),
        "refit-output": pruned("ghost", sparsity=0.5, refit="output"),
        "several-axes": pruned("magnitude", dense("zamba2"), axis={"state": 0.5, "attn_head": 0.5, "mlp": 0.4}),
        "masked": pruned("ghost", sparsity=0.5, mode="mask"),
        "masked-balanced": pruned("balanced", sparsity=0.5, mode="mask"),
    }.items():
        sspruner.save(result.model, out / name, result=result)
    uneven = dense("mamba")
    sspruner.apply(uneven, half(uneven, "channel", first_layer_only=True))
    sspruner.save(uneven, out / "uneven")
    twice = dense("bamba")
    for axis in ("state", "head_dim"):
        sspruner.apply(twice, half(twice, axis))
    sspruner.save(twice, out / "cut-twice")
    even, other = pruned("ghost", sparsity=0.5).model, dense(tie_word_embeddings=True)
    sspruner.apply(other, half(other, "state", first_layer_only=True))
    sspruner.export(even, out / "export-hf", to="hf")
    sspruner.export(other, out / "export-hf-padded", to="hf-padded")
    sspruner.export(other, out / "export-hf-remote", to="hf-remote")
    native = zoo("mamba2", **SMALL | {"bias": False})
    sspruner.apply(native, half(native, "state"))
    sspruner.export(native, out / "export-mamba-ssm", to="mamba-ssm")


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(folder: Path) -> Any:
    if folder.name in ("export-hf-remote", "export-hf-padded"):
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return sspruner.load(folder)[0].eval()


def training(out: Path) -> None:
    (out / "text.txt").write_text(WORDS, encoding="utf-8")
    source = Text(("text.txt",), Letters(), seq_len=16, held_out=4, seed=1)
    settings = Settings(max_tokens=16 * 4 * 4, batch=4, at_once=2, seq_len=16, every=2, seed=1)
    student = pruned("ghost", sparsity=0.5).model
    distil(student, dense(), source, out / "distil", settings=settings)
    sspruner.save(student, out / "distilled")
    model, plan, _ = gradual(dense(), source, out / "gradual", axis="state", sparsity=0.5, every=1, settings=settings)
    sspruner.save(model, out / "gradually")
    plan.save(out / "gradual" / "plan.json")
    for run in ("distil", "gradual"):
        shutil.rmtree(out / run / "tensorboard", ignore_errors=True)
        shutil.rmtree(out / run / "checkpoints" / "step-00000004")  # as if it had been interrupted after step 2


def results(out: Path) -> None:
    model, cut = dense(), pruned("ghost", sparsity=0.5).model
    data = sspruner.calibration(TEXT, model, samples=8, held_out=4)
    found = sspruner.compare(
        model, ["random", "ghost", "balanced"], sparsities=(0.5, 0.75), calibration=data, out=out, baseline=cut,
        metrics=("ppl", "kl", "recall"),
    ).named("tiny", "compare tiny", "smaller")  # fmt: skip
    found.save(out)
    how: dict[str, Any] = {"text": TEXT, "max_length": 16, "metrics": ["perplexity", "position", "length", "recall"]}
    evaluation = sspruner.evaluate_model(cut, against=model, **how)
    (out / "evaluation.json").write_text(evaluation.to_json(), encoding="utf-8")
    (out / "evaluation-alone.json").write_text(sspruner.evaluate_model(cut, **how).to_json(), encoding="utf-8")
    rates: dict[str, Any] = {"device": "cpu", "bandwidth": 1e10, "flops": 1e10}
    models = {"dense": model, "cut": cut}
    sspruner.bench(models, batches=(1, 2), prompt=4, generate=2, repeats=3, **rates).save(out / "bench.json")
    scores = sspruner.score(model, "ghost", calibration=data)
    scores.save(out / "scores.safetensors")
    sspruner.sensitivity(model, scores, data).save(out / "curves.json")
    sspruner.plan(sspruner.trace(model), scores, sparsity=0.5).save(out / "plan.json")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir()
    os.chdir(out)  # a run's folder says where its text lay
    out = Path(".")
    sspruner.save(dense(), out / "dense")
    checkpoints(out)
    training(out)
    (out / "results").mkdir()
    results(out / "results")
    logits, digests = {"ids": IDS}, {}
    for folder in sorted(path.parent for path in out.glob("*/config.json")):
        model = read(folder)
        with torch.no_grad():
            logits[folder.name] = model(input_ids=IDS).logits.float()
        digests[folder.name] = digest(model)
    save_file({n: t.contiguous().clone() for n, t in logits.items()}, out / "logits.safetensors")
    (out / "weights.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
