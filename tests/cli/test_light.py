"""What needs no model is answered before torch is imported: help, and wrong options of every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sspruner.cli.main import COMMANDS

ANSWERS = {  # arguments -> a part of the line
    "--help": "",
    **{f"{command} --help": "" for command in COMMANDS},
    "nosuch": "no such command: nosuch",
    **{f"{command} --nosuch": "" for command in COMMANDS},
    "prune m --sparsity 75": "sparsity 75: must be at least 0 and below 1",
    "prune m --axis state=0.5,head=2": "head: sparsity 2: must be",
    "prune m --allocation globl": "unknown allocation 'globl'",
    "prune m --mode slim": "mode 'slim': must be slice or mask",
    "prune m --refit all": "refit 'all': must be one of none, bias, output",
    "prune m --refit bias --params 0.9x": "refit bias adds parameters",
    "prune m --dtype float61": "--dtype 'float61': must be auto, float32, bfloat16 or float16",
    "prune m --target vlllm": "target 'vlllm': unknown; known: hf",
    "prune m --offload": "--offload writes the cut blocks on the way: add --out DIR",
    "prune m --out full": "full: exists and is not empty",
    "prune m --json nosuch/a.json": "nosuch",
    "prune --recipe nosuch.yaml": "recipe nosuch.yaml: cannot be read",
    "prune --recipe wrong.yaml": "sparsty",
    "score m --seq-len 1": "seq_len=1",
    "score m --scorer ghost --scorer flap --curves c.json": "--curves",
    "plan m --sparsity 2": "sparsity 2: must be",
    "plan m --axis state=0.5 --keep 3": "give fractions by axis or one sparsity",
    "apply m --out full": "full: exists and is not empty",
    "compare m --sparsity 2": "sparsity 2: must be",
    "compare m --metrics nosuch": "metrics nosuch: choose among ppl",
    "evaluate m --metrics nosuch": "metric 'nosuch': must be one of perplexity",
    "evaluate m --metrics none": "nothing to measure",
    "evaluate m --max-ppl-increase 2%": "give --against DENSE",
    "evaluate m --state-dtype int4": "state-dtype 'int4': must be one of int8, fp8, bf16, fp16",
    "evaluate m --rounding feedback": "give --state-dtype",
    "evaluate m --state-dtype int8 --every often": "expected a number of tokens, at least 1, or chunk",
    "bench --batch 0": "--batch",
    "bench --keep 64": "--keep and --balanced are for --shape",
    "export m --to nosuch --out new": "--to nosuch: unknown target",
    "export m --to hf --target mamba-ssm --out new": "mamba-ssm does not read that",
    "inspect m --target vlllm": "target 'vlllm': unknown",
    "inspect m --memory lots": "--memory",
    "train distil m": "--text is missing",
    "train gradual m --text t.txt --out run --sparsity 2": "sparsity",
    "train twist m --text t.txt --out run --draws 0": "draws 0: must be at least 1",
}  # fmt: skip

HEAVY = {"torch", "transformers", "datasets"}
LESS_HEAVY = {"numpy", "safetensors", "pydantic", "yaml", "markdown_it"}

EACH = """
import contextlib, io, json, sys
from sspruner.cli.main import main
for words in json.load(sys.stdin):
    sys.argv = ["sspruner", *words.split()]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([words, code, err.getvalue(), out.getvalue()[:100], [*sys.modules]]))
"""


def test_wrong_options_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "wrong.yaml").write_text("budget: {sparsty: 0.5}")
    asked = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps([*ANSWERS]), cwd=tmp_path, capture_output=True, text=True
    )
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [words for words, *_ in answers] == [*ANSWERS], asked.stderr
    for words, code, err, out, imported in answers:
        usage = words.endswith((" --help", " --nosuch"))  # these come first: nothing else has imported anything
        assert not {*HEAVY, *(LESS_HEAVY if usage else ())} & {*imported}, words
        assert code == (0 if words.endswith("--help") else 2), (words, err)
        assert ANSWERS[words] in err, words
        assert (err.count("\n"), bool(out)) == ((0, True) if code == 0 else (1, False)), words
    assert {path.name for path in tmp_path.iterdir()} == {"full", "wrong.yaml"}
