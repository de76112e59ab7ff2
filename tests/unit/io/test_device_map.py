"""Device maps: a model whose blocks lie in memory and on disk is cut as one in memory is, to the bit."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.compute.device import offloaded
from sspruner.errors import InputError
from sspruner.evaluation.evaluate import evaluate
from sspruner.io import load as load_module
from sspruner.training.distil import distil
from sspruner.training.gradual import gradual
from sspruner.training.twist import twist
from support.command import run as cli
from support.examples import examples
from support.native import native_model
from support.native_files import FILES, MIXERS, write
from support.offloaded import TEXT, Interrupted, check_same, check_same_weights, interrupted
from support.tiny import logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo

Map = dict[str, Any]


def alternating(model: Any) -> Map:
    """Every second block in memory, the others on disk; the rest of the model wherever."""
    path = sspruner.trace(model).blocks
    count = len(model.get_submodule(path))
    return {"": "disk"} | {f"{path}.{i}": "cpu" for i in range(0, count, 2)}


def pruned(folder: Path, out: Path, device_map: Any, working: Path, *, resume: bool = False, **arguments: Any) -> Any:
    """What `prune` makes of the model in a folder, saved in another. device_map None: all of it in memory."""
    offload = None if device_map is None else working
    model, _ = sspruner.load(folder, device_map=device_map, offload=offload)
    arguments = {"scorer": "ghost", "sparsity": 0.5, "calibration": TEXT, "samples": 8, **arguments}
    result = sspruner.prune(model, resume=resume, **arguments)
    sspruner.save(result.model, out, result=result)
    return result


@pytest.mark.ci_cover(families=3)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_as_in_memory(family, tmp_path):
    model = zoo(family)
    sspruner.save(model, tmp_path / "model")
    theirs = pruned(tmp_path / "model", tmp_path / "memory", None, tmp_path)
    ours = pruned(tmp_path / "model", tmp_path / "apart", alternating(model), tmp_path / "w")
    assert offloaded(ours.model).homes
    check_same(ours, theirs, (tmp_path / "apart", tmp_path / "memory"))


@pytest.mark.slow
def test_a_reconstruction_is_that_in_memory(tmp_path, monkeypatch):
    """Of blocks in several places, which are not sampled from: calibration text alone is held out, here, too."""
    monkeypatch.setattr("sspruner.pruning.refit.own_text", lambda *_: None)
    model = tiny_model(layers=3)
    sspruner.save(model, tmp_path / "model")
    how = {"scorer": "magnitude", "refit": "reconstruct", "refit_steps": 6, "refit_windows": 8}
    theirs = pruned(tmp_path / "model", tmp_path / "memory", None, tmp_path, **how)
    ours = pruned(tmp_path / "model", tmp_path / "apart", alternating(model), tmp_path / "w", **how)
    assert theirs.plan.updates
    check_same(ours, theirs, (tmp_path / "apart", tmp_path / "memory"))


@pytest.mark.slow
@examples(15)
@given(data=st.data())
def test_any_map_any_cut(data):
    """Which blocks are where makes no difference, and neither does the form in which a map says so."""
    layers = data.draw(st.integers(1, 4))
    model = tiny_model(layers=layers, groups=2, seed=data.draw(st.integers(0, 99)))
    places = data.draw(
        st.lists(st.sampled_from(["cpu", "disk", torch.device("cpu")]), min_size=layers, max_size=layers)
    )
    default = data.draw(st.sampled_from(["cpu", "disk"]))
    device_map = {f"backbone.layers.{i}": place for i, place in enumerate(places) if str(place) != default}
    device_map[data.draw(st.sampled_from(["", "backbone", "backbone.layers"]))] = default
    arguments = {
        "axis": data.draw(st.sampled_from(["state", "head"])),
        "scorer": data.draw(st.sampled_from(["magnitude", "wanda", "random"])),
        "one_shot": data.draw(st.booleans()),
        "allocation": data.draw(st.sampled_from(["uniform", "global"])),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sspruner.save(model.to(dtype), root / "model")
        theirs = pruned(root / "model", root / "memory", None, root, **arguments)
        ours = pruned(root / "model", root / "apart", device_map, root / "w", **arguments)
        check_same(ours, theirs, (root / "apart", root / "memory"))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [MIXERS[0], MIXERS[2]], ids=["Mamba2", "Mamba1"])
def test_a_native_checkpoint(mixer, tmp_path):
    write(native_model(**mixer), tmp_path / "model", FILES[0])
    dense, _ = sspruner.load(tmp_path / "model")
    theirs = pruned(tmp_path / "model", tmp_path / "memory", None, tmp_path)
    ours = pruned(tmp_path / "model", tmp_path / "apart", alternating(dense), tmp_path / "w")
    check_same(ours, theirs, (tmp_path / "apart", tmp_path / "memory"))


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_with_a_home_stay_and_the_others_come_one_by_one(family, tmp_path):
    sspruner.save(zoo(family), tmp_path)
    dense, _ = sspruner.load(tmp_path)
    model, _ = sspruner.load(tmp_path, device_map=alternating(dense))
    blocks = offloaded(model)
    own = [name for name, _ in model.named_parameters() if blocks.block_of(name)]
    stay = {blocks.block_of(name) for name in own if not model.get_parameter(name).is_meta}
    assert stay == set(blocks.homes) == set(blocks.blocks[::2])
    read, load = [], blocks._load
    blocks._load = lambda block: (read.append(block), load(block))
    assert torch.equal(logits(model, tokens()), logits(dense, tokens()))
    assert read == [block for block in blocks.blocks if block not in blocks.homes]
    assert {blocks.block_of(name) for name in own if not model.get_parameter(name).is_meta} == stay
    assert sspruner.fingerprint(model) == sspruner.fingerprint(dense)


def bytes_of(model: Any) -> int:
    """Of the parameters that are in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


@pytest.mark.slow
@given(share=st.floats(0, 1.5), dtype=st.sampled_from(["float32", "bfloat16"]))
@examples(20)
def test_auto_fills_memory_up_to_its_limit(share, dtype):
    """Beside what is in memory one block more has room, from the disk; a model that fits is loaded as ever."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sspruner.save(tiny_model(layers=6), root)
        whole, _ = sspruner.load(root, dtype=dtype)
        limit = int(share * bytes_of(whole))
        model, _ = sspruner.load(root, dtype=dtype, device_map="auto", max_memory={"cpu": limit})
        block = bytes_of(whole.backbone.layers[0])
        outside = bytes_of(whole) - 6 * block
        in_memory = min(6, max(0, (limit - outside) // block))
        if in_memory == 6:
            assert offloaded(model) is None
        else:
            assert len(offloaded(model).homes) == max(0, in_memory - 1)
            assert bytes_of(model) + block <= max(limit, outside + block)
        assert model.dtype == whole.dtype
        assert torch.equal(logits(model, tokens()), logits(whole, tokens()))


def test_auto_takes_most_of_what_is_free():
    """Of these machines: the reference model is small, and loaded as without a map."""
    model, _ = sspruner.load(device_map="auto")
    assert offloaded(model) is None
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_even_with_another_map(tmp_path):
    """A machine with less memory may finish what a larger one began: results are those of every map."""
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    dense, _ = sspruner.load(tmp_path / "model")
    whole = pruned(tmp_path / "model", tmp_path / "whole", {"": "disk"}, tmp_path / "a")
    maps = [alternating(dense), {"": "disk"}, {"": "cpu", "backbone.layers.1": "disk"}]
    for number in range(100):
        with interrupted(2), contextlib.suppress(Interrupted):
            parts = pruned(tmp_path / "model", tmp_path / "parts", maps[number % 3], tmp_path / "b", resume=True)
            break
    assert number > 2
    check_same(parts, whole, (tmp_path / "parts", tmp_path / "whole"))
    check_same_weights(tmp_path / "parts", tmp_path / "whole")
    block = whole.model.get_submodule("backbone.layers.0.mixer.in_proj")
    assert block.weight.is_meta
    assert torch.equal(logits(parts.model, tokens()), logits(sspruner.load(tmp_path / "whole")[0], tokens()))


BAD_MAPS: dict[str, dict[str, Any]] = {
    "must be auto": {"device_map": "balanced"},
    "no place 'gpu'": {"device_map": {"": "gpu"}},
    "no place 7": {"device_map": {"": 7}},
    "says nothing of backbone.layers.1": {"device_map": {"backbone.layers.0": "cpu"}},
    "mixer is a part of backbone.layers.0": {"device_map": {"": "cpu", "backbone.layers.0.mixer": "disk"}},
    "give that, too": {"max_memory": {"cpu": "1GB"}},
    "no place 'attic'": {"device_map": "auto", "max_memory": {"attic": "1GB"}},
    "no place 0": {"device_map": "auto", "max_memory": {0: "1GB"}},
    "apples": {"device_map": "auto", "max_memory": {"cpu": "6 apples"}},
}


@pytest.mark.parametrize("why", BAD_MAPS)
def test_a_wrong_map_is_refused(why, tmp_path):
    if torch.cuda.is_available() and "0" in why:
        pytest.skip("this machine has that place")
    sspruner.save(tiny_model(), tmp_path)
    with pytest.raises(InputError, match=why):
        sspruner.load(tmp_path, **BAD_MAPS[why])


def test_without_accelerate(monkeypatch, tmp_path):
    sspruner.save(tiny_model(), tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    with pytest.raises(InputError, match=r"accelerate: in a clone of sspruner, pip install '\.\[train\]'"):
        sspruner.load(tmp_path, device_map="auto")
    model, _ = sspruner.load(tmp_path, device_map={"": "disk"})  # a map of one's own needs none
    assert offloaded(model)


@pytest.mark.parametrize("asked", [{"device_map": "auto"}, {"offload": "w"}])
def test_one_process(asked, monkeypatch):
    monkeypatch.setattr(load_module, "world", lambda: 2)
    with pytest.raises(InputError, match=f"{next(iter(asked))} works in one process, not in 2"):
        sspruner.load(**asked)


def test_what_needs_the_whole_model_says_so(tmp_path):
    """Nothing is written before."""
    sspruner.save(tiny_model(), tmp_path / "model")
    model, _ = sspruner.load(tmp_path / "model", device_map={"": "disk", "backbone.layers.0": "cpu"})
    whole, out = tiny_model(), tmp_path / "out"
    text: Any = None
    for run in (
        lambda: distil(model, whole, text, out),
        lambda: distil(whole, model, text, out),
        lambda: gradual(model, text, out),
        lambda: gradual(whole, text, out, teacher=model),
        lambda: twist(model, text, out),
        lambda: evaluate(model, text=tokens(2, 12)),
    ):
        with pytest.raises(InputError, match="blocks lie apart; load it without offload and device_map"):
            run()
    with pytest.raises(InputError, match="load it with offload=FOLDER"):
        sspruner.prune(model, "magnitude", sparsity=0.5, calibration=TEXT, samples=8)
    assert not out.exists()


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "jamba"])
def test_every_scorer_scores_a_model_in_pieces_as_a_whole_one(family, tmp_path):
    """Or says that it cannot."""
    sspruner.save(zoo(family), tmp_path)
    whole, _ = sspruner.load(tmp_path)
    model, _ = sspruner.load(tmp_path, device_map=alternating(whole))
    scored = set()

    def scores(of: Any, scorer: str, axis: str) -> Any:
        try:
            return sspruner.score(of, scorer, axis=axis, calibration=TEXT, samples=2).importance
        except InputError as error:
            return str(error)

    for axis in sorted({group.axis for group in sspruner.trace(whole).groups.values()} | {"weight", "decay"}):
        for scorer in ("magnitude", "wanda", "taylor", "ghost", "block-influence", "perplexity-drop"):
            theirs, ours = scores(whole, scorer, axis), scores(model, scorer, axis)
            if isinstance(theirs, str):
                continue  # not an axis of this scorer
            if isinstance(ours, str):
                assert "blocks lie apart" in ours
                continue
            assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
            scored.add((scorer, axis))
    assert scored >= {("ghost", "state"), ("magnitude", "state"), ("wanda", "weight"), ("block-influence", "block")}


ARGUMENTS = ["--axis", "state", "--samples", "2", "--seq-len", "48", "--device-map", "auto"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 60)
    return file


def run(*arguments: str) -> Any:
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_commands(text, tmp_path):
    """`prune` and `score` with half of the model in memory, and without a map."""
    limit = ["--max-memory", "cpu=6MB"]
    common = ["--calibration", str(text), "--no-cache"]
    memory, apart = tmp_path / "memory", tmp_path / "apart"
    run("prune", *ARGUMENTS, *common, "--out", str(memory))
    run("prune", *ARGUMENTS, *common, *limit, "--out", str(apart))
    assert len(list(apart.glob("*.safetensors"))) > len(list(memory.glob("*.safetensors")))
    weights = [sspruner.load(folder)[0].state_dict() for folder in (memory, apart)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    reports = [json.loads((folder / "report.json").read_text()) for folder in (memory, apart)]
    assert reports[0]["pruned"] == reports[1]["pruned"]
    assert not list(tmp_path.glob(".*.working"))
    for name, more in (("memory", []), ("apart", limit)):
        run("score", *ARGUMENTS, *common, *more, "--out", str(tmp_path / f"{name}.safetensors"))
    scores = [sspruner.Scores.load(tmp_path / f"{name}.safetensors").importance for name in ("memory", "apart")]
    assert all(torch.equal(value, scores[1][name]) for name, value in scores[0].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-map", "auto"], "--device-map writes the cut blocks on the way: add --out DIR"),
        (["--device-map", "auto", "--offload", "--out", "OUT"], "give one"),
        (["--device-map", "balanced", "--out", "OUT"], "must be auto"),
        (["--max-memory", "cpu=1GB", "--out", "OUT"], "give that, too"),
        (["--device-map", "auto", "--max-memory", "cpu", "--out", "OUT"], "expected NAME=VALUE"),
        (["--device-map", "auto", "--max-memory", "cpu=much", "--out", "OUT"], "a size such as 25MB"),
        (["--device-map", "auto", "--max-memory", "cpu=6MB", "--out", "OUT"], "give a text file"),
        (["--device-map", "auto", "--max-memory", "cpu=6MB", "--out", "OUT", "--scorer", "taylor"], "gradients"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path):
    arguments = [str(tmp_path / "out") if one == "OUT" else one for one in arguments]
    result = cli("prune", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
