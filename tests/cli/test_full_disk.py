"""A disk that is full, and rights that are missing: one line, exit 2, nothing left behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sspruner
from support.command import TEXT, done, refused, run, saved_model, tree

CHEAP = ("--samples", 2, "--seq-len", 32, "--calibration", "text.txt", "--scorer", "magnitude")
COMMANDS: dict[str, tuple[object, ...]] = {
    "prune": ("prune", "model", *CHEAP, "--out", "out"),
    "prune --json": ("prune", "model", *CHEAP, "--json", "r.json"),
    "score": ("score", "model", "--scorer", "magnitude", "--out", "x.safetensors"),
    "plan": ("plan", "model", "--scores", "scores.safetensors", "--out", "x.json"),
    "apply": ("apply", "model", "--plan", "plan.json", "--out", "out"),
    "compare": ("compare", "model", *CHEAP, "--sparsity", 0.5, "--json", "c.json"),
    "inspect": ("inspect", "model", "--json", "i.json"),
    **{f"export {to}": ("export", "model", "--to", to, "--out", "deep/out")
       for to in ("hf", "hf-padded", "hf-remote", "mamba-ssm", "sspruner")},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, scores and a plan."""
    folder = tmp_path_factory.mktemp("made")
    model = sspruner.load(saved_model(folder / "model"))[0]
    (folder / "text.txt").write_text(TEXT * 30)
    scores = sspruner.score(model, "magnitude")
    scores.save(folder / "scores.safetensors")
    (folder / "scores.safetensors").chmod(0o644)  # safetensors makes files that their owner alone may read
    sspruner.plan(sspruner.trace(model), scores, keep=4).save(folder / "plan.json")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the system's write fails, as on a full disk, in whatever code it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.cover
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str, here: Path) -> None:
    with files_end_at(20):
        refused(here, ("cannot be written", "nothing is left of it"), *COMMANDS[command])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "export mamba-ssm", "export hf"])
@pytest.mark.parametrize("size", [8_000, 200_000])
def test_a_disk_that_fills_up_later(command: str, size: int, here: Path) -> None:
    """In the weights, or in the tokenizer after them."""
    with files_end_at(size):
        refused(here, ("cannot be written", "nothing is left of it"), *COMMANDS[command])


def test_a_full_disk_leaves_an_earlier_model(here: Path) -> None:
    saved_model(here / "old", seed=3)
    with files_end_at(8_000):
        refused(here, ("cannot be written",), *COMMANDS["prune"][:-1], "old", "--overwrite")


def test_a_cache_that_cannot_be_written_is_no_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a file").write_text("")
    args = ("score", "model", *CHEAP[:-1], "ghost", "--out", here / "g.safetensors")
    monkeypatch.setenv("SSPRUNER_CACHE", str(here / "a file" / "below"))
    done(*args)
    monkeypatch.setenv("SSPRUNER_CACHE", "/proc/nowhere")
    done(*args)


@contextmanager
def nobody() -> Iterator[None]:
    """Work as a user without root's rights."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("file", ["model/config.json", "model/model.safetensors", "model/tokenizer.json",
                                  "plan.json", "model", "text.txt", "scores.safetensors"])  # fmt: skip
def test_what_may_not_be_read(file: str, here: Path) -> None:
    command = {"text.txt": "prune --json", "scores.safetensors": "plan"}.get(file, "apply")
    for folder in (here, here.parent, here.parent.parent):
        folder.chmod(0o777)
    before, mode = tree(here), (here / file).stat().st_mode
    (here / file).chmod(0)
    try:
        with nobody():
            result = run(*COMMANDS[command])
    finally:
        (here / file).chmod(mode)
    assert (result.exit_code, result.stdout) == (2, ""), f"{result.output}\n{result.exception!r}"
    assert result.stderr.count("\n") == 1
    assert "ermission denied" in result.stderr
    assert tree(here) == before


@pytest.mark.parametrize("command", ["prune", "plan", "prune --json"])
def test_where_nothing_may_be_written(command: str, here: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    with nobody():
        result = run(*COMMANDS[command][:-1], locked / "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot write in" in result.stderr or "ermission denied" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(locked.iterdir()) == []
