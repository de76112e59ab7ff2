"""The options that several commands take, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[
    Optional[str], typer.Argument(help="Model folder or hub id. Default: the reference model.", show_default=False)
]
Tokenizer = Annotated[
    Optional[str], typer.Option(help="Folder or hub id of the tokenizer.", show_default="that in the model's folder")
]
Scorer = Annotated[
    Optional[str],
    typer.Option(
        help="Scorer (`sspruner scorers` lists them), or one per axis: state=ghost,mlp=magnitude; or auto, or "
        "auto:ghost,taylor: that which costs least on calibration text.",
        show_default="ghost, or that of --basis",
    ),
]
Basis = Annotated[
    Optional[str],
    typer.Option(help="select: keep coordinates of the state. balanced: keep directions.", show_default="the scorer's"),
]
Scorers = Annotated[
    Optional[list[str]],
    typer.Option(
        "--scorer",
        help="Scorer, or one per axis: state=ghost,mlp=magnitude. Repeatable: one pass serves all.",
        show_default="ghost",
    ),
]
ScorerOption = Annotated[
    Optional[list[str]],
    typer.Option("--option", help="An option of the scorer, name=value, or scorer.name=value. Repeatable."),
]
Axis = Annotated[str, typer.Option(help="What to remove; several with their fractions: state=0.5,head=0.25.")]
ScoredAxes = Annotated[str, typer.Option(help="What to score; several separated by commas.")]
Ratio = Annotated[
    Optional[list[str]],
    typer.Option(help="PATTERN=FRACTION: remove another fraction where a layer's name matches. Repeatable."),
]
Ignore = Annotated[
    Optional[list[str]], typer.Option(help="Leave alone what matches this pattern, e.g. 'layers.0.*'. Repeatable.")
]
Pattern = Annotated[
    Optional[str], typer.Option(help="Single elements (axis weight): keep N of every M of a row, e.g. 2:4.")
]
Granularity = Annotated[
    Optional[str],
    typer.Option(help="Single elements: which compete: row, tensor or global.", show_default="the scorer's own"),
]
Rows = Annotated[
    Optional[list[str]], typer.Option(help="Single elements: prune only these runs of rows, e.g. B. Repeatable.")
]
Sparsity = Annotated[Optional[float], typer.Option(help="Fraction of units to remove, in [0, 1).", show_default="0.5")]
Keep = Annotated[Optional[int], typer.Option(help="Units to keep in every group, instead of --sparsity.")]
Allocation = Annotated[
    str,
    typer.Option(
        help="uniform: the same fraction of every layer. global: layers compete by their scores. adaptive: the best "
        "split by measured damage. uniform-best: the smallest one size within --max-ppl-increase or --max-kl."
    ),
]
Normalise = Annotated[
    Optional[str],
    typer.Option(
        help="How --allocation global makes scores of layers comparable: energy, last or none.",
        show_default="the scorer's own",
    ),
]
Floor = Annotated[
    Optional[list[str]],
    typer.Option(help="UNITS, or PATTERN=UNITS: keep at least so many in every set, whatever the budget. Repeatable."),
]
Cap = Annotated[
    Optional[list[str]], typer.Option(help="UNITS, or PATTERN=UNITS: keep at most so many in every set. Repeatable.")
]
Curves = Annotated[
    Optional[Path], typer.Option(help="What `sspruner score --curves` wrote, for --allocation adaptive.")
]
StateBytes = Annotated[
    Optional[str], typer.Option(help="Instead of a fraction: recurrent state per sequence, at most, e.g. 25MB.")
]
MaxBatch = Annotated[
    Optional[int], typer.Option(help="Instead of a fraction: so many sequences and the weights fit in --memory.")
]
Memory = Annotated[Optional[str], typer.Option(help="Memory for --max-batch, e.g. 80GB.")]
Params = Annotated[
    Optional[str], typer.Option(help="Instead of a fraction: parameters, at most: 0.8x of the model's, or e.g. 900M.")
]
MaxPplIncrease = Annotated[
    Optional[str],
    typer.Option(help="Instead of a fraction: the largest cut that raises perplexity by at most this, e.g. 1%."),
]
MaxKl = Annotated[
    Optional[float], typer.Option(help="Instead of a fraction: the largest cut within this KL, nats per token.")
]
Target = Annotated[
    Optional[str],
    typer.Option(help="Only sizes that this runtime takes: hf, mamba-ssm, vllm, tensorrt-llm or llama.cpp."),
]
Tp = Annotated[int, typer.Option(help="GPUs over which vllm or tensorrt-llm splits the model.")]
MultipleOf = Annotated[int, typer.Option(help="Keep a multiple of this many units.")]
Mode = Annotated[str, typer.Option(help="slice: smaller tensors, proved. mask: zeros, same sizes.")]
OneShot = Annotated[bool, typer.Option("--one-shot", help="Score all layers on the dense model, then cut at once.")]
Refit = Annotated[
    str,
    typer.Option(help="After the cut, solve for what stays: output (weights of out_proj and its like), bias, or none."),
]
Calibration = Annotated[
    str, typer.Option(help="Text file, datasets name (NAME[:CONFIG[:SPLIT]]), or self: sampled from the model.")
]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
Device = Annotated[Optional[str], typer.Option(help="Compute device.", show_default="cuda if there is one, else cpu")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling, windows and the random scorer.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Score again, even if nothing has changed since.")]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep the model on disk and read it block by block; needs --out and a text file."),
]
DeviceMap = Annotated[
    Optional[str],
    typer.Option(help="auto: blocks on GPUs, in memory and on disk, as they fit; with --out and a text file in prune."),
]
MaxMemory = Annotated[
    Optional[list[str]],
    typer.Option(
        help="PLACE=SIZE, what --device-map may fill: 0=20GiB, cpu=60GiB. Repeatable.", show_default="4/5 of all"
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="With --offload or --device-map: go on where the same command was interrupted."),
]
Plugin = Annotated[Optional[list[Path]], typer.Option(help="Python file with a plugin. Repeatable.")]
Out = Annotated[Optional[Path], typer.Option(help="Folder to write the model to.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in the model's folder or repository.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model in --out.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write the result as JSON to this file; - for stdout.")]
