"""Bad input: one line on standard error that says what, where and what to do; exit 2; nothing written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import sspruner
from sspruner.calibrate.gradients import check_differentiable
from sspruner.plugins.manager import plugin_manager
from sspruner.scoring.known import installed_scorers
from support.command import STATE, TEXT, done, refused, saved_model, saved_zoo
from support.scoring import calibrated
from support.tiny import tokens
from support.zoo import zoo

LAYER = "backbone.layers.0.mixer"
GROUP = f"{LAYER}:state"
HEADS = f"{LAYER}:head"
Says = tuple[str, ...]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs: model/, other/ (other weights), wide/ (other shape), text.txt, s.safetensors, p.json, w.safetensors
    (single weights); and hybrids:
    zamba2/, nemotron/ (Mamba, MLP, attention, Mamba, experts; a layer is one thing only) and mamba/, without tokenizer.
    """
    folder = tmp_path_factory.mktemp("inputs")
    saved_model(folder / "model")
    saved_model(folder / "other", seed=1)
    saved_model(folder / "wide", state=STATE + 2)
    saved_zoo(folder / "zamba2", "zamba2")
    saved_zoo(folder / "nemotron", "nemotron_h")
    saved_zoo(folder / "mamba", "mamba", tokenizer=False)
    (folder / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    scores = sspruner.score(sspruner.load(folder / "model")[0], "magnitude")
    scores.save(folder / "s.safetensors")
    sspruner.plan(sspruner.trace(sspruner.load(folder / "model")[0]), scores, keep=4).save(folder / "p.json")
    sspruner.score(sspruner.load(folder / "model")[0], "magnitude", axis="weight").save(folder / "w.safetensors")
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good inputs to spoil; also the current and the temporary folder."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def prune(here: Path, says: Says, *args: object, model: object = "model") -> None:
    """`refused` for a prune that is good but for `args` (of an option that is given twice, the last counts)."""
    good = ["--samples", 2, "--seq-len", 32, "--calibration", "text.txt", "--out", "out"]
    refused(here, says, "prune", model, *good, *args)


@pytest.mark.cover(most=9)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            "--scorer ghots",
            (
                "unknown scorer 'ghots'",
                "known: balanced, block-influence, ean,",
                "did you mean 'ghost'?",
            ),
        ),
        ("--sparsity half", ("--sparsity", "number", "sspruner prune --help")),
        ("--keep 17", ("keep 17", LAYER, "only 16 units")),
        ("--keep 4 --sparsity 0.5", ("either sparsity", "or keep", "not both")),
        ("--sparsity 0.01", (GROUP, "0.01 removes nothing from 2 sets of 16", "nearest", "is 0.0625 (keeps 15)")),
        (
            "--axis channel",
            ("axis 'channel': Mamba2ForCausalLM has none; it has state, head, head_dim, group, hidden",),
        ),
        ("--axis state,head", ("--axis 'state,head': expected NAME=VALUE",)),
        ("--ratio layers.9.*=0.5", ("pattern 'layers.9.*': matches nothing that is cut; the nearest name is layers.",)),
        ("--scorer state=ghots", ("unknown scorer 'ghots'", "did you mean 'ghost'?")),
        ("--dtype int8", ("dtype 'int8': must be auto, float32, bfloat16 or float16",)),
        ("--device gpu", ("device 'gpu': not available here",)),
        ("--device cuda:99", ("device 'cuda:99': not available here",)),
        ("--option depth=3", ("scorer 'ghost': unknown option 'depth'; it takes variant",)),
        ("--option variant", ("--option 'variant': expected name=value",)),
        ("--samples 0", ("samples=0", "at least 1")),
        ("--seq-len 1", ("seq_len=1", "need at least 1, 2")),
        ("--plugin no.py", ("--plugin ", "/no.py: no such file")),
        ("--spasity 0.5", ("no such option: --spasity", "--sparsity", "sspruner prune --help")),
    ],
)
def test_options(args: str, says: Says, here: Path) -> None:
    """A few of each kind; what else a recipe refuses is in tests/unit/pruning/test_refused_recipes.py."""
    prune(here, says, *args.split())


IN_PROJ = f"{LAYER}.in_proj:weight"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--scorer wanda --pattern 4:2", ("pattern '4:2': expected N:M with 0 < N < M; 2:4 keeps 2 of every 4",)),
        ("--scorer sparsegpt --samples 1 --seq-len 8", ("scorer 'sparsegpt' on", "8 calibration tokens", "--samples")),
        ("--axis state --rows B", ("pattern, granularity and rows are for single elements: axis weight",)),
    ],
)
def test_options_for_single_elements(args: str, says: Says, here: Path) -> None:
    prune(here, says, "--axis", "weight", *args.split())


@pytest.mark.cover(most=12)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("score model --axis state,nose", ("'ghost' does not score axis 'nose'",)),
        ("score model --axis state,,head", ("'ghost' does not score axis ''",)),
        ("score model --axis state,channel", ("axis 'channel': Mamba2ForCausalLM has none",)),
        ("score model --axis state,head --scorer head=random", ("no scorer for axis 'state'", "add state=NAME")),
        ("score model --axis state=0.5", ("axis 'state=0.5'",)),
        ("plan model --scores s.safetensors --axis state", ("--axis state: give a fraction for it, state=0.5",)),
        ("plan model --scores s.safetensors --axis state,head", ("--axis 'state,head': expected NAME=VALUE",)),
        (
            "plan model --scores s.safetensors --axis state=0.5 --keep 3",
            ("by axis or one sparsity or keep", "not both"),
        ),
        ("plan model --scores s.safetensors --axis state=0.5 --sparsity 0.5", ("not both",)),
        ("plan model --scores s.safetensors --axis head=0.5", ("'head'", "state")),
        ("plan model --scores s.safetensors --axis state=0.5,hed=0.25", ("'hed'", "state")),
        ("plan model --scores s.safetensors --sparsity 0", ("the budget removes nothing",)),
        ("plan model --scores s.safetensors --sparsity 0.01", (GROUP, "removes nothing", "is 0.0625 (keeps 15)")),
        ("plan model --scores s.safetensors --ignore layers.7", ("pattern 'layers.7': matches nothing",)),
        ("plan model --scores s.safetensors --ratio layers.0.mixer=x", ("--ratio layers.0.mixer=x: 'x' is not a nu",)),
        ("plan model --scores s.safetensors --pattern 2:4", ("are for single elements: axis weight",)),
        ("plan model --scores s.safetensors --rows B", ("are for single elements: axis weight",)),
        ("plan model --scores w.safetensors --pattern 3:2", ("pattern '3:2': expected N:M",)),
        ("plan model --scores w.safetensors --pattern 2:4 --sparsity 0.25", ("removes 0.5, not 0.25",)),
        ("plan model --scores w.safetensors --pattern 2:4 --axis weight=0.25", (IN_PROJ, "removes 0.5, not 0.25")),
        ("plan model --scores w.safetensors --keep 4", ("keep counts units",)),
        ("plan model --scores w.safetensors --granularity rows", ("unknown granularity 'rows'",)),
        ("plan model --scores w.safetensors --rows y", ("rows 'y': no tensor has such rows",)),
        ("plan wide --scores w.safetensors", (IN_PROJ, "scores of shape (132, 16) do not fit this model")),
        ("score model --axis state,weight", ("'ghost' does not score axis 'weight'",)),
        ("score model --scorer ghost --scorer ghost", ("scorer 'ghost' is given twice",)),
    ],
)
def test_options_of_the_steps(args: str, says: Says, here: Path) -> None:
    refused(here, says, *args.split(), "--out", "x")


def config(**changes: Any) -> Callable[[Path], None]:
    """Spoil a model folder: change or, with None, remove keys of its config.json."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in data.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return spoil


def content(name: str, data: bytes) -> Callable[[Path], None]:
    """Spoil a model folder: replace one file."""
    return lambda folder: (folder / name).write_bytes(data) and None


def weights(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """Spoil a model folder: change the bytes of model.safetensors; `change` may return new ones."""

    def spoil(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").write_bytes(change(data) or data)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Spoil a model folder: change the tensors in model.safetensors, in a file that is otherwise good."""

    def spoil(folder: Path) -> None:
        data = load_file(folder / "model.safetensors")
        change(data)
        save_file(data, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cut_at(fraction: float) -> Callable[[Path], None]:
    """Truncate; 0 and 1 are the first and the last byte of the tensors, below 0 is the header."""

    def change(data: bytearray) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        at = start * (1 + fraction) if fraction < 0 else start + (len(data) - 1 - start) * fraction
        return bytes(data[: int(at)]) or b" "

    return weights(change)


SMALL, DAMAGED = f"{LAYER}.A_log", "corrupt or truncated"
NATIVE = json.dumps({"d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}, "vocab_size": 50288}).encode()

RECORD = ("model model: ", "config.json, key 'sspruner'")


def record(changes: dict[str, Any] | None = None, name: str = GROUP, **cut: Any) -> Callable[[Path], None]:
    """Spoil a model folder: a config.json with a record of cuts that is good but for `changes`, or for its one cut."""
    group = {"before": STATE, "keep": [[*range(STATE)], [*range(STATE)]]} | cut
    plan = {"version": 1, "groups": {name: group}}
    return config(sspruner={"version": 1, "cuts": [plan], "stock": {}} | (changes or {}))


MODELS: dict[str, tuple[Callable[[Path], Any], Says]] = {
    "absent": (shutil.rmtree, ("model model: no such path",)),
    "no config": (lambda d: (d / "config.json").unlink(), ("model model: no config.json in this folder",)),
    "not json": (content("config.json", b'{"model_type": '), ("config.json is not JSON", "line 1")),
    "not text": (content("config.json", b"\xff\xfe{}"), ("config.json is not JSON",)),
    "native": (content("config.json", NATIVE), ("its embedding has 4096 rows; a vocabulary of 50288 is padded",)),
    "no type": (content("config.json", b'{"d_model": 768}'), ("config.json has no model_type, nor the d_model",)),
    "unknown type": (config(model_type="zebra"), ("config cannot be read", "`zebra`")),
    "bad size": (config(num_heads=3), ("config cannot be read", "num_heads")),
    "other size": (config(state_size=STATE + 1), ("do not have the shape that config.json says", f"{LAYER}.conv1d")),
    "record without cuts": (config(sspruner={"version": 1}), (*RECORD, "not a record of version 1")),
    "record of version 2": (config(sspruner={"version": 2, "cuts": [], "stock": {}}), (*RECORD, "not a record of ver")),
    "record a list": (config(sspruner=[1]), (*RECORD, "not a record of version 1")),
    "record a word": (config(sspruner="cut"), (*RECORD, "not a record of version 1")),
    "cuts no list": (record({"cuts": {}}), (*RECORD, "not a record of version 1")),
    "cut no plan": (record({"cuts": [3]}), (*RECORD, "not a plan of version 1")),
    "cut without groups": (record({"cuts": [{"version": 1}]}), (*RECORD, "malformed plan", "'groups'")),
    "cut with words": (record(keep=[["a"], ["b"]]), (*RECORD, "malformed plan", "'a'")),
    "cut uneven": (record(keep=[[0], [0, 1]]), (*RECORD, GROUP, "[1, 2] units", "the same count")),
    "cut out of range": (record(keep=[[0, 16], [0, 1]]), (*RECORD, GROUP, "within 0 to 15")),
    "cut of everything": (
        record(keep=[[], []]),
        ("model model: ", "do not have the shape that config.json says", LAYER),
    ),
    "cut of an unknown group": (
        record(name="nose:state"),
        ("model model: ", "records a cut of nose:state", "does not fit"),
    ),
    "cut of an unknown axis": (
        record(name=f"{LAYER}:channel"),
        ("model model: ", f"a cut of {LAYER}:channel that does"),
    ),
    "cut of other sizes": (record(before=32), ("model model: ", f"records a cut of {GROUP} that does not fit")),
    "cut of one set": (record(keep=[[0, 1]]), ("model model: ", f"records a cut of {GROUP} that does not fit")),
    "cut that the weights lack": (
        record(keep=[[0, 1], [2, 3]]),
        ("model model: ", "do not have the shape that config"),
    ),
    "stock no dict": (record({"stock": [1]}), (*RECORD, "'stock'")),
    "stock of other sizes": (record({"stock": {"state_size": 9}}), ("model model: ", "does not fit")),
    "bad tokenizer": (content("tokenizer.json", b"{"), ("model model: its tokenizer cannot be read",)),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("model model: cannot be loaded",)),
    "cut in the length": (cut_at(-0.999), (DAMAGED, "model.safetensors")),
    "cut in the header": (cut_at(-0.5), (DAMAGED, "model.safetensors")),
    "cut after the header": (cut_at(0), (DAMAGED, "model.safetensors")),
    "cut in the middle": (cut_at(0.5), (DAMAGED, "model.safetensors")),
    "one byte short": (cut_at(1), (DAMAGED, "model.safetensors")),
    "one byte long": (weights(lambda data: data + b"\0"), (DAMAGED, "model.safetensors")),
    "flip in the length": (weights(lambda d: d.__setitem__(0, d[0] ^ 8)), (DAMAGED, "model.safetensors")),
    "flip in a high length byte": (weights(lambda d: d.__setitem__(6, d[6] ^ 128)), (DAMAGED, "model.safetensors")),
    "flip in the header": (weights(lambda d: d.__setitem__(8, d[8] ^ 1)), (DAMAGED, "model.safetensors")),
    "flip in a name": (weights(lambda d: bytes(d).replace(b"A_log", b"A_lof", 1)), ("lack 1 param", SMALL)),
    "no tensors": (tensors(dict.clear), ("its weights lack", "parameters")),
    "no embedding": (tensors(lambda t: t.pop("backbone.embeddings.weight")), ("backbone.embeddings.weight",)),
    "one missing": (tensors(lambda t: t.pop(SMALL)), ("model model", "lack 1 parameters", SMALL)),
    "one short": (tensors(lambda t: t.update({SMALL: t[SMALL][1:].clone()})), (SMALL, "is (3,), not (4,)")),
    "nan": (tensors(lambda t: t[SMALL].fill_(torch.nan)), (SMALL, "4 of 4 weights are NaN or infinite")),
    "inf": (tensors(lambda t: t[SMALL][:1].fill_(torch.inf)), ("model model", SMALL, "1 of 4 weights are NaN or inf")),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, here: Path) -> None:
    spoil, says = MODELS[case]
    spoil(here / "model")
    prune(here, says, model="./model")


def test_a_model_without_a_state_space_layer(here: Path) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 31}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(here / "gpt2")
    says = ("GPT2LMHeadModel: no state-space layer found", "Conv1D", "known mixers: ", "Mamba2Mixer")
    prune(here, says, model="gpt2")
    refused(here, says, "inspect", "gpt2")


def test_a_file_as_model_and_a_name_that_nobody_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prune(here, ("text.txt: is a file; give the folder that holds config.json",), model="text.txt")
    prune(here, ("model no-such-model: no folder of that name is here", "config cannot be read"), model="no-such-model")


def dataset(*rows: dict[str, Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return make


CALIBRATIONS: dict[str, tuple[str, Callable[[Path], Any], Says]] = {
    "missing": ("no.txt", lambda p: None, ("calibration file no.txt: no such file",)),
    "nameless": ("", lambda p: None, ("calibration: the name is empty",)),
    "empty": ("x.txt", lambda p: p.write_text(""), ("calibration x.txt: empty",)),
    "blank": ("x.txt", lambda p: p.write_text(" \n\n "), ("calibration x.txt: empty",)),
    "short": ("x.txt", lambda p: p.write_text("too short"), ("x.txt: 3 tokens, shorter than", "--seq-len 32")),
    "latin-1": ("x.txt", lambda p: p.write_bytes(b"caf\xe9 " * 99), ("x.txt: not UTF-8 (byte 3)",)),
    "empty folder": ("data", Path.mkdir, ("calibration data: an empty folder; give plain text",)),
    "no text column": ("data", dataset({"body": "a"}), ("data: no column 'text'; it has body",)),
    "no text": ("data", dataset({"text": 3}), ("data: its column 'text' holds int, not text",)),
    "null text": ("data", dataset({"text": None}), ("calibration data: empty",)),
    "no such split": ("data::dev", dataset({"text": "a"}), ("calibration data::dev: no split 'dev'; it has train",)),
    "damaged": ("data", lambda p: (p.mkdir(), (p / "a.jsonl").write_text("{")), ("data", "JSON parse error")),
}


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibration(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    name, make, says = CALIBRATIONS[case]
    make(here / name.partition(":")[0])
    prune(here, says, "--calibration", name)


def test_a_tokenizer_that_does_not_fit(here: Path) -> None:
    saved_model(here / "small", vocabulary=31)
    prune(here, ("calibration text.txt: token id ", "outside the vocabulary (0 to 30)"), model="small")
    saved_model(here / "mute", tokenizer=False)
    prune(here, ("needs a tokenizer and this model has none", "'self'"), model="mute")


OUTPUTS: dict[str, tuple[Callable[[Path], Any], str, Says]] = {
    "taken": (lambda d: None, "--out other", ("other: exists and is not empty", "--overwrite")),
    "no model": (lambda d: (d / "own" / "deep").mkdir(parents=True), "--out own --overwrite", ("own: holds no model",)),
    "file": (lambda d: None, "--out text.txt", ("text.txt: is a file; give a folder",)),
    "below a file": (lambda d: None, "--out text.txt/out", ("cannot write in", "text.txt")),
    "long": (lambda d: None, "--out " + "x" * 300, ("File name too long",)),
    "json in no folder": (lambda d: None, "--json none/r.json", ("none/r.json: no folder", "make it first")),
    "json on a folder": (lambda d: None, "--json other", ("other: is not a regular file",)),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before the work starts: the model is not even read."""
    make, args, says = OUTPUTS[case]
    make(here)
    monkeypatch.setattr(sspruner.io.load, "load", None)
    prune(here, says, *args.split())
    if "--json" in args:
        for command, option in (("inspect", "--json"), ("score", "--out"), ("plan", "--out")):
            refused(here, says, command, "model", option, args.split()[1])


def test_a_folder_without_the_right_to_write(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sspruner.files.output.os.access", lambda path, mode: False)  # root may always write
    prune(here, (f"cannot write in {here}",))


KEEP = [[0, 1], [2, 3]]

PLANS: dict[str, tuple[Callable[[dict[str, Any]], Any], Says]] = {
    "not json": (lambda p: "{", ("plan x.json: cannot be read", "line 1")),
    "nothing": (lambda p: " ", ("plan x.json: cannot be read",)),
    "deep": (lambda p: "[" * 100_000, ("plan x.json: cannot be read",)),
    "a list": (lambda p: "[]", ("plan x.json: not a plan of version 1",)),
    "version 2": (lambda p: p.update(version=2), ("plan x.json: not a plan of version 1",)),
    "no groups": (lambda p: p.pop("groups") and None, ("plan x.json: malformed plan", "'groups'")),
    "no keep": (lambda p: p["groups"][GROUP].pop("keep") and None, ("plan x.json: malformed", "'keep'")),
    "unknown group": (lambda p: p["groups"].update(nose=p["groups"][GROUP]), ("nose: the model has no such",)),
    "near group": (
        lambda p: p["groups"].update({f"{LAYER}:stat": p["groups"].pop(GROUP)}),
        (f"{LAYER}:stat: the model has no such dependency group; the nearest is {GROUP}",),
    ),
    "axis of another family": (
        lambda p: p["groups"].update({f"{LAYER}:channel": p["groups"][GROUP]}),
        (":channel: the",),
    ),
    "no group at all": (lambda p: p.update(groups={}), ("the plan keeps every unit: nothing would be removed",)),
    "all kept": (
        lambda p: [g.update(keep=[[*range(STATE)]] * 2) for g in p["groups"].values()] and None,
        ("the plan keeps every unit: nothing would be removed", "sparsity or keep"),
    ),
    "heads uneven": (
        lambda p: p["groups"].update({HEADS: {"before": 2, "keep": [[0], [0, 1]]}}),
        (HEADS, "keeps [1, 2] units; every group needs the same count"),
    ),
    "heads as one set": (
        lambda p: p["groups"].update({HEADS: {"before": 4, "keep": [[0, 1, 2]]}}),
        (HEADS, "the plan starts from 1 x 4 units, the model has 2 x 2"),
    ),
    "no heads": (
        lambda p: p["groups"].update({HEADS: {"before": 2, "keep": [[], []]}}),
        (HEADS, "keeps nothing; at least 1 unit has to stay (to drop whole layers: axis block)"),
    ),
    "no groups kept": (
        lambda p: p["groups"].update({f"{LAYER}:group": {"before": 2, "keep": [[]]}}),
        (f"{LAYER}:group", "keeps nothing", "axis block"),
    ),
    "no hidden units": (
        lambda p: p["groups"].update({"backbone:hidden": {"before": 16, "keep": [[]]}}),
        ("backbone:hidden", "keeps nothing"),
    ),
    "no layers": (
        lambda p: p["groups"].update({"backbone.layers:block": {"before": 2, "keep": [[]]}}),
        ("backbone.layers:block", "keeps nothing"),
    ),
    "words": (lambda p: p["groups"][GROUP].update(keep=[["a"], ["b"]]), ("plan x.json: malformed plan", "'a'")),
    "too high": (lambda p: p["groups"][GROUP].update(keep=[[0, 16], [0, 1]]), (GROUP, "within 0 to 15")),
    "negative": (lambda p: p["groups"][GROUP].update(keep=[[-1, 0], [0, 1]]), (GROUP, "within 0 to 15")),
    "twice": (lambda p: p["groups"][GROUP].update(keep=[[1, 1], [0, 1]]), (GROUP, "must increase")),
    "unequal": (lambda p: p["groups"][GROUP].update(keep=[[0], [0, 1]]), (GROUP, "[1, 2] units", "the same count")),
    "nothing kept": (lambda p: p["groups"][GROUP].update(keep=[[], []]), (GROUP, "at least 1")),
    "one set": (lambda p: p["groups"][GROUP].update(keep=[[0, 1]]), (GROUP, "1 x 16", "the model has 2 x 16")),
    "other size": (lambda p: p["groups"][GROUP].update(before=32, keep=KEEP), (GROUP, "2 x 32", "2 x 16")),
}


@pytest.mark.cover(most=14)
@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, here: Path) -> None:
    change, says = PLANS[case]
    data = json.loads((here / "p.json").read_text())
    text = change(data)
    (here / "x.json").write_text(text if isinstance(text, str) else json.dumps(data))
    refused(here, says, "apply", "model", "--plan", "x.json", "--out", "out")


HYBRID_PLANS: dict[str, tuple[str, dict[str, Any], Says]] = {
    "every attention layer": (
        "nemotron",
        {"model.layers:block": {"before": 5, "keep": [[0, 1, 3, 4]]}},
        ("the plan drops every attention layer; one has to stay", "ignore 'model.layers.2"),
    ),
    "every shared block": (
        "zamba2",
        {"model.layers:block": {"before": 5, "keep": [[0, 2]]}},
        ("the plan drops every attention layer; one has to stay",),
    ),
    "every mixer": (
        "nemotron",
        {"model.layers:block": {"before": 5, "keep": [[1, 2, 4]]}},
        ("the plan drops every mixer; one has to stay", "ignore 'model.layers.3"),
    ),
    "hidden in eights": (
        "nemotron",
        {"model:hidden": {"before": 24, "keep": [[*range(20)]]}},
        ("model:hidden: keeps 20 units; the model's code needs a multiple of 8",),
    ),
    "heads of a group": (
        "zamba2",
        {"model.layers.0.mamba:head": {"before": 2, "keep": [[0, 1], [1]]}},
        ("model.layers.0.mamba:head", "[1, 2] units; every group needs the same count"),
    ),
    "channels of a head": (
        "zamba2",
        {"model.layers.0.mamba:head_dim": {"before": 4, "keep": [[0], [1], [2], [0, 3]]}},
        ("model.layers.0.mamba:head_dim", "[1, 2] units"),
    ),
    "a shared block under its other name": (
        "zamba2",
        {"model.layers.4.shared_transformer.feed_forward:mlp": {"before": 10, "keep": [[0]]}},
        ("model.layers.4.shared_transformer.feed_forward:mlp: the model has no such", "feed_forward:mlp"),
    ),
    "channels of zero": (
        "mamba",
        {f"{LAYER}:channel": {"before": 16, "keep": [[]]}},
        (f"{LAYER}:channel: keeps nothing", "axis block"),
    ),
}


@pytest.mark.slow
@pytest.mark.cover(most=8)
@pytest.mark.parametrize("mode", ["slice", "mask"])
@pytest.mark.parametrize("case", HYBRID_PLANS)
def test_plans_of_hybrids(case: str, mode: str, here: Path) -> None:
    model, groups, says = HYBRID_PLANS[case]
    (here / "x.json").write_text(json.dumps({"version": 1, "groups": groups}))
    refused(here, says, "apply", model, "--plan", "x.json", "--out", "out", "--mode", mode)


@pytest.mark.parametrize("model", ["other", "wide"])
def test_a_plan_or_scores_of_another_model(model: str, here: Path) -> None:
    says = ("the plan was made for another model", "make a plan for this one")
    refused(here, says, "apply", model, "--plan", "p.json", "--out", "out")
    says = says if model == "other" else (GROUP, "scores of shape (2, 16) do not fit this model; score it again")
    refused(here, says, "plan", model, "--scores", "s.safetensors", "--out", "x.json")


@pytest.mark.slow
def test_missing_and_damaged_steps(here: Path) -> None:
    apply, plan = ["apply", "model", "--out", "out", "--plan"], ["plan", "model", "--out", "x.json", "--scores"]
    refused(here, ("plan no.json: cannot be read", "No such file"), *apply, "no.json")
    refused(here, ("mode 'slim': must be slice or mask",), *apply, "p.json", "--mode", "slim")
    refused(here, ("keep 0: must be at least 1",), *plan, "s.safetensors", "--keep", 0)
    refused(here, ("scores no: no such file",), *plan, "no")
    good = (here / "s.safetensors").read_bytes()
    for data in b"", good[:20], good[:-1], b"junk" * 99:
        (here / "bad").write_bytes(data)
        refused(here, ("scores bad: not a readable safetensors file", "score again"), *plan, "bad")
    for keys, says in (
        ([], ("bad", "score again")),
        ([GROUP, "m:head"], ("m:head: scores of shape (2, 16) do not fit this model", "score it again")),
        ([HEADS], (f"{HEADS}: scores of shape (2, 16) do not fit this model",)),
        (["m:state"], ("m:state", "do not fit this model")),
    ):
        save_file({key: torch.ones(2, STATE) for key in keys}, here / "bad")
        refused(here, says, *plan, "bad")


GOOD = """
import torch, sspruner
class Mine(sspruner.Scorer):
    name, axes, needs = "mine", {"state"}, "activations"
    def observe(self, view):
        assert view.C.shape[2:] == (view.group.groups, view.group.units)
        self.shape = view.group.groups, view.group.units
    def importance(self):
        return torch.ones(self.shape)
@sspruner.hookimpl
def sspruner_scorers():
    return [Mine]
"""

# what is wrong: (old, new) in a good plugin, and what the error says. Every error names the plugin's file.
PLUGINS: dict[str, tuple[str, str, Says]] = {
    "syntax": ("class Mine", "clas Mine", ("import failed: SyntaxError", "line 3")),
    "import": ("import torch", "import torhc, torch", ("import failed: ModuleNotFoundError", "torhc")),
    "raises at import": ("class Mine", "raise OSError('a\\nb')\nclass Mine", ("import failed: OSError: a",)),
    "no hook": ("@sspruner.hookimpl", "", ("implements no hook", "sspruner_scorers", "@sspruner.hookimpl")),
    "wrong signature": ("sspruner_scorers()", "sspruner_scorers(model)", ("sspruner_scorers",)),
    "hook raises": ("return [Mine]", "return [1 / 0]", ("sspruner_scorers failed: ZeroDivisionError",)),
    "no list": ("return [Mine]", "return None", ("sspruner_scorers failed: TypeError",)),
    "no scorer": ("[Mine]", "[3]", ("returned 3, not a subclass of sspruner.Scorer",)),
    "clash": ('"mine"', '"ghost"', ("scorer 'ghost': offered by plugin 'ghost' and by plugin", "rename one")),
    "no name": ('name, axes, needs = "mine",', "axes, needs =", ("scorer Mine does not define name",)),
    "no method": ("def observe", "def observes", ("scorer Mine does not define observe",)),
    "unknown needs": ('"activations"', '"gradient"', ("needs='gradient'; known: weights, activations, gradients",)),
    "shape": ("torch.ones(self.shape)", "torch.ones(3)", (GROUP, "returned (3,)", "(groups, units) = (2, 16)")),
    "nan": ("torch.ones(self.shape)", "torch.ones(self.shape) * torch.nan", (GROUP, "32 of 32 values", "NaN")),
    "no tensor": ("torch.ones(self.shape)", "[1.0]", (GROUP, "returned list, expected a tensor")),
    "raises late": ("return torch.ones", "1 / 0\n        return torch.ones", (GROUP, "ZeroDivisionError")),
    "raises": ("self.shape = ", "self.shape = 1 / 0,", (LAYER, "scorer 'mine'", "ZeroDivisionError")),
    "weights only": ('"activations"', '"weights"', (LAYER, "does not need activations read them")),
    "no gradients": ("view.C.shape[2:]", "view.gradients", (LAYER, "set needs='gradients'")),
    "other axis": ('{"state"}', '{"head"}', ("'mine' does not score axis 'state'; it scores head",)),
}


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Writes a plugin file; whatever plugins the test loads are forgotten after it."""
    plugins = plugin_manager()
    installed = {name for name, _ in plugins.list_name_plugin()}

    def write(source: str) -> Path:
        path = tmp_path_factory.mktemp("plugin") / "mine.py"
        path.write_text(source, encoding="utf-8")
        return path

    yield write
    for name, module in plugins.list_name_plugin():
        if name not in installed:
            plugins.unregister(module)


@pytest.mark.cover(most=20)
@pytest.mark.parametrize("case", PLUGINS)
def test_plugins(case: str, here: Path, plugin: Callable[[str], Path]) -> None:
    old, new, says = PLUGINS[case]
    assert GOOD.count(old) == 1
    path = plugin(GOOD.replace(old, new))
    where = () if case == "other axis" else (str(path),)
    prune(here, (*where, *says), "--plugin", path, "--scorer", "ghost" if case == "clash" else "mine")


@pytest.mark.slow
def test_the_good_plugin_works(here: Path, plugin: Callable[[str], Path]) -> None:
    path = plugin(GOOD)
    done("prune", "model", "--samples", 2, "--seq-len", 32, "--plugin", path, "--scorer", "mine", "--out", "out")
    assert (here / "out" / "config.json").is_file()
    cells = "".join(done("scorers", "--plugin", path).stdout.replace("│", "").split())  # the path may be folded
    assert f"minestateactivations{path}" in cells


# Models and text that give nothing to go by


def constant(model: torch.nn.Module, kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model and tokens by which nothing varies: activations of zero, or the same token everywhere."""
    with torch.no_grad():
        if kind == "zero":
            model.get_input_embeddings().weight.zero_()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    return model, torch.full((4, 19), 3)


SHIPPED = {name: cls for name, (cls, _) in installed_scorers().items()}


@pytest.mark.ci_cover(most=24)
@pytest.mark.cover(most=3)
@pytest.mark.parametrize("kind", ["zero", "one token"])
@pytest.mark.parametrize("family", ["mamba2", "mamba", "zamba2"])
@pytest.mark.parametrize("name", [n for n, cls in SHIPPED.items() if cls.needs != "weights" and ":" not in n])
def test_constant_activations_give_finite_scores(name: str, family: str, kind: str) -> None:
    """Also where nothing is active at all; and all options of the kind `variant`."""
    model, ids = constant(zoo(family), kind)
    graph = sspruner.trace(model)
    axes = [a for a in (*graph.axes, *{g.axis for g in graph.elements.values()}) if a in SHIPPED[name].axes]
    if (name == "sparsessm" and family != "mamba") or (name == "balanced" and family == "mamba"):
        axes = []
    variants = {"ghost": [{"variant": v} for v in ("joint", "means", "output")],
                "balanced": [{"weights": w} for w in ("output", "none")],
                "taylor": [{"order": o} for o in ("first", "second", "fisher")]}  # fmt: skip
    for options in variants.get(name, [{}]) if axes else []:
        found = sspruner.score(model, name, axis=axes, calibration=calibrated(ids), options=options)
        assert {group.rpartition(":")[2] for group in found.importance} == set(axes)
        for importance in found.importance.values():
            assert importance.isfinite().all()


@pytest.mark.parametrize("scorer", ["flap", "ghost", "wanda", "last"])
def test_a_single_token(scorer: str) -> None:
    """A variance of one token is none; other statistics have something to say."""
    ids = torch.tensor([[5, 6]])
    data = calibrated(ids, torch.tensor([[True, False]]))
    model, axis = zoo("mamba2"), "head" if scorer == "flap" else "state"
    if scorer == "flap":
        with pytest.raises(sspruner.InputError, match=r"flap' on .*:head: a variance needs at least 2 calibration tok"):
            sspruner.score(model, scorer, axis=axis, calibration=data)
    else:
        for importance in sspruner.score(model, scorer, axis=axis, calibration=data).importance.values():
            assert importance.isfinite().all()


@pytest.mark.parametrize("scorer", ["taylor", "snip", "gradmag"])
@pytest.mark.parametrize("job", ["score", "prune"])
def test_gradients_of_a_model_that_has_none(scorer: str, job: str) -> None:
    """By the parameter's name, before anything runs; scorers that need no gradients are not told so."""
    with torch.inference_mode():
        model = zoo("mamba2")
    ran: list[object] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda *args: ran.append(args) and None)
    axis = "weight" if scorer == "gradmag" else "state"
    message = (
        r"backbone\.embeddings\.weight: made under torch\.inference_mode\(\), so that it has no gradient; "
        "use a scorer that needs only weights or activations"
    )
    with pytest.raises(sspruner.ModelError, match=message):
        getattr(sspruner, job)(model, scorer, axis=axis, calibration=tokens())
    assert not ran


def test_gradients_under_inference_mode() -> None:
    model = zoo("mamba2")
    with torch.inference_mode():
        inside = sspruner.score(model, "taylor", calibration=tokens())
        with pytest.raises(sspruner.InputError, match="leave it first"):
            check_differentiable(model)
    outside = sspruner.score(model, "taylor", calibration=tokens())
    assert all(torch.equal(value, outside.importance[name]) for name, value in inside.importance.items())


def test_text_in_which_nothing_is_predicted() -> None:
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]])
    with pytest.raises(sspruner.InputError, match="no two tokens follow each other, so that nothing is predicted"):
        sspruner.score(zoo("mamba2"), "taylor", calibration=calibrated(ids, mask))
