"""Reading a model's tensors for a GGUF file, with a record of which were read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sspruner.graph.parts import zero_centred

Named = Iterator[tuple[str, torch.Tensor]]


class Weights:
    """Reads tensors in fp32, and records which parameters have been read."""

    def __init__(self) -> None:
        self.read: set[int] = set()

    def __call__(self, module: Any, name: str) -> torch.Tensor:
        """Return a tensor of a module in fp32."""
        tensor = _tensor(module, name)
        self.read.add(id(tensor))
        return tensor.detach().float()  # type: ignore[no-any-return]

    def optional(self, module: Any, name: str) -> torch.Tensor | None:
        """Return a tensor in fp32, None if the module lacks it."""
        return None if _tensor(module, name) is None else self(module, name)

    def norm(self, module: Any) -> torch.Tensor:
        """Return what a norm multiplies by, in fp32: its weight, or 1 + weight where it is zero-centred."""
        kind: Any = type(module)
        return self(module, "weight") + (1.0 if zero_centred(kind) else 0.0)

    def linear(self, module: Any, name: str, to: str, weight: float = 1.0, bias: float | None = 1.0) -> Named:
        """Yield weight and bias of a linear layer, each with a factor, under the name `to`. bias None: without it."""
        yield f"{to}.weight", self(module, f"{name}.weight") * weight
        if bias is not None and (value := self.optional(module, f"{name}.bias")) is not None:
            yield f"{to}.bias", value * bias

    def unread(self, model: Any) -> list[str]:
        """Return the parameters that were not read and that are not zero."""
        left = [(n, p) for n, p in model.named_parameters() if id(p) not in self.read]
        return [name for name, p in left if p.is_meta or bool(p.any())]


def _tensor(module: Any, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)
