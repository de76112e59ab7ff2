"""Layer-by-layer replay: each block runs once to be observed and once, after its cut, to feed the next block.

Only one block at a time is on the compute device, or on the accelerator where it stays. The hidden states of all
batches are on the CPU between blocks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from sspruner.compute.device import moved, resident, working_on, works_on
from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import forward
from sspruner.compute.products import Products, Remembered
from sspruner.errors import ModelError
from sspruner.graph.ssm_graph import SSMGraph

Inputs = Callable[[], dict[str, torch.Tensor]]  # linear layer, relative to the module -> its input
Flow = tuple[torch.Tensor, ...]  # activations between blocks: (b, T, D); in mamba_ssm two, the second None at first
Observer = Callable[[str, torch.Tensor, torch.Tensor, Inputs], None]  # (module path, hidden (b, T, D), mask (b, T), ..)


class _Captured(Exception):
    """Raised by a hook to stop a forward pass once all required inputs are captured."""


class Replay:
    """Block-by-block forward pass of a model over a fixed set of batches.

    blocks: paths of the repeated blocks, in order. Call `observe` and then `advance` on each.
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
        self.hidden: list[Flow] = []  # inputs of the next block, per batch, on the CPU
        self.inputs: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []  # the other arguments, by block
        self.tokens: list[torch.Tensor] = []  # int64 (b, T), or the values that the model reads: (b, T, ...)
        self.masks: list[torch.Tensor] = []  # bool (b, T)
        self.returns: dict[str, tuple[int, int]] = {}  # see _what_blocks_return
        self.ran: Flow | None = None  # output of the block, if an observer of this batch had it run to its end
        self.ahead: set[int] = set()  # batches whose hidden states are inputs of the next block already
        for tokens, mask in batches:
            self._start(tokens, mask)

    def one_by_one(self) -> Replay:
        """Return a replay of the same sequences in batches of one, before the first block."""
        return self.over(
            sequence
            for tokens, mask in zip(self.tokens, self.masks, strict=True)
            for sequence in zip(tokens[:, None], mask[:, None], strict=True)
        )

    def over(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Replay:
        """Return a replay of other batches through the same blocks, before the first block."""
        other = copy.copy(self)
        other.hidden, other.inputs, other.tokens, other.masks, other.ahead = [], [], [], [], set()
        for tokens, mask in batches:
            other._start(tokens, mask)
        return other

    def beside(self) -> Replay:
        """Return a copy of this replay at its current block, to run the same blocks in another form."""
        other = copy.copy(self)
        other.hidden, other.ahead = [*self.hidden], set()
        return other

    @torch.no_grad()
    def _start(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Capture the arguments of every block for one batch, by running the model with blocks that return their input.

        Beside the hidden states these are masks, positions and the original embeddings, which do not depend on the
        blocks.
        """
        first: list[Flow] = []
        inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        few = (slice(1), slice(2 if tokens.ndim == 2 else None))  # a head of values may need all steps
        self.returns = self.returns or self._what_blocks_return(tokens[few], mask[few])

        def keep(path: str, flowing: Flow, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
            if not first:
                first.append(flowing)
            inputs[path] = rest, kwargs
            if path == self.blocks[-1]:
                raise _Captured  # skip the final norm and the output head
            return flowing

        with suppress(_Captured):
            self._without_blocks(tokens, mask, keep)
        missing = [path for path in self.blocks if path not in inputs]
        if missing:
            raise ModelError(f"{missing[0]}: the model's forward never calls this block; it cannot be replayed")
        steps = first[0][0].shape[:2]
        if mask.shape != steps:  # one position for several steps (patches)
            if not mask.all():
                raise ModelError(f"{self.blocks[0]}: takes {steps[1]} of {mask.shape[1]} steps; give no mask")
            mask = torch.ones(steps, dtype=torch.bool)
        self.hidden.append(tuple(h.cpu() if h is not None else h for h in first[0]))
        self.inputs.append(inputs)
        self.tokens.append(tokens)
        self.masks.append(mask)

    def head(self, batch: int, last: Flow) -> Any:
        """Compute the model's output from its last block's output: norm, output head, scaling. No block runs."""
        return self._without_blocks(
            self.tokens[batch],
            self.masks[batch],
            lambda path, flowing, *_: last if path == self.blocks[-1] else flowing,
        )

    def _without_blocks(self, tokens: torch.Tensor, mask: torch.Tensor, instead: Callable[..., Flow]) -> Any:
        """Run the model's forward with each block replaced by `instead(path, block inputs, args, kwargs)`."""

        def stand_in(path: str) -> Callable[..., Any]:
            carried, returned = self.returns[path]

            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args:
                    args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
                flowing = instead(path, args[:carried], args[carried:], kwargs)
                return flowing + (None,) * (returned - carried) if returned else flowing[0]

            return forward

        with _replaced({self.model.get_submodule(p): stand_in(p) for p in self.blocks}):
            return forward(self.model, tokens, mask, use_cache=False)

    def _what_blocks_return(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[int, int]]:
        """Return for each block how many tensors flow on and the length of its output tuple, 0 if it is not a tuple.

        mamba_ssm's blocks return (hidden states, residual); the others return hidden states, some of them in a tuple.
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
    def observe(self, block: str, paths: list[str], observer: Observer, *, advance: bool = False) -> None:
        """Call `observer` with the input of every module in `paths`, all inside `block`, batch by batch.

        The forward pass stops after the last of them was called. If the observer asks for the inputs of the linear
        layers inside a module, they are captured in another run of the block. With `advance`, where the block will not
        be cut, the output of that run, or of one for this, is the input of the next block; products that the observer
        computed already are not computed again.
        """
        with self.on_device(block):
            for batch, mask in enumerate(self.masks):
                self.ran = None
                seen = self._module_inputs(block, paths, batch)
                with Remembered() if advance else nullcontext():
                    for path, hidden in seen:
                        observer(path, hidden, mask.to(hidden.device), partial(self._linear_inputs, block, path, batch))
                    if advance and (self.ran is not None or block != self.blocks[-1]):
                        self._flow_on(block, batch, self.ran or self.run(block, batch, self.hidden[batch]))
                        self.ahead.add(batch)
        self.ran = None

    def _module_inputs(self, block: str, paths: list[str], batch: int) -> list[tuple[str, torch.Tensor]]:
        """Return (path, input) in the order of the calls.

        A linear layer that is not called (another layer's adapter) is left out.
        """
        seen: list[tuple[str, torch.Tensor]] = []
        modules = {path: self.model.get_submodule(path) for path in paths}
        linear = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}

        def note(path: str, hidden: torch.Tensor) -> None:
            seen.append((path, hidden))
            if len({name for name, _ in seen}) == len(paths):
                raise _Captured

        def capture(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                note(path, args[0] if args else kwargs["hidden_states"])

            return hook

        handles = [
            module.register_forward_pre_hook(capture(path), with_kwargs=True)
            for path, module in modules.items()
            if path not in linear
        ]
        try:
            if paths:
                with Products({module.weight: path for path, module in linear.items()}, note):
                    self.run(block, batch, self.hidden[batch])
                missing = set(modules) - set(linear) - {path for path, _ in seen}
                if missing:
                    raise ModelError(f"{', '.join(sorted(missing))}: not called by its block; it cannot be scored")
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.no_grad()
    def _linear_inputs(self, block: str, path: str, batch: int) -> dict[str, torch.Tensor]:
        """Return the input of every linear layer inside the module at `path`, by its path relative to the module."""
        outer = self.model.get_submodule(path)
        linear = {name: m for name, m in outer.named_modules() if isinstance(m, nn.Linear)}
        seen, self.ran = self.given(block, batch, {module.weight: name for name, module in linear.items()})
        missing = [name for name in linear if "." not in name and name not in seen]
        if missing:  # never score an unseen layer as zero, a known fault of published code
            raise ModelError(
                f"{path}: the inputs of {', '.join(missing)} were not seen (a fused kernel?); use a scorer that does "
                "not need them"
            )
        return seen

    @torch.no_grad()
    def given(
        self, block: str, batch: int, weights: Mapping[torch.Tensor, str]
    ) -> tuple[dict[str, torch.Tensor], Flow]:
        """Run a block and return the inputs of linear layers inside it, by name, and the block's output.

        weights: weight -> name. The block has to be on the device. A layer that the block does not call is left out.
        """
        seen: dict[str, torch.Tensor] = {}
        with Products(weights, seen.__setitem__):
            out = self.run(block, batch, self.hidden[batch])
        return seen, out

    @torch.no_grad()
    def arguments(self, block: str, path: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the module at `path`, inside a block on the device, is called with. The forward stops there."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Captured

        handle = self.model.get_submodule(path).register_forward_pre_hook(capture, with_kwargs=True)
        try:
            with suppress(_Captured):
                self.run(block, batch, self.hidden[batch])
        finally:
            handle.remove()
        if not seen:
            raise ModelError(f"{path}: not called by its block; it cannot be reconstructed")
        return seen[0]

    @torch.no_grad()
    def outputs(self, block: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (input, output, mask) of a block in its current form, batch by batch: twice (b, T, D), and (b, T)."""
        with self.on_device(block):
            for batch, mask in enumerate(self.masks):
                before, after = self._residual(batch), self.run(block, batch, self.hidden[batch])
                out = after[0] if len(after) == 1 else after[0] + after[1]
                yield before.to(out.device), out, mask.to(out.device)

    def _residual(self, batch: int) -> torch.Tensor:
        """Return the residual stream that enters the next block. mamba_ssm passes it in two parts."""
        parts = [h for h in self.hidden[batch] if h is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """Run `block` in its current form and make its outputs the inputs of the next block."""
        with self.on_device(block):
            for batch, hidden in enumerate(self.hidden):
                if batch not in self.ahead:
                    self._flow_on(block, batch, self.run(block, batch, hidden))
        self.ahead.clear()

    def _flow_on(self, block: str, batch: int, out: Flow) -> None:
        """Make a block's output on one batch the input of the next block."""
        if not all(h[self.masks[batch].to(h.device)].isfinite().all() for h in out):
            self.check_finite(block)
        self.hidden[batch] = tuple(h.cpu() for h in out)

    @torch.no_grad()
    def check_finite(self, block: str) -> None:
        """Raise ModelError that names the first module in a block whose output is not finite, if there is one."""
        with self.on_device(block) as module:
            for batch, hidden in enumerate(self.hidden):
                if batch not in self.ahead:
                    refuse_not_finite(module, partial(self.run, block, batch, hidden), block)

    def run(self, block: str, batch: int, flowing: Flow, *, wide: bool = False) -> Flow:
        """Run a block, which is on the device, on the inputs `flowing` with the batch's other arguments.

        wide: convert bf16 and fp16 inputs to fp32, for a block whose weights are in fp32.
        """
        module = self.model.get_submodule(block)
        args, kwargs = self.inputs[batch][block]
        device = works_on(self.model, block, self.device)
        with evaluating(module):
            out = module(*moved((*flowing, *args), device, wide=wide), **moved(kwargs, device, wide=wide))
        return tuple(out[: len(flowing)]) if isinstance(out, tuple) else (out,)

    @contextmanager
    def on_device(self, block: str) -> Iterator[nn.Module]:
        """Context manager that moves a block to its compute device and back. Changes made on the device are lost."""
        module = self.model.get_submodule(block)
        with resident(self.model, block), working_on(module, works_on(self.model, block, self.device)):
            yield module


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context manager that replaces the forward methods of modules."""
    for module, other in forwards.items():
        module.forward = other
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager that sets a module to eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
