"""Layer-by-layer replay: each block runs once to be observed and once, after its cut, to feed the next block.

One block at a time is on the compute device; the hidden states of all batches wait on the CPU between blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError
from sspruner.forward import forward
from sspruner.graph.ssm_graph import SSMGraph

Observer = Callable[[str, torch.Tensor, torch.Tensor], None]  # (module path, hidden (b, T, D), mask (b, T))


class _Captured(Exception):
    """Raised by a hook to stop a forward as soon as what was wanted has been seen."""


class Replay:
    """Runs a model's blocks one by one over a fixed set of batches.

    blocks: paths of the repeated blocks, in order. Use `observe` and then `advance` on each.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: SSMGraph,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        device: str | torch.device,
    ) -> None:
        if not graph.blocks:
            raise ModelError(
                f"{graph.model_class}: mixer {graph.layers[0].path} is not inside a ModuleList of blocks; only scorers "
                "that need weights alone can be used"
            )
        self.model, self.device = model, torch.device(device)
        self.blocks = [f"{graph.blocks}.{i}" for i in range(len(model.get_submodule(graph.blocks)))]  # type: ignore[arg-type]
        self.hidden: list[tuple[torch.Tensor, ...]] = []  # what flows from block to block, per batch, on the CPU
        self.inputs: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []  # the other arguments, by block
        self.masks: list[torch.Tensor] = []  # bool (b, T)
        for tokens, mask in batches:
            self._start(tokens, mask)

    @torch.no_grad()
    def _start(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Run the model with blocks that return their input: what each of them is given is kept, nothing is computed.

        Beside the hidden states that is masks, positions, the original embeddings: none depends on other blocks.
        """
        first: list[tuple[torch.Tensor, ...]] = []
        inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        if not self.inputs:
            self.returns = self._what_blocks_return(tokens[:1, :2], mask[:1, :2])

        def stand_in(path: str) -> Callable[..., Any]:
            carried, returned = self.returns[path]

            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args:
                    args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
                flowing, rest = args[:carried], args[carried:]
                if not first:
                    first.append(flowing)
                inputs[path] = rest, kwargs
                if path == self.blocks[-1]:
                    raise _Captured  # what follows, the output head above all, is not needed
                return flowing + (None,) * (returned - carried) if returned else flowing[0]

            return forward

        stand_ins = {self.model.get_submodule(p): stand_in(p) for p in self.blocks}
        with _replaced(stand_ins), suppress(_Captured):
            forward(self.model, tokens, mask, use_cache=False)
        missing = [path for path in self.blocks if path not in inputs]
        if missing:
            raise ModelError(f"{missing[0]}: the model's forward never calls this block; it cannot be replayed")
        self.hidden.append(tuple(h.cpu() if h is not None else h for h in first[0]))
        self.inputs.append(inputs)
        self.masks.append(mask)

    def _what_blocks_return(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[int, int]]:
        """How many tensors flow on from each block, and the length of the tuple that it returns, 0 if it is none.

        mamba_ssm's blocks pass (hidden states, residual) on; the others hidden states, some of them in a tuple.
        """
        seen: dict[str, tuple[int, int]] = {}

        def look(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                pair = isinstance(out, tuple) and "residual" in inspect.signature(module.forward).parameters
                seen[path] = (2 if pair else 1, len(out) if isinstance(out, tuple) else 0)

            return hook

        handles = [self.model.get_submodule(path).register_forward_hook(look(path)) for path in self.blocks]
        try:
            forward(self.model, tokens, torch.ones_like(mask), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {path: seen.get(path, (1, 0)) for path in self.blocks}

    @torch.no_grad()
    def observe(self, block: str, paths: list[str], observer: Observer) -> None:
        """Give `observer` the input of every module of `paths`, inside `block`, batch by batch.

        Nothing runs after the last of them has been called.
        """
        with self._on_device(block) as module:
            for batch, mask in enumerate(self.masks):
                for path, hidden in self._module_inputs(module, paths, batch):
                    observer(path, hidden, mask.to(self.device))

    def _module_inputs(self, block: nn.Module, paths: list[str], batch: int) -> list[tuple[str, torch.Tensor]]:
        seen: list[tuple[str, torch.Tensor]] = []

        def capture(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append((path, args[0] if args else kwargs["hidden_states"]))
                if len(seen) == len(paths):
                    raise _Captured

            return hook

        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(capture(path), with_kwargs=True) for path in paths
        ]
        try:
            if paths:
                self._run(block, batch)
                raise ModelError(f"{', '.join(paths)}: not every module of the block ran; it cannot be scored")
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.no_grad()
    def outputs(self, block: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(input, output, mask) of a block as it is now, batch by batch: (b, T, D) twice and (b, T)."""
        with self._on_device(block) as module:
            for batch, mask in enumerate(self.masks):
                before, after = self._residual(batch), self._run(module, batch)
                yield before.to(self.device), after[0] if len(after) == 1 else sum(after), mask.to(self.device)  # type: ignore[misc]

    def _residual(self, batch: int) -> torch.Tensor:
        """The residual stream that enters the next block: mamba_ssm carries it in two parts."""
        parts = [h for h in self.hidden[batch] if h is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """Run `block` as it is now: its outputs become the inputs of the next block."""
        with self._on_device(block) as module:
            for batch in range(len(self.hidden)):
                self.hidden[batch] = tuple(h.cpu() for h in self._run(module, batch))

    def _run(self, block: nn.Module, batch: int) -> tuple[torch.Tensor, ...]:
        path = next(p for p in self.blocks if self.model.get_submodule(p) is block)
        args, kwargs = self.inputs[batch][path]
        flowing = tuple(_to(h, self.device) for h in self.hidden[batch])
        with _evaluating(block):
            out = block(*flowing, *(_to(a, self.device) for a in args), **_to(kwargs, self.device))
        return tuple(out[: len(flowing)]) if isinstance(out, tuple) else (out,)

    @contextmanager
    def _on_device(self, block: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        home = next(module.parameters()).device
        module.to(self.device)
        try:
            yield module
        finally:
            module.to(home)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and dicts, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to(v, device) for v in value)
    return value


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forwards inside the block."""
    for module, other in forwards.items():
        module.forward = other
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def within(path: str, block: str) -> bool:
    """Whether the module at `path` is the block or lies inside it."""
    return path == block or path.startswith(f"{block}.")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
