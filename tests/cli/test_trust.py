"""Nothing that lies in a folder is run, unless the user says so."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from support.command import TEXT, done, refused, run, saved_model
from support.native import native_model
from support.native_files import MIXERS, write

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import Mamba2Config, Mamba2ForCausalLM
class OwnConfig(Mamba2Config):
    model_type = "own"
class OwnMamba2(Mamba2ForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OPTION = "--trust-remote-code"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def marker(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code of `own` and `own_tokenizer` makes. Modules that transformers copies lie beside it."""
    folder = tmp_path_factory.mktemp("ran")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder / "marker"


@pytest.fixture
def own(tmp_path: Path, marker: Path) -> Path:
    """A folder whose model is of code that lies in it."""
    folder = saved_model(tmp_path / "own")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnMamba2"},
    )
    return folder


@pytest.fixture
def own_tokenizer(tmp_path: Path, marker: Path) -> Path:
    """A tokenizer of code that lies in its folder."""
    folder = saved_model(tmp_path / "own_tokenizer")
    (folder / "words.py").write_text(TOKENIZER.format(marker=str(marker)))
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "words.OwnTokenizer"]},
    )
    (folder / "config.json").unlink()
    return folder


CHEAP = ("--samples", 2, "--seq-len", 32, "--calibration", "text.txt")
COMMANDS: dict[str, tuple[object, ...]] = {
    "prune": (*CHEAP, "--scorer", "magnitude", "--out", "out"),
    "score": (*CHEAP, "--scorer", "magnitude", "--out", "s.safetensors"),
    "plan": ("--scores", "scores.safetensors", "--out", "p.json"),
    "apply": ("--plan", "plan.json", "--out", "out"),
    "compare": (*CHEAP, "--scorer", "magnitude", "--sparsity", 0.5, "--json", "c.json"),
    "export": ("--to", "sspruner", "--out", "out"),
    "inspect": ("--json", "i.json"),
}


@pytest.fixture
def here(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with scores and a plan for the weights of `own`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 30)
    model = sspruner.load(saved_model(tmp_path / "stock"))[0]
    scores = sspruner.score(model, "magnitude")
    scores.save("scores.safetensors")
    sspruner.plan(sspruner.trace(model), scores, keep=4).save("plan.json")
    return tmp_path


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_the_folder_runs_only_if_it_is_trusted(command: str, here: Path, own: Path, marker: Path) -> None:
    refused(here, ("needs code of its own", OPTION), command, own, *COMMANDS[command])
    assert not marker.exists()
    result = run(command, own, *COMMANDS[command], OPTION)
    assert (result.exit_code, result.exception) == (0, None), result.stderr
    assert marker.exists()


def test_the_tokenizers_code_likewise(here: Path, own_tokenizer: Path, marker: Path) -> None:
    args = ("export", "stock", *COMMANDS["export"], "--tokenizer", own_tokenizer)
    refused(here, ("tokenizer", "needs code of its own", OPTION), *args)
    assert not marker.exists()
    done(*args, OPTION)
    assert marker.exists()


def test_stock_code_is_taken_where_there_is_some(tmp_path: Path, own: Path, marker: Path) -> None:
    """A type that transformers knows, with code beside it: the code is not run."""
    edit(own / "config.json", model_type="mamba2")
    assert type(sspruner.load(own)[0]).__module__.startswith("transformers.models.mamba2")
    assert not marker.exists()


@pytest.mark.slow
def test_custom_generation_and_chat_templates_are_not_run(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 30)
    monkeypatch.chdir(tmp_path)
    folder = saved_model(tmp_path / "model")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)) + "generate = None\n")
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    )
    done("prune", folder, *COMMANDS["prune"][:-1], tmp_path / "out")
    assert not marker.exists()


@pytest.mark.slow
def test_nobody_is_asked_on_a_terminal(own: Path, marker: Path) -> None:
    """transformers would ask, if trust_remote_code were left open."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "sspruner", "inspect", str(own)]
    result = subprocess.run(command, stdin=slave, capture_output=True, text=True, timeout=60)
    os.close(master)
    os.close(slave)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert OPTION in result.stderr
    assert "[y/N]" not in result.stderr
    assert not marker.exists()


class Payload:
    """What a malicious pickle runs when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_run(layout: str, zipped: bool, tmp_path: Path, marker: Path) -> None:
    """Trusted code does not make a pickle trusted."""
    if layout == "hf":
        folder = saved_model(tmp_path / "model")
        (folder / "model.safetensors").unlink()
    else:
        folder = write(native_model(**MIXERS[0]), tmp_path / "model")
    bad = folder / "pytorch_model.bin"
    torch.save({"backbone.embeddings.weight": Payload(marker)}, bad, _use_new_zipfile_serialization=zipped)
    for trust in (False, True):
        with pytest.raises(sspruner.ModelError, match=r"model .*model"):
            sspruner.load(folder, trust_remote_code=trust)
    assert not marker.exists()
    torch.load(bad, weights_only=False)  # it would have
    assert marker.exists()


@pytest.mark.cover(most=3)
@pytest.mark.parametrize("weights", ["..", "../other", "/etc", "weights/../..", "weights/", 3, ["weights"], None])
def test_a_record_names_no_folder_of_weights_but_ours(weights: object, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    saved_model(tmp_path / "other", seed=1)
    record = {"version": 1, "cuts": [], "stock": {}, "weights": weights}
    edit(folder / "config.json", sspruner=record)
    with pytest.raises(sspruner.ModelError, match="'weights' is"):
        sspruner.load(folder)


def test_links_to_weights_elsewhere_are_fine(tmp_path: Path) -> None:
    """As in the cache of the hub."""
    folder = saved_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert sspruner.load(folder)[0] is not None
