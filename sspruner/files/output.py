"""Atomic output: files and folders are written beside their place and renamed when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sspruner.errors import InputError

MODEL_FILES = ("config.json", "model.gguf")  # a folder with one of them holds a model, and may be overwritten


def check_output(out: str | Path, overwrite: bool = False) -> Path:
    """Return the output folder as a path. Call before long work.

    Raises InputError if it is not empty or cannot be created.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"output {out}: exists and is not empty; choose another or add --overwrite")
        if not any((out / name).is_file() for name in MODEL_FILES):
            raise InputError(f"output {out}: holds no model, so it is not overwritten; remove it yourself")
    _check_parent(out)
    return out


def check_file(path: str | Path) -> Path:
    """Return the output file as a path, links resolved. Call before long work.

    Raises InputError if it cannot be written.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"output {path}: is not a regular file; give a file")
    if not path.parent.is_dir():
        raise InputError(f"output {path}: no folder {path.parent}; make it first")
    _check_parent(path)
    return path


def check_results(out: str | Path, marks: Sequence[str]) -> Path:
    """Return a folder that is written file by file over several runs; it is created if missing.

    marks: files, at least one of which is in such a folder. Raises InputError for a folder with other content.
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
    """Return the folder beside the output folder in which a long run keeps finished parts."""
    out = Path(out).expanduser().absolute()
    return out.parent / f".{out.name}.working"


def remove_working(folder: Path) -> None:
    """Remove a working folder after its run is complete."""
    shutil.rmtree(folder, ignore_errors=True)


def _check_parent(path: Path) -> None:
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {path}: cannot write in {parent}; choose another place")


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that is renamed to `out` if the block succeeds and removed if it does not.

    After any interruption `out` is either unchanged or complete. Raises InputError if it cannot be written.
    """
    out = check_output(out, overwrite)
    absent = [parent for parent in out.parents if not parent.exists()]
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        new, old = work / "new", work / "old"
        try:
            new.mkdir()
            yield new
            _readable(*(file for file in new.rglob("*") if file.is_file()))
            check_output(out, overwrite)  # again: another run may have been faster
            if out.exists():
                out.rename(old)
            new.rename(out)
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


def write_file(path: str | Path, text: str) -> None:
    """Write a text file atomically. Bytes of file names that are not valid text are written as escapes."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _readable(*files: Path) -> None:
    """Set the file mode that the user's umask defines: safetensors writes files readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Context manager that turns a full disk or missing permission into an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"output {path}: cannot be written ({error}); nothing is left of it") from error
