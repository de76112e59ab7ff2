"""Offload: a model that stays on disk is cut as one in memory is, to the bit, however often the run is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.cli.console import kept_if_interrupted
from sspruner.compute.device import offloaded, resident
from sspruner.errors import InputError, ModelError, PlanError, SSPrunerError
from sspruner.files import journal
from sspruner.files.output import working_folder
from sspruner.io.source import REFERENCES
from sspruner.plans.plan import Plan
from sspruner.recipes.parts import Reconstruction
from support.command import run as cli
from support.examples import examples
from support.native import native_model
from support.native_files import FILES, MIXERS, write
from support.offloaded import TEXT, Interrupted, check_same, check_same_weights, interrupted
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models

Change = Callable[[Any], None]


def pruned(folder: Path, out: Path, *, offload: Path | None, resume: bool = False, **arguments: Any) -> Any:
    """What `prune` makes of the model in a folder, saved in another."""
    model, _ = sspruner.load(folder, offload=offload)
    arguments = {"scorer": "ghost", "sparsity": 0.5, "calibration": TEXT, "samples": 8, **arguments}
    result = sspruner.prune(model, resume=resume, **arguments)
    sspruner.save(result.model, out, result=result)
    return result


def check_prune(model: Any, root: Path, **arguments: Any) -> None:
    """Offloaded or not: the same result, or the same refusal."""
    sspruner.save(model, root / "model")
    try:
        theirs = pruned(root / "model", root / "memory", offload=None, **arguments)
    except SSPrunerError as error:
        with pytest.raises(type(error)):
            pruned(root / "model", root / "disk", offload=root / "working", **arguments)
        return
    ours = pruned(root / "model", root / "disk", offload=root / "working", **arguments)
    check_same(ours, theirs, (root / "disk", root / "memory"))


@pytest.mark.slow
@pytest.mark.ci_cover(families=4)
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_as_in_memory(family, tmp_path):
    check_prune(zoo(family), tmp_path)


@pytest.mark.slow
@examples(20)
@given(data=st.data())
def test_any_cut_is_that_in_memory(data):
    model = data.draw(zoo_models())
    shared = {site.path for site in sspruner.trace(model).sites if site.aliases}
    groups = sspruner.trace(model).groups.values()
    axes = {g.axis for g in groups if not g.blocks and g.axis != "hidden"} - {
        g.axis for g in groups if g.layer in shared
    }
    arguments = {
        "axis": data.draw(st.sampled_from(sorted(axes))),
        "scorer": data.draw(st.sampled_from(["ghost", "magnitude", "wanda", "random", "balanced"])),
        "sparsity": data.draw(st.sampled_from([0.25, 0.5, 0.75])),
        "one_shot": data.draw(st.booleans()),
        "allocation": data.draw(st.sampled_from(["uniform", "global"])),
        "seed": data.draw(st.integers(0, 2**16)),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    with tempfile.TemporaryDirectory() as root:
        check_prune(model.to(dtype), Path(root), **arguments)


@pytest.mark.slow
def test_several_axes_in_one_plan(tmp_path):
    check_prune(
        zoo("bamba"), tmp_path, scorer="magnitude", axis={"state": 0.5, "head": 0.5, "mlp": 0.25}, sparsity=None
    )


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "falcon_h1", "jamba", "nemotron_h"])
def test_a_cut_model_is_cut_again(family, tmp_path):
    """From its own folder: sizes by layer, weights out of reach of stock classes, buffers that were cut."""
    model = zoo(family)
    graph = sspruner.trace(model)
    first = next(iter(graph.on_axis("state")))
    plan = half(graph)
    sspruner.apply(model, Plan({first: plan.groups[first]}))
    check_prune(model, tmp_path, scorer="magnitude", multiple_of=1)


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize("mixer", [MIXERS[0], MIXERS[2]], ids=["Mamba2", "Mamba1"])
@pytest.mark.parametrize("file", FILES)
def test_a_native_checkpoint(mixer, file, tmp_path):
    write(native_model(**mixer), tmp_path / "model", file)
    theirs = pruned(tmp_path / "model", tmp_path / "memory", offload=None)
    ours = pruned(tmp_path / "model", tmp_path / "disk", offload=tmp_path / "working")
    check_same(ours, theirs, (tmp_path / "disk", tmp_path / "memory"))


@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_reads_each_block_when_it_is_called(family, tmp_path):
    """And there is never more than one in memory; what is not offloaded is."""
    sspruner.save(zoo(family), tmp_path)
    dense, _ = sspruner.load(tmp_path)
    model, _ = sspruner.load(tmp_path, offload=tmp_path / "working")
    blocks = offloaded(model)
    most, load = [], blocks._load
    names = [n for n, _ in model.named_parameters() if blocks.block_of(n)]

    def counted(block: str) -> None:
        load(block)
        most.append({blocks.block_of(name) for name in names if not model.get_parameter(name).is_meta})

    blocks._load = counted
    assert torch.equal(logits(model, tokens()), logits(dense, tokens()))
    assert most == [{block} for block in blocks.blocks]
    assert all(model.get_parameter(name).is_meta for name in names)
    assert sspruner.fingerprint(model) == sspruner.fingerprint(dense)
    with resident(model, names[0]):
        assert torch.equal(model.get_parameter(names[0]), dense.get_parameter(names[0]))


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "jamba"])
@pytest.mark.parametrize("scorer", ["ghost", "magnitude", "balanced"])
def test_an_interrupted_run_goes_on_and_ends_the_same(family, scorer, tmp_path):
    """Interrupted again and again, after every second file: a cut block is two, itself and the streams."""
    if scorer == "balanced" and family == "jamba":
        pytest.skip("Mamba1's states have no basis of their own")
    sspruner.save(zoo(family), tmp_path / "model")
    whole = pruned(tmp_path / "model", tmp_path / "whole", offload=tmp_path / "a", scorer=scorer)
    scored: list[str] = []
    for _ in range(100):
        with interrupted(2), contextlib.suppress(Interrupted):
            parts = pruned(tmp_path / "model", tmp_path / "parts", offload=tmp_path / "b", scorer=scorer, resume=True)
            break
        scored.append("interrupted")
    layers = len(offloaded(whole.model).blocks)
    assert len(scored) >= layers - 1  # each of them wrote no more than two files
    check_same(parts, whole, (tmp_path / "parts", tmp_path / "whole"))
    check_same_weights(tmp_path / "parts", tmp_path / "whole")


RECONSTRUCT = {"refit": "reconstruct", "reconstruction": Reconstruction(refit_steps=6, refit_windows=8)}


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["ghost", "balanced"])
def test_a_reconstruction_goes_on_and_ends_as_in_memory(scorer, tmp_path, monkeypatch):
    """Interrupted after every second file. On disk calibration text alone is held out, so that it is here."""
    monkeypatch.setattr("sspruner.pruning.refit.own_text", lambda *_: None)
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    how = {"scorer": scorer, **RECONSTRUCT}
    theirs = pruned(tmp_path / "model", tmp_path / "memory", offload=None, **how)
    for _ in range(100):
        with interrupted(2), contextlib.suppress(Interrupted):
            ours = pruned(tmp_path / "model", tmp_path / "disk", offload=tmp_path / "w", resume=True, **how)
            break
    assert ours.report.refit["errors"] == theirs.report.refit["errors"]
    assert any(after < before for before, after in ours.report.refit["errors"].values())
    check_same(ours, theirs, (tmp_path / "disk", tmp_path / "memory"))


KILLED = """
import os, signal, sys
import torch
import sspruner
from sspruner.files import journal

torch.set_num_threads(1)
folder, writes, torn = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "torn"
real, made = journal.save_file, []

def save_file(tensors, path, *more):
    made.append(path)
    if len(made) == writes and torn:  # half a file, and gone
        real(tensors, path, *more)
        os.truncate(path, os.path.getsize(path) // 2)
    if len(made) == writes:
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path, *more)

journal.save_file = save_file
model, _ = sspruner.load(f"{folder}/model", offload=f"{folder}/w")
tokens = torch.load(f"{folder}/tokens.pt")
how = {"refit": "reconstruct", "refit_steps": 6, "refit_windows": 8, "samples": 8, "sparsity": 0.5}
result = sspruner.prune(model, "ghost", calibration=tokens, resume=writes != 5, **how)
sspruner.save(result.model, f"{folder}/disk", result=result)
"""


@pytest.mark.slow
def test_a_reconstruction_that_is_killed_goes_on_and_ends_the_same(tmp_path):
    """kill -9 in the middle of a file, the stream behind the first block; then before a file of the next."""
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    torch.save(TEXT, tmp_path / "tokens.pt")
    whole = pruned(tmp_path / "model", tmp_path / "whole", offload=tmp_path / "a", scorer="ghost", **RECONSTRUCT)
    kills = [("5", "torn"), ("2", "clean"), ("1000", "")]
    codes = [
        subprocess.run([sys.executable, "-c", KILLED, tmp_path, *how], capture_output=True, text=True) for how in kills
    ]
    assert [run.returncode for run in codes] == [-signal.SIGKILL] * 2 + [0], codes[-1].stderr
    check_same_weights(tmp_path / "disk", tmp_path / "whole")
    assert whole.plan.updates


def test_finished_blocks_are_not_observed_again(tmp_path):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    with interrupted(2), pytest.raises(Interrupted):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", scorer="ghost")
    seen: list[str] = []
    pruned(
        tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", resume=True,
        progress=lambda phase, *_: seen.append(phase),
    )  # fmt: skip
    assert "scoring backbone.layers.1" not in seen
    assert "scoring backbone.layers.2" in seen


@pytest.mark.cover(most=2)
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"sparsity": 0.25}, {"scorer": "magnitude"}, {"calibration": tokens(12, 19, 1)}, {"keep": 2}]
)
def test_another_run_is_not_resumed(other, tmp_path):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    with interrupted(2), pytest.raises(Interrupted):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w")
    other = {**({"sparsity": None} if "keep" in other else {}), **other}
    with pytest.raises(InputError, match="another run"):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", resume=True, **other)
    anew = pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", **other)
    theirs = pruned(tmp_path / "model", tmp_path / "memory", offload=None, **other)
    check_same(anew, theirs, (tmp_path / "out", tmp_path / "memory"))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    """That of the model itself, say: starting anew empties the folder."""
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(InputError, match="a folder of its own"):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "model")
    assert {file: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


@pytest.mark.slow
def test_a_model_that_was_cut_is_saved_before_it_is_cut_again(tmp_path):
    """Its blocks lie in the working folder, which another run would empty."""
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    result = pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w")
    with pytest.raises(InputError, match="save it, and load that"):
        sspruner.prune(result.model, "magnitude", axis="head", sparsity=0.5, calibration=TEXT, samples=8)
    assert torch.equal(logits(result.model, tokens()), logits(sspruner.load(tmp_path / "out")[0], tokens()))


@pytest.mark.slow
def test_for_a_target(tmp_path):
    check_prune(zoo("mamba2"), tmp_path, keep=4, sparsity=None, target="hf")


def test_a_damaged_journal_is_named(tmp_path):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    with interrupted(2), pytest.raises(Interrupted):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w")
    (tmp_path / "w" / "walk.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"walk\.safetensors"):
        pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", resume=True)


@pytest.mark.slow
def test_a_full_disk_leaves_what_is_finished(tmp_path, monkeypatch):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    save, files = journal.save_file, []

    def full(tensors: Any, file: Path, *rest: Any) -> None:
        if len(files) == 5:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        files.append(file)
        save(tensors, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "save_file", full)
        with pytest.raises(InputError, match=r"No space left on device.*--resume"):
            pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "w").glob("*.part"))
    ours = pruned(tmp_path / "model", tmp_path / "out", offload=tmp_path / "w", resume=True)
    theirs = pruned(tmp_path / "model", tmp_path / "memory", offload=None)
    check_same(ours, theirs, (tmp_path / "out", tmp_path / "memory"))


REFUSED: dict[str, dict[str, Any]] = {
    "mode mask": {"mode": "mask"},
    "refit output runs dense blocks": {"refit": "output"},
    "compared": {"scorer": "auto"},
    "adaptive": {"allocation": "adaptive"},
    "limits of damage": {"sparsity": None, "limits": sspruner.Limits(perplexity_increase=0.1)},
    "gradients": {"scorer": "taylor"},
    "changes weights": {"scorer": "flap", "axis": "head"},
    "whole model": {"axis": "hidden", "scorer": "magnitude"},
    "single elements": {"axis": "weight", "scorer": "magnitude"},
    "sampling": {"calibration": "self"},
}


@pytest.mark.cover
@pytest.mark.parametrize("why", REFUSED)
def test_what_needs_the_whole_model_is_refused(why, tmp_path):
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    model, _ = sspruner.load(tmp_path / "model", offload=tmp_path / "w")
    arguments = {"scorer": "ghost", "sparsity": 0.5, "calibration": TEXT, "samples": 8, **REFUSED[why]}
    with pytest.raises(InputError, match=why):
        sspruner.prune(model, **arguments)
    assert not (tmp_path / "w").exists()


def test_what_several_layers_share_is_refused(tmp_path):
    sspruner.save(zoo("zamba2"), tmp_path / "model")
    model, _ = sspruner.load(tmp_path / "model", offload=tmp_path / "w")
    with pytest.raises(InputError, match="several layers share"):
        sspruner.prune(model, "magnitude", axis="mlp", sparsity=0.5, calibration=TEXT, samples=8)


def test_nothing_else_changes_an_offloaded_model(tmp_path):
    """A mask that is written to weights on disk would be lost, and damage measured as none."""
    sspruner.save(zoo("mamba2"), tmp_path / "model")
    model, _ = sspruner.load(tmp_path / "model", offload=tmp_path / "w")
    plan = half(sspruner.trace(model))
    for refused in (
        lambda: sspruner.apply(model, plan),
        lambda: sspruner.apply(model, plan, "mask"),
        lambda: sspruner.export(model, tmp_path / "export"),
        lambda: sspruner.compare(model, ["magnitude"], sparsities=[0.5], calibration=TEXT),
    ):
        with pytest.raises((PlanError, ModelError)):
            refused()
    with pytest.raises(InputError, match="load it with offload"):
        sspruner.prune(zoo("mamba2"), calibration=TEXT, samples=8, resume=True)


def spoiled(folder: Path, change: Change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["backbone.layers.1.mixer.A_log", "backbone.embeddings.weight"])
def test_incomplete_and_damaged_weights_are_named(name, tmp_path):
    """At the latest when the block is read; nothing is written."""
    for change, message in (
        (lambda w: w.pop(name), name),
        (lambda w: w.__setitem__(name, w[name][..., :-1].contiguous()), name),
        (lambda w: w[name].fill_(torch.nan), f"{name}: .* NaN"),
    ):
        with tempfile.TemporaryDirectory() as root:
            sspruner.save(tiny_model(), Path(root) / "model")
            spoiled(Path(root) / "model", change)
            with pytest.raises(ModelError, match=message):
                pruned(Path(root) / "model", Path(root) / "out", offload=Path(root) / "w")
            assert not (Path(root) / "out").exists()


KILLER = """
import os
from pathlib import Path
import torch
import sspruner

class Killer(sspruner.Scorer):
    name, axes, needs = "killer", {"state"}, "activations"
    def observe(self, view):
        self.sum = getattr(self, "sum", 0) + view.B.float().abs().sum((0, 1))
        if view.layer == "backbone.layers.3.mixer" and not Path(os.environ["MARK"]).exists():
            Path(os.environ["MARK"]).touch()
            os.kill(os.getpid(), 9)
    def importance(self):
        return self.sum

@sspruner.hookimpl
def sspruner_scorers():
    return [Killer]
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_process_goes_on_from_the_command_line(tmp_path):
    """kill -9 in the middle of the walk; then the same command with --resume, and one that was never killed."""
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    model = str(REFERENCES / "mamba2-books-4m")
    command = [
        sys.executable, "-m", "sspruner", "prune", model, "--scorer", "killer", "--plugin", str(tmp_path / "killer.py"),
        "--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--seq-len", "48", "--offload",
    ]  # fmt: skip
    environment = {**os.environ, "MARK": str(tmp_path / "mark")}
    out = tmp_path / "out"

    def run(*more: str) -> Any:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)

    killed = run("--out", str(out))
    assert killed.returncode == -9
    assert not out.exists()
    assert (working_folder(out) / "walk.safetensors").is_file()
    resumed = run("--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert not working_folder(out).exists()
    never = run("--out", str(tmp_path / "never"))
    assert never.returncode == 0, never.stderr
    check_same_weights(out, tmp_path / "never")
    assert Plan.load(out / "plan.json") == Plan.load(tmp_path / "never" / "plan.json")


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys):
    """Where nothing is finished yet, as any other command."""
    for working in (None, tmp_path / "none"):
        with pytest.raises(KeyboardInterrupt), kept_if_interrupted(working):
            raise KeyboardInterrupt
    with pytest.raises(SystemExit) as exit_, kept_if_interrupted(tmp_path):
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert f"{tmp_path}: go on with --resume" in capsys.readouterr().err


def test_the_command_line_says_what_is_missing(tmp_path):
    for arguments, message in (
        (["--offload"], "add --out DIR"),
        (["--resume", "--out", str(tmp_path / "out")], "add that, too"),
        (["--offload", "--out", str(tmp_path / "out")], "give a text file"),
    ):
        result = cli("prune", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
