"""Scores: one importance per unit of every dependency group, and where they came from. Saved as safetensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sspruner.errors import InputError
from sspruner.io.output import atomic_file


@dataclass(frozen=True)
class Scores:
    """importance: `<module path>:<axis>` -> fp32 (groups, units), higher = keep.

    metadata: sspruner version, scorer and its options, model fingerprint, calibration source, tokens, seed.
    from_cache: whether they were made in an earlier run.
    """

    importance: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    from_cache: bool = False

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        with atomic_file(path) as temporary:
            save_file({k: v.contiguous() for k, v in self.importance.items()}, temporary, metadata=self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises InputError if the file is missing or corrupt."""
        if not Path(path).is_file():
            raise InputError(f"scores {path}: no such file")
        try:
            with safe_open(str(path), framework="pt") as f:
                scores = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
                metadata = dict(sorted((f.metadata() or {}).items()))
        except (SafetensorError, OSError) as error:
            raise InputError(f"scores {path}: not a readable safetensors file ({error}); score again") from error
        if not scores:
            raise InputError(f"scores {path}: holds no scores; score again")
        for name, importance in scores.items():
            if importance.ndim != 2 or not importance.is_floating_point() or not importance.isfinite().all():
                raise InputError(f"scores {path}: {name} is not a finite (groups, units) tensor; score again")
        return cls(scores, metadata)
