"""Weights that go while the model trains, against masks made at once: perplexity, size on disk, and speed.

    python benchmarks/gradual.py --data ../shared/data --threads 1
    python benchmarks/gradual.py --quick --results /tmp/quick --data ../shared/data

Gradual pruning trains, too. So beside it stand the best one-shot mask (by books-val.txt), trained on the same tokens of
books-train.txt with its zeros kept, and the dense model, trained on them as well; all on the text alone. Units: with
the dense model as teacher, as in distil.py, whose rows are taken where --results has them. Learning rates are those
that distil.py chose; of weights, that of heads. Calibration on books-val.txt, reported on books-test.txt. Sizes are of
files that were written and read again. Speed: a forward with the zeros in dense tensors, and with the linear layers as
products with CSR tensors of torch.sparse, against the dense model; all take turns within a repeat, and a ratio is
within one.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import deliver, options, progress, provenance, table
from distil import CUTS
from safetensors.torch import load_file, save_file
from torch import nn
from training import CHOSEN_RATES, Bench, Row, perplexity, ratio, sizes, speed

import sspruner
from sspruner.benchmarking.measure import order
from sspruner.benchmarking.statistics import median_interval
from sspruner.training.gradual import gradual

SPARSITIES, TOKENS, UNIT_TOKENS, MASK_EVERY = (0.5, 0.7), 100_000, 50_000, 2
ONE_SHOT = ("magnitude", "wanda", "sparsegpt", "gradmag")
UNITS = ("head 25%, ghost", "state 90%, ghost")  # of distil.CUTS
BATCH, REPEATS = (8, 256), 11  # tokens of a forward that is timed


def pruned(bench: Bench, axis: str, sparsity: float, tokens: int, rate: float, taught: bool) -> Row:
    """A row of gradual pruning; the model is kept in a folder beside it."""
    label = f"gradual, {axis} {sparsity:.0%}"
    settings, folder = bench.settings(tokens, rate), model_folder(bench, axis, sparsity)

    def make(run: Path) -> tuple[Any, Row]:
        model = copy.deepcopy(bench.dense).requires_grad_(True)
        teacher = copy.deepcopy(bench.dense).eval() if taught else None
        how: dict[str, Any] = {"axis": axis, "sparsity": sparsity, "every": MASK_EVERY, "teacher": teacher}
        made, _, found = gradual(model, bench.text, run, settings=settings, **how)
        sspruner.save(made, folder, bench.tokenizer, overwrite=True)
        return made, {"tokens": found.tokens, "seconds": round(found.seconds, 1)}

    asked = {"axis": axis, "sparsity": sparsity, "every": MASK_EVERY, "taught": taught, "model": folder.name}
    return bench.row(f"{label}, {tokens} tokens, {rate:g}", asked | settings.asked(), make)


def model_folder(bench: Bench, axis: str, sparsity: float) -> Path:
    return bench.results / f"model-{axis}-{100 * sparsity:.0f}"


def weights(bench: Bench, tokens: int, rate: float) -> tuple[list[list[str]], list[list[str]], list[Row]]:
    """Single elements: rows of perplexity, of gradual pruning against the others, and the runs."""
    dense, trained = bench.as_cut("dense", {}), bench.distilled("dense, text alone", {}, tokens, rate, alpha=0.0)
    found: dict[str, list[Row]] = {"dense": [dense] * len(SPARSITIES), "dense, trained": [trained] * len(SPARSITIES)}
    best = []
    for sparsity in SPARSITIES:
        cuts = {name: {"axis": "weight", "scorer": name, "sparsity": sparsity} for name in ONE_SHOT}
        for name, cut in cuts.items():
            found.setdefault(name, []).append(bench.as_cut(f"{name}, weight {sparsity:.0%}", cut))
        best.append(min(ONE_SHOT, key=lambda name: perplexity(found[name][-1], "chosen")))
        control = bench.distilled(f"{best[-1]}, weight {sparsity:.0%}", cuts[best[-1]], tokens, rate, alpha=0.0)
        found.setdefault("the best of them, trained", []).append(control)
        found.setdefault("gradual", []).append(pruned(bench, "weight", sparsity, tokens, rate, taught=False))
    label = f"{' and '.join(dict.fromkeys(best))}, trained"
    found = {label if name == "the best of them, trained" else name: rows for name, rows in found.items()}
    names = ["dense", *ONE_SHOT, "dense, trained", label, "gradual"]
    shown = [[name, *[f"{perplexity(r):.2f} ({percent(r, dense)})" for r in found[name]]] for name in names]
    against = [
        [f"gradual / {name}", *[ratio(a, b) for a, b in zip(found["gradual"], found[name], strict=True)]]
        for name in names[:-1]
    ]
    return shown, against, [trained, *found[label], *found["gradual"]]


def units(bench: Bench, tokens: int) -> tuple[list[list[str]], list[Row]]:
    """Heads and states that end in a slice: GHOST's cut, the same trained, and gradual pruning; and the runs."""
    dense, shown, runs = bench.as_cut("dense", {}), [], []
    for label in UNITS:
        cut = CUTS[label][0]
        rate = CHOSEN_RATES[cut["axis"]]
        control, after = bench.distilled("dense", {}, tokens, rate), bench.distilled(label, cut, tokens, rate)
        own = pruned(bench, cut["axis"], cut["sparsity"], tokens, rate, taught=True)
        four = (control, bench.as_cut(label, cut), after, own)
        cells = [f"{perplexity(row):.2f} ({percent(row, dense)})" for row in four]
        shown.append([f"{label.partition(',')[0]}, {rate:g}", *cells, ratio(own, after)])
        runs += [control, after, own]
    return shown, runs


def percent(row: Row, dense: Row) -> str:
    return f"{100 * (perplexity(row) / perplexity(dense) - 1):+.1f}%"


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


def file_sizes(models: dict[str, Any]) -> list[list[str]]:
    """Bytes of the files of each model, in fp32 and bf16."""
    rows, first = [], {}
    for label, model in models.items():
        zeros = [int((m.weight == 0).sum()) for m in linear(model).values()]
        share = sum(zeros) / sum(m.weight.numel() for m in linear(model).values())
        everything = sum(zeros) / sum(p.numel() for p in model.parameters())
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
        rows.append([label, f"{share:.1%} ({everything:.1%})", *cells])
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
def speeds(models: dict[str, Any], repeats: int) -> list[list[str]]:
    """How many times as fast as the dense model each is: a forward, and in_proj alone, of many tokens and of one."""
    dense, *others = models
    variants = {dense: models[dense]} | {f"{label}, zeros": models[label] for label in others}
    variants |= {f"{label}, CSR": with_sparse(models[label]) for label in others}
    ids = torch.randint(models[dense].config.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
    layers = {label: model.backbone.layers[0].mixer.in_proj for label, model in variants.items()}
    many = torch.randn(ids.numel(), models[dense].config.hidden_size, generator=torch.Generator().manual_seed(0))
    close = [
        torch.allclose(layers[f"{label}, zeros"](many), layers[f"{label}, CSR"](many), atol=1e-4) for label in others
    ]
    assert all(close), "another function"
    jobs: dict[str, tuple[Callable[[str], Any], int, int]] = {  # what -> job, times in a turn, tokens
        f"forward, {BATCH[0]} x {BATCH[1]} tokens": (
            lambda label: variants[label](input_ids=ids, use_cache=False),
            1,
            ids.numel(),
        ),
        f"in_proj alone, {ids.numel():,} tokens": (lambda label: layers[label](many), 10, ids.numel()),
        "in_proj alone, 1 token": (lambda label: layers[label](many[:1]), 300, 1),
    }
    rows = []
    for what, (job, times, tokens) in jobs.items():
        taken: dict[str, list[float]] = {label: [] for label in variants}
        for label in variants:
            job(label)
        for turn in order(list(variants), repeats, 0):
            for label in turn:
                start = time.perf_counter()
                for _ in range(times):
                    job(label)
                taken[label].append((time.perf_counter() - start) / times)
        per_second = median_interval([tokens / s for s in taken[dense]])[0]
        ratios = [median_interval([a / b for a, b in zip(taken[dense], taken[v], strict=True)]) for v in variants]
        rows.append([what, f"{per_second:,.0f}", *["{:.2f} ({:.2f} to {:.2f})".format(*r) for r in ratios[1:]]])
        progress(" | ".join(rows[-1]))
    return [["what", f"{dense}, tokens per second", *list(variants)[1:]], *rows]


def main() -> None:
    parser = options(__doc__, "gradual.py")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/training"), help="folder of the rows")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(given.data, given.results, given.quick)
    tokens, unit_tokens = (4000, 2000) if given.quick else (TOKENS, UNIT_TOKENS)
    shown, against, runs = weights(bench, tokens, CHOSEN_RATES["weight"])
    structured, more = units(bench, unit_tokens)
    loaded = [sspruner.load(model_folder(bench, "weight", s), dtype="float32")[0] for s in SPARSITIES]
    models = {"dense": bench.dense} | {f"{s:.0%}": model for s, model in zip(SPARSITIES, loaded, strict=True)}
    stored, timed = file_sizes(models), speeds(models, 2 if given.quick else REPEATS)

    percents = [f"{s:.0%} of the linear layers" for s in SPARSITIES]
    text = table(f"Perplexity (over dense); trained: {tokens:,} tokens", ["what", *percents], shown)
    text += "\n" + table(
        "Perplexity ratio (95 % interval over windows); below 1: gradual is better", ["pair", *percents], against
    )
    head = [
        "cut, learning rate",
        "dense, trained",
        "GHOST, not trained",
        "GHOST, trained",
        "gradual",
        "gradual / trained (95 % interval)",
    ]
    text += "\n" + table(
        f"Units that end in a slice: perplexity (over dense), {unit_tokens:,} tokens", head, structured
    )
    kinds = ["as `sspruner.save` writes it", "values and a bit each", "CSR of torch"]
    head = ["model", "zeros in linear layers (in all)", *[f"{kind}, {d}" for d in ("fp32", "bf16") for kind in kinds]]
    text += "\n" + table("Size on disk, MB (of the dense file)", head, stored)
    text += "\n" + table("Speed: times as fast as dense, median (95 % interval)", *[timed[0], timed[1:]])
    note = (
        f"{sizes(bench)}; learning rate of weights {CHOSEN_RATES['weight']:g}; a mask every {MASK_EVERY} steps up to "
        f"70 % of them; {speed([*runs, *more])}; {2 if given.quick else REPEATS} repeats of times"
    )
    numbers = {"perplexity": shown, "ratio": against, "units": structured, "size": stored, "speed": timed}
    deliver(given, "gradual.py", text + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
