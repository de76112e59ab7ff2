"""Nothing half-written: files and folders are made beside their place and renamed into it when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sspruner.errors import InputError


def check_output(out: str | Path, overwrite: bool = False) -> Path:
    """The output folder as a path. Raises InputError if it is taken or cannot be made; call before long work."""
    out = Path(out).expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"output {out}: exists and is not empty; choose another or add --overwrite")
        if not (out / "config.json").is_file():
            raise InputError(f"output {out}: holds no model, so it is not overwritten; remove it yourself")
    _check_parent(out)
    return out


def check_file(path: str | Path) -> Path:
    """The output file as a path, links followed. Raises InputError if it cannot be made; call before long work."""
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"output {path}: is not a regular file; give a file")
    if not path.parent.is_dir():
        raise InputError(f"output {path}: no folder {path.parent}; make it first")
    _check_parent(path)
    return path


def check_results(out: str | Path, marks: Sequence[str]) -> Path:
    """A folder that is written file by file over several runs, made if it is not there.

    marks: files, at least one of which lies in such a folder. Raises InputError for a folder that holds other things.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / mark).exists() for mark in marks):
        raise InputError(f"output {out}: holds other files, none of them {' or '.join(marks)}; choose another folder")
    _check_parent(out)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def working_folder(out: str | Path) -> Path:
    """Where a long run keeps what it has finished, beside its output folder."""
    out = Path(out).expanduser().absolute()
    return out.parent / f".{out.name}.working"


def remove_working(folder: Path) -> None:
    """Remove a working folder once its run is through."""
    shutil.rmtree(folder, ignore_errors=True)


def _check_parent(path: Path) -> None:
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {path}: cannot write in {parent}; choose another place")


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    Whatever interrupts it, `out` is afterwards what it was before or whole. Raises InputError if it cannot be written.
    """
    out = check_output(out, overwrite)
    absent = [parent for parent in out.parents if not parent.exists()]
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        made, old = work / "new", work / "old"
        try:
            made.mkdir()
            yield made
            _readable(*(file for file in made.rglob("*") if file.is_file()))
            check_output(out, overwrite)  # again: another run may have been faster
            if out.exists():
                out.rename(old)
            made.rename(out)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(work, ignore_errors=True)
            if not out.exists():
                for parent in absent:
                    with suppress(OSError):
                        parent.rmdir()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it if the block succeeds. Raises InputError if it cannot."""
    path = check_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            yield temporary
            _readable(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _readable(*files: Path) -> None:
    """Give files the mode that the user's umask asks for: safetensors writes them readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk or a missing right, inside the block, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"output {path}: cannot be written ({error}); nothing is left of it") from error
