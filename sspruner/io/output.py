"""Nothing half-written: files and folders are made beside their place and renamed into it when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sspruner.errors import InputError


def check_output(out: str | Path, overwrite: bool = False) -> Path:
    """The output folder as a path. Raises InputError if it is taken or cannot be made; call before long work."""
    out = Path(out).expanduser().absolute()
    if out.is_file():
        raise InputError(f"output {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"output {out}: exists and is not empty; choose another or add --overwrite")
        if not (out / "config.json").is_file():
            raise InputError(f"output {out}: holds no model, so it is not overwritten; remove it yourself")
    parent = next(p for p in out.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {out}: cannot write in {parent}")
    return out


@contextmanager
def atomic_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` if the block succeeds and vanishes if it does not."""
    out = check_output(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        made = work / "new"
        made.mkdir()
        yield made
        if out.exists():
            out.rename(work / "old")
        made.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it if the block succeeds."""
    path = Path(path).expanduser().absolute()
    if not path.parent.is_dir():
        raise InputError(f"output {path}: no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
