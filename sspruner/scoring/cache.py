"""Cache of scores, keyed by everything that they depend on, so that stale scores are never used."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from sspruner.errors import InputError
from sspruner.scoring.scores import Scores

FOLDER = "SSPRUNER_CACHE"  # environment variable with the folder of the cache
STARTED = time.time()  # source files changed later may differ from the code that runs


def cache_folder() -> Path:
    """Return $SSPRUNER_CACHE, else the folder `sspruner` in the user's cache folder."""
    folder, user_cache = os.environ.get(FOLDER), os.environ.get("XDG_CACHE_HOME")
    return Path(folder).expanduser() if folder else Path(user_cache or "~/.cache").expanduser() / "sspruner"


def cache_key(
    model: nn.Module, code: Iterable[type], asked: dict[str, object], tokens: torch.Tensor, mask: torch.Tensor
) -> str | None:
    """Return a digest of everything that scores depend on; None if that cannot be determined, then they are not cached.

    code          classes of scorers and families. Their files count, as do those of the model's modules and of their
                  base classes, and sspruner's own
    asked         axes, options, seed and other settings
    tokens, mask  the calibration, (S, T)
    """
    sources = _sources({*code, *map(type, model.modules())})
    if sources is None:
        return None
    digest = hashlib.sha256(f"{_versions()} {sources}".encode())
    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    try:
        for part in (*_structure(model), *_bytes({"tokens": tokens, "mask": mask}.items())):
            digest.update(part)
        for part in _bytes((*model.named_parameters(), *model.named_buffers())):
            digest.update(part)
    except (RuntimeError, NotImplementedError, TypeError):  # packed weights that do not show their bytes
        return None
    return digest.hexdigest()


def cached(key: str) -> Scores | None:
    """Return the scores with this key, None if there are none. Unreadable files count as none."""
    try:
        scores = Scores.load(_path(key))
    except (OSError, RuntimeError, InputError):
        return None
    metadata = {k: v for k, v in scores.metadata.items() if k != "cache_key"}
    return replace(scores, metadata=metadata, from_cache=True) if scores.metadata.get("cache_key") == key else None


def store(key: str, scores: Scores) -> None:
    """Write scores to the cache. Errors are ignored: the scores are computed again next time."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(scores, metadata={**scores.metadata, "cache_key": key}).save(path)
    except (OSError, RuntimeError, InputError):
        return


def _path(key: str) -> Path:
    return cache_folder() / "scores" / f"{key}.safetensors"


@cache
def _versions() -> str:
    return " ".join([platform.python_version(), *(version(name) for name in ("sspruner", "torch", "transformers"))])


def _sources(classes: Iterable[type]) -> str | None:
    """Return a digest of the files that define classes and their bases, and of sspruner's own files.

    None if there is no such file (a class typed in a session), or if one has changed since the process started.
    """
    names = {(c.__module__, c.__qualname__) for cls in classes for c in cls.__mro__ if c.__module__ != "builtins"}
    modules = {module for module, _ in names}
    files = {Path(getattr(sys.modules.get(module), "__file__", None) or "") for module in modules}
    files |= set(Path(__file__).parents[1].rglob("*.py"))
    if not all(file.is_file() and file.stat().st_mtime <= STARTED for file in files):
        return None
    return hashlib.sha256(str((sorted(names), sorted(map(_source, files)))).encode()).hexdigest()


@cache
def _source(file: Path) -> str:
    """Return a digest of one file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _structure(model: nn.Module) -> Iterator[bytes]:
    """Yield the model's config, and the numbers in its modules: sizes, epsilons, switches."""
    config = getattr(model, "config", None)
    yield f"{config} {getattr(config, '_attn_implementation', None)}".encode()
    for path, module in model.named_modules():
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float) and k != "training"}
        yield f"{path} {type(module).__qualname__} {sorted(numbers.items())}".encode()


def _bytes(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    """Yield the name, type, shape and all bytes of each tensor."""
    for name, tensor in tensors:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
