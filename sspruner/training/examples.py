"""Training examples of a model that is no language model: arrays by the names of its forward's arguments.

The loop trains on blocks; here a block is the number of an example, (1,), and the loss looks its arrays up. So batches,
several processes and restarts are those of text.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, ClassVar

import torch
from torch import nn

from sspruner.calibrate.arrays import as_numbers, input_of, read_arrays
from sspruner.errors import InputError
from sspruner.recipes.train import GradualText, Settings

Batch = dict[str, torch.Tensor]  # argument -> (b, ...)
Loss = Callable[[nn.Module, Batch], torch.Tensor]  # (model, batch) -> a mean over the examples


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the loss that a model's forward returns, under the key `loss`, as models of transformers do."""
    out = model(**batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise InputError(
            f"{type(model).__name__}: its forward returns no 'loss' for {', '.join(batch)}; let it return one, or give "
            "Examples(..., loss=FUNCTION)"
        )
    return found


@dataclass(frozen=True)
class Examples:
    """Examples to train on: what a model reads, and what its loss compares with.

    arrays    argument of the model's forward -> tensor or array, (n, ...); n is the same in all
    held_out  number of examples at the beginning that are never trained on
    loss      the loss of a batch; by default the one that the model's forward returns
    """

    arrays: Mapping[str, Any]
    held_out: int = 16
    seed: int = 0
    loss: Loss = own_loss

    measure: ClassVar[str] = "held_out_loss"
    seq_len: ClassVar[int] = 1  # an example counts as one token

    def __post_init__(self) -> None:
        """Raise InputError for arrays of different lengths, and if nothing is left to train on or to measure."""
        arrays = {name: as_numbers(values) for name, values in self.arrays.items()}
        object.__setattr__(self, "arrays", arrays)
        sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(sizes.values())) != 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "there are none"
            raise InputError(f"training examples: every array needs one entry for each example ({found})")
        if not 1 <= self.held_out < self.number:
            raise InputError(
                f"training examples: {self.number}, of which {self.held_out} are held out; hold out at least 1, and "
                "leave some"
            )

    @classmethod
    def of(cls, text: GradualText, settings: Settings) -> Examples:
        """Read the examples of a recipe. Raises InputError if it names none, or a file that cannot be read."""
        if not text.examples:
            raise InputError("training examples: the recipe names none")
        return cls(read_arrays(text.examples, "training examples"), text.held_out, settings.seed)

    @property
    def number(self) -> int:
        """Return the number of examples."""
        first = next(iter(self.arrays.values()))
        return len(first) if first.ndim else 0

    def check(self, model: Any) -> None:
        """Raise InputError unless the arrays are arguments of the model's forward."""
        input_of(self.arrays, model, "training examples")
        known = inspect.signature(model.forward).parameters
        if self.loss is own_loss and (unknown := next((name for name in self.arrays if name not in known), None)):
            raise InputError(f"training examples: {unknown!r} is no argument of {type(model).__name__}.forward")

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify these examples, as JSON."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.contiguous().numpy().tobytes())
        loss = f"{self.loss.__module__}.{getattr(self.loss, '__qualname__', type(self.loss).__name__)}"
        return {"examples": digest.hexdigest(), "held_out": self.held_out, "text_seed": self.seed, "loss": loss}

    def held_out_blocks(self) -> torch.Tensor:
        """Return the numbers of the held-out examples, int64 (held_out, 1)."""
        return torch.arange(self.held_out)[:, None]

    def training_blocks(self, skip: int = 0) -> Iterator[torch.Tensor]:
        """Yield numbers of examples, int64 (1,), without end, each once before any comes again. skip: how many to
        skip.
        """
        return islice((torch.tensor([number]) for number in self._numbers()), skip, None)

    def _numbers(self) -> Iterator[int]:
        for epoch in count():
            numbers = [*range(self.held_out, self.number)]
            random.Random(f"{self.seed} {epoch}").shuffle(numbers)
            yield from numbers

    def batch(self, numbers: torch.Tensor) -> Batch:
        """Return the arrays of some examples, on the device of their numbers, int64 (b, 1)."""
        places = numbers.flatten().cpu()
        return {name: array[places].to(numbers.device) for name, array in self.arrays.items()}

    def probe(self, model: Any, count: int) -> torch.Tensor:
        """Return what the model reads of the first `count` held-out examples."""
        return input_of(self.arrays, model, "training examples")[: min(count, self.held_out)]

    def objective(self, model: nn.Module, numbers: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of some examples, and no parts; as the loop calls it."""
        return self.loss(model, self.batch(numbers)), {}
