"""Nothing half-written: whatever happens at whatever moment, the target is what it was or whole."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from sspruner import InputError
from sspruner.files.output import atomic_file, atomic_folder, check_file, check_output

EARLIER = {"config.json": b"old", "weights/a.bin": b"older"}
NEW = {"config.json": b"new", "weights/b.bin": b"newer", "plan.json": b"newest"}
LEFTOVERS = {".out.killed/new/config.json": b"half", ".plan.json.1": b"half", "beside.txt": b"not ours"}

errors = st.sampled_from(
    [KeyboardInterrupt(), SystemExit(3), ValueError("bug"), OSError(errno.ENOSPC, "full"), SafetensorError("full")]
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def folders(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()}


@contextmanager
def place() -> Iterator[Path]:
    """A folder that holds what other, killed or concurrent, runs left in it."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), LEFTOVERS)
        yield Path(name)


@contextmanager
def renames_fail(at: int | None, late: bool, error: BaseException) -> Iterator[None]:
    """The rename number `at` raises: before it is done or, if `late`, just after, as an interrupt may."""
    count, real = 0, {name: getattr(os, name) for name in ("rename", "replace")}

    def failing(name: str) -> object:
        def call(*args: object, **kwargs: object) -> None:
            nonlocal count
            count += 1
            if count == at and not late:
                raise error
            real[name](*args, **kwargs)
            if count == at:
                raise error

        return call

    with patch("os.rename", failing("rename")), patch("os.replace", failing("replace")):
        yield


@given(
    earlier=st.sampled_from(["absent", "empty", "model"]),
    nested=st.booleans(),
    written=st.integers(0, len(NEW)),
    error=errors,
)
def test_a_block_that_fails_changes_nothing(earlier: str, nested: bool, written: int, error: BaseException) -> None:
    with place() as here:
        out = here / "a" / "b" / "out" if nested else here / "out"
        if earlier != "absent":
            out.mkdir(parents=True)
            write(out, EARLIER if earlier == "model" else {})
        before = files(here), folders(here)
        expected = InputError if isinstance(error, (OSError, SafetensorError)) else type(error)
        with pytest.raises(expected), atomic_folder(out, overwrite=True) as folder:  # noqa: PT012
            write(folder, dict(list(NEW.items())[:written]))
            raise error
        assert (files(here), folders(here)) == before


@given(
    earlier=st.sampled_from(["absent", "empty", "model"]),
    at=st.none() | st.integers(1, 3),
    late=st.booleans(),
    error=errors,
)
def test_a_folder_is_old_or_new_wherever_a_rename_fails(
    earlier: str, at: int | None, late: bool, error: BaseException
) -> None:
    with place() as here:
        out = here / "out"
        old = EARLIER if earlier == "model" else {}
        if earlier != "absent":
            out.mkdir()
            write(out, old)
        last = 1 if earlier == "absent" else 2
        happens = at is not None and at <= last
        before = files(here), folders(here)
        with renames_fail(at, late, error):
            if happens:
                with pytest.raises(BaseException), atomic_folder(out, overwrite=True) as folder:  # noqa: B017, PT011
                    write(folder, NEW)
            else:
                with atomic_folder(out, overwrite=True) as folder:
                    write(folder, NEW)
        whole = not happens or (late and at == last)
        if whole:
            assert files(out) == NEW
            assert files(here) == LEFTOVERS | {f"out/{name}": data for name, data in NEW.items()}
        else:
            assert (files(here), folders(here)) == before


@given(st.booleans(), st.sampled_from(["", "ab", "abc"]), errors, st.sampled_from(["block", "replace", "late"]))
def test_a_file_is_old_or_new(exists: bool, content: str, error: BaseException, when: str) -> None:
    with place() as here:
        path = here / "plan.json"
        if exists:
            path.write_text("old")
        before = files(here)
        expected = InputError if isinstance(error, (OSError, SafetensorError)) else type(error)
        failing = renames_fail(None if when == "block" else 1, when == "late", error)
        with failing, pytest.raises(expected), atomic_file(path) as temporary:  # noqa: PT012
            temporary.write_text(content)
            if when == "block":
                raise error
        assert files(here) == (before | {"plan.json": content.encode()} if when == "late" else before)
        with atomic_file(path) as temporary:
            temporary.write_text(content)
        assert files(here) == before | {"plan.json": content.encode()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("inner_first", [False, True])
def test_two_writers_at_once(overwrite: bool, inner_first: bool) -> None:
    """Each works in a folder of its own. The one that ends last needs --overwrite like any other."""
    with place() as here:
        writers = [atomic_folder(here / "out", overwrite) for _ in range(2)]
        for i, writer in enumerate(writers):
            write(writer.__enter__(), {"config.json": b"%d" % i})
        first, last = (1, 0) if inner_first else (0, 1)
        writers[first].__exit__(None, None, None)
        with nullcontext() if overwrite else pytest.raises(InputError, match="add --overwrite"):
            writers[last].__exit__(None, None, None)
        assert files(here) == LEFTOVERS | {"out/config.json": b"%d" % (last if overwrite else first)}


@pytest.mark.parametrize(
    ("kind", "overwrite", "says"),
    [
        ("file", False, "is a file; give a folder"),
        ("file", True, "is a file; give a folder"),
        ("pipe", True, "is a file; give a folder"),
        ("model", False, "exists and is not empty; choose another or add --overwrite"),
        ("other", True, "holds no model, so it is not overwritten"),
        ("below a file", False, "cannot write in"),
    ],
)
def test_places_that_a_folder_may_not_take(kind: str, overwrite: bool, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind in ("file", "below a file"):
        out.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        write(out, EARLIER if kind == "model" else {"thesis.tex": b"mine"})
    target = out / "deeper" if kind == "below a file" else out
    before = files(tmp_path)
    with pytest.raises(InputError, match=says), atomic_folder(target, overwrite):
        pytest.fail("the block must not run")
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("check", [check_output, check_file])
def test_a_folder_without_the_right_to_write(check: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sspruner.files.output.os.access", lambda path, mode: mode != os.W_OK)  # root may always write
    with pytest.raises(InputError, match=f"cannot write in {tmp_path}"):
        check(tmp_path / "new")  # type: ignore[operator]


def test_places_that_a_file_may_not_take(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # stands for a device: as root, /dev/null could be replaced
    for path, says in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "none" / "plan.json", "no folder"),
        (tmp_path / "pipe" / "plan.json", "no folder"),
    ):
        with pytest.raises(InputError, match=says), atomic_file(path):
            pytest.fail("the block must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    with suppress(ValueError), atomic_file(tmp_path / "link.json") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert (tmp_path / "real.json").read_text() == "old"
    with atomic_file(tmp_path / "link.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
