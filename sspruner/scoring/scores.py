"""Scores: one importance per unit of every dependency group, with their origin. Saved as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sspruner.axes import GRANULARITIES
from sspruner.errors import InputError
from sspruner.files.output import atomic_file
from sspruner.plans.reduction import PARTS, Basis

# Metadata that affects decisions, as JSON: axis -> one of these values.
TABLES: dict[str, tuple[Any, ...]] = {"comparable": (True, False), "granularity": GRANULARITIES}
SUFFIXES = tuple(f".{part}" for part in PARTS)


@dataclass(frozen=True)
class Scores:
    """Importance of the units of every dependency group.

    importance  `<module path>:<axis>` -> fp32 (groups, units), higher = keep
    metadata    sspruner version, scorer and its options, model fingerprint, calibration source, tokens, seed
    from_cache  True if they were computed in an earlier run
    bases       for units that are directions of the state: name -> encode fp32 (groups, units, N) and decode fp32
                (groups, N, units); unit i is row i of encode and column i of decode
    """

    importance: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    from_cache: bool = False
    bases: dict[str, Basis] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        with atomic_file(path) as temporary:
            parts = {f"{n}.{part}": t for n, basis in self.bases.items() for part, t in zip(PARTS, basis, strict=True)}
            tensors = {name: t.contiguous() for name, t in (self.importance | parts).items()}
            save_file(tensors, temporary, metadata=self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file written by `save`. Raises InputError if it is missing or corrupt."""
        if not Path(path).is_file():
            raise InputError(f"scores {path}: no such file")
        try:
            Path(path).open("rb").close()  # safetensors reports a file without read permission as missing
            with safe_open(str(path), framework="pt") as f:
                scores = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
                metadata = dict(sorted((f.metadata() or {}).items()))
        except (SafetensorError, OSError) as error:
            raise InputError(f"scores {path}: not a readable safetensors file ({error}); score again") from error
        if not scores:
            raise InputError(f"scores {path}: holds no scores; score again")
        bases = _bases(scores, str(path))
        for name, importance in scores.items():
            if importance.ndim != 2 or not importance.is_floating_point() or not importance.isfinite().all():
                raise InputError(f"scores {path}: {name} is not a finite (groups, units) tensor; score again")
        for key, known in TABLES.items():
            if not _is_table(metadata.get(key, "{}"), known):
                raise InputError(f"scores {path}: its metadata {key!r} is not a table by axis; score again")
        return cls(scores, metadata, bases=bases)


def _is_table(text: str, known: tuple[Any, ...]) -> bool:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(table, dict) and all(value in known for value in table.values())


def _bases(tensors: dict[str, torch.Tensor], path: str) -> dict[str, Basis]:
    """Remove the bases from a file's tensors and return them. Raises InputError for an incomplete one."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(SUFFIXES)))
    bases = {}
    for name in names:
        encode, decode = (tensors.pop(f"{name}.{part}", torch.empty(0)) for part in PARTS)
        units = tensors[name].shape if name in tensors else ()
        whole = encode.ndim == 3 and encode.shape[:2] == units and decode.shape == encode.mT.shape
        if not whole or not (encode.isfinite().all() and decode.isfinite().all()):
            raise InputError(f"scores {path}: the basis of {name} is not whole; score again")
        bases[name] = encode, decode
    return bases
