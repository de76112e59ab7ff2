"""Weights that go while the model trains, against masks made at once: perplexity, size on disk, and speed.

Gradual pruning trains, too. So beside it stand the best one-shot mask (by books-val.txt), trained on the same tokens of
books-train.txt with its zeros kept, and the dense model, trained on them as well; all on the text alone. Units: with
the dense model as teacher, as in distil.py, whose rows are taken where the folder has them. Learning rates are those
that distil.py chose; of weights, that of heads. Calibration on books-val.txt, reported on books-test.txt. Sizes are of
files that were written and read again. Speed: a forward with the zeros in dense tensors, and with the linear layers as
products with CSR tensors of torch.sparse, against the dense model; all take turns within a repeat, and a ratio is
within one.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Made, in_turns, progress, random_tokens, span, table
from safetensors.torch import load_file, save_file
from torch import nn

import sspruner
from sspruner.benchmarking.statistics import median_interval
from sspruner.training.gradual import gradual
from studies.distil import CUTS
from studies.training import CHOSEN_RATES, Bench, Row, perplexity, ratio, speed

SPARSITIES, MASK_EVERY, ONE_SHOT = (0.5, 0.7), 2, ("magnitude", "wanda", "sparsegpt", "gradmag")
UNITS = ("head 25%, ghost", "state 90%, ghost")  # of distil.CUTS
BATCH = (8, 256)  # tokens of a forward that is timed
Rows = list[list[str]]


def pruned(bench: Bench, axis: str, sparsity: float, tokens: int, taught: bool) -> Row:
    """Return a row of gradual pruning; the model is kept in a folder beside it."""
    rate, folder = CHOSEN_RATES[axis], bench.results / f"model-{axis}-{100 * sparsity:.0f}"
    settings = bench.settings(tokens, rate)

    def make(run: Path) -> tuple[Any, Row]:
        model = copy.deepcopy(bench.dense).requires_grad_(True)
        teacher = copy.deepcopy(bench.dense).eval() if taught else None
        how: dict[str, Any] = {"axis": axis, "sparsity": sparsity, "every": MASK_EVERY, "teacher": teacher}
        made, _, found = gradual(model, bench.text, run, settings=settings, **how)
        sspruner.save(made, folder, bench.tokenizer, overwrite=True)
        return made, {"tokens": found.tokens, "seconds": round(found.seconds, 1)}

    asked = {"axis": axis, "sparsity": sparsity, "every": MASK_EVERY, "taught": taught, "model": folder.name}
    return bench.row(f"gradual, {axis} {sparsity:.0%}, {tokens} tokens, {rate:g}", asked | settings.identity(), make)


def weights(bench: Bench, tokens: int) -> tuple[Rows, Rows, list[Row]]:
    """Return, for single elements, rows of perplexity, of gradual pruning against the others, and the runs."""
    rate, dense = CHOSEN_RATES["weight"], bench.as_cut("dense", {})
    trained = bench.distilled("dense, text alone", {}, tokens, rate, alpha=0.0)
    found: dict[str, list[Row]] = {name: [] for name in ("dense", *ONE_SHOT, "dense, trained", "best", "gradual")}
    best = []
    for sparsity in SPARSITIES:
        cuts = {name: {"axis": "weight", "scorer": name, "sparsity": sparsity} for name in ONE_SHOT}
        made = {name: bench.as_cut(f"{name}, weight {sparsity:.0%}", cut) for name, cut in cuts.items()}
        best.append(min(made, key=lambda name, made=made: perplexity(made[name], "chosen")))  # type: ignore[misc]
        made |= {"dense": dense, "dense, trained": trained}
        made["best"] = bench.distilled(f"{best[-1]}, weight {sparsity:.0%}", cuts[best[-1]], tokens, rate, alpha=0.0)
        made["gradual"] = pruned(bench, "weight", sparsity, tokens, taught=False)
        for name, row in made.items():
            found[name].append(row)
    runs = [trained, *found["best"], *found["gradual"]]
    label = f"{' and '.join(dict.fromkeys(best))}, trained"
    found = {label if name == "best" else name: rows for name, rows in found.items()}
    shown = [[name, *[percent(row, dense) for row in rows]] for name, rows in found.items()]
    own = found.pop("gradual")
    against = [[f"gradual / {name}", *map(ratio, own, rows)] for name, rows in found.items()]
    return shown, against, runs


def units(bench: Bench, tokens: int) -> tuple[Rows, list[Row]]:
    """Return heads and states that end in a slice: GHOST's cut, the same trained, and gradual pruning; and the runs."""
    dense, shown, runs = bench.as_cut("dense", {}), [], []
    for label in UNITS:
        cut = CUTS[label][0]
        rate = CHOSEN_RATES[cut["axis"]]
        control, after = bench.distilled("dense", {}, tokens, rate), bench.distilled(label, cut, tokens, rate)
        own = pruned(bench, cut["axis"], cut["sparsity"], tokens, taught=True)
        cells = [percent(row, dense) for row in (control, bench.as_cut(label, cut), after, own)]
        shown.append([f"{label.partition(',')[0]}, {rate:g}", *cells, ratio(own, after)])
        runs += [control, after, own]
    return shown, runs


def percent(row: Row, dense: Row) -> str:
    """Return the perplexity, and what it is over the dense model's."""
    return f"{perplexity(row):.2f} ({100 * (perplexity(row) / perplexity(dense) - 1):+.1f}%)"


def linear(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that pruning may touch: all but the head, which is tied to the embedding."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def packed(model: Any, file: Path) -> None:
    """Write a safetensors file: of linear layers the values that are not zero, and a bit for each element."""
    names, tensors = {f"{name}.weight" for name in linear(model)}, {}
    for name, p in model.named_parameters():
        value = p.detach()
        if name in names:
            bits = np.packbits((value != 0).numpy().reshape(-1))
            tensors |= {f"{name}.values": value[value != 0], f"{name}.bits": torch.from_numpy(bits)}
        else:
            tensors[name] = value
    save_file(tensors, file)
    read = load_file(file)
    for name, p in model.named_parameters():
        if name in names:
            bits = torch.from_numpy(np.unpackbits(read[f"{name}.bits"].numpy())[: p.numel()]).bool().view(p.shape)
            value = torch.zeros_like(p).masked_scatter(bits, read[f"{name}.values"])
        else:
            value = read[name]
        assert torch.equal(value, p), name


def compressed(model: Any, file: Path) -> None:
    """Write a file of torch.save: linear layers as CSR tensors, as torch.sparse makes them, with indices of 64 bits."""
    names = {f"{name}.weight" for name in linear(model)}
    found = {name: p.detach() for name, p in model.named_parameters()}
    torch.save({name: value.to_sparse_csr() if name in names else value for name, value in found.items()}, file)


def file_sizes(models: dict[str, Any]) -> Rows:
    """Return the bytes of the files of each model, in fp32 and bf16."""
    rows, first = [], {}
    for label, model in models.items():
        zeros = sum(int((m.weight == 0).sum()) for m in linear(model).values())
        counts = sum(m.weight.numel() for m in linear(model).values()), sum(p.numel() for p in model.parameters())
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            as_dtype = copy.deepcopy(model).to(dtype)
            with tempfile.TemporaryDirectory() as folder:
                files = [Path(folder) / name for name in ("saved/model.safetensors", "packed.safetensors", "csr.pt")]
                sspruner.save(as_dtype, files[0].parent)
                packed(as_dtype, files[1])
                compressed(as_dtype, files[2])
                found = [file.stat().st_size for file in files]
            first.setdefault(dtype, found[0])
            cells += [f"{size / 1e6:.2f} ({size / first[dtype]:.2f})" for size in found]
        rows.append([label, "{:.1%} ({:.1%})".format(*(zeros / count for count in counts)), *cells])
    return rows


class Sparse(nn.Module):
    """A linear layer without bias, by torch's product of a CSR tensor with a dense one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in)"""
        return torch.sparse.mm(self.weight, x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])


def with_sparse(model: Any) -> Any:
    """A copy whose linear layers are Sparse."""
    made = copy.deepcopy(model)
    for name, layer in linear(made).items():
        parent, _, own = name.rpartition(".")
        setattr(made.get_submodule(parent), own, Sparse(layer))
    return made


@torch.no_grad()
def speeds(models: dict[str, Any], repeats: int) -> Rows:
    """Return how many times as fast as dense each is: a forward, and in_proj alone, of many tokens and of one."""
    dense, *others = models
    variants = {dense: models[dense]} | {f"{label}, zeros": models[label] for label in others}
    variants |= {f"{label}, CSR": with_sparse(models[label]) for label in others}
    config = models[dense].config
    ids, layers = random_tokens(*BATCH, config.vocab_size), {n: m.backbone.layers[0] for n, m in variants.items()}
    many = torch.randn(ids.numel(), config.hidden_size, generator=torch.Generator().manual_seed(0))
    jobs: dict[str, tuple[Any, int, int]] = {  # what -> job of a variant, times in a turn, tokens
        "forward, {} x {} tokens".format(*BATCH): (lambda n: variants[n](input_ids=ids, use_cache=False), 1, len(many)),
        f"in_proj alone, {len(many):,} tokens": (lambda n: layers[n].mixer.in_proj(many), 10, len(many)),
        "in_proj alone, 1 token": (lambda n: layers[n].mixer.in_proj(many[:1]), 300, 1),
    }
    product = jobs[f"in_proj alone, {len(many):,} tokens"][0]
    for label in others:
        assert torch.allclose(product(f"{label}, zeros"), product(f"{label}, CSR"), atol=1e-4), "another function"
    rows = []
    for what, (job, times, tokens) in jobs.items():
        turns = {n: lambda n=n, job=job, times=times: [job(n) for _ in range(times)] for n in variants}
        taken = in_turns(turns, repeats)
        per_second = median_interval([tokens * times / s for s in taken[dense]])[0]
        ratios = [median_interval([a / b for a, b in zip(taken[dense], s, strict=True)]) for s in taken.values()]
        rows.append([what, f"{per_second:,.0f}", *map(span, ratios[1:])])
        progress(" | ".join(rows[-1]))
    return [["what", f"{dense}, tokens per second", *list(variants)[1:]], *rows]


def tables(s: Any) -> Made:
    """Return perplexity, ratios, units, sizes and speed. Settings: tokens, unit_tokens, repeats."""
    bench = Bench(s)
    (shown, against, runs), (structured, more) = weights(bench, s.tokens), units(bench, s.unit_tokens)
    loaded = {
        f"{p:.0%}": sspruner.load(bench.results / f"model-weight-{100 * p:.0f}", dtype="float32")[0] for p in SPARSITIES
    }
    models = {"dense": bench.dense} | loaded
    stored, timed = file_sizes(models), speeds(models, s.repeats)
    parts = [f"{p:.0%} of the linear layers" for p in SPARSITIES]
    text = table(f"Perplexity (over dense); trained: {s.tokens:,} tokens", ["what", *parts], shown)
    title = "Perplexity ratio (95 % interval over windows); below 1: gradual is better"
    text += "\n" + table(title, ["pair", *parts], against)
    head = ["cut, learning rate", "dense, trained", "GHOST, not trained", "GHOST, trained", "gradual"]
    title = f"Units that end in a slice: perplexity (over dense), {s.unit_tokens:,} tokens"
    text += "\n" + table(title, [*head, "gradual / trained (95 % interval)"], structured)
    kinds = ["as `sspruner.save` writes it", "values and a bit each", "CSR of torch"]
    head = ["model", "zeros in linear layers (in all)", *[f"{kind}, {d}" for d in ("fp32", "bf16") for kind in kinds]]
    text += "\n" + table("Size on disk, MB (of the dense file)", head, stored)
    text += "\n" + table("Speed: times as fast as dense, median (95 % interval)", timed[0], timed[1:])
    note = (
        f"{bench.note()}; learning rate of weights {CHOSEN_RATES['weight']:g}; a mask every {MASK_EVERY} steps up to "
        f"70 % of them; {speed([*runs, *more])}; {s.repeats} repeats of times"
    )
    return text, note, None
