"""Layer-by-layer replay: each block runs once to be observed and once, after its cut, to feed the next block.

One block at a time is on the compute device; the hidden states of all batches wait on the CPU between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError
from sspruner.graph.ssm_graph import SSMGraph

Observer = Callable[[str, torch.Tensor, torch.Tensor], None]  # (mixer path, hidden (b, T, D), mask (b, T))


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
        self.model, self.device = model, torch.device(device)
        self.blocks = find_blocks(model, graph)
        self.mixers = [layer.path for layer in graph.layers]
        self.hidden: list[torch.Tensor] = []  # one (b, T, D) per batch, on the CPU
        self.inputs: list[dict[str, Any]] = []  # the other arguments that every block receives
        self.masks: list[torch.Tensor] = []  # bool (b, T)
        for tokens, mask in batches:
            self._start(tokens, mask)

    @torch.no_grad()
    def _start(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Run the model up to its first block, whose inputs are kept."""

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append(args[0].cpu())
            self.inputs.append(kwargs)
            raise _Captured

        handle = self.model.get_submodule(self.blocks[0]).register_forward_pre_hook(capture, with_kwargs=True)
        home = next(self.model.parameters()).device
        try:
            with _evaluating(self.model):
                self.model(input_ids=tokens.to(home), attention_mask=mask.to(home).long(), use_cache=False)
            raise ModelError(f"{self.blocks[0]}: the model's forward never calls this block; it cannot be replayed")
        except _Captured:
            self.masks.append(mask)
        finally:
            handle.remove()

    @torch.no_grad()
    def observe(self, block: str, observer: Observer) -> None:
        """Give `observer` the input of every mixer in `block`, batch by batch. The mixer itself does not run."""
        mixers = [path for path in self.mixers if within(path, block)]
        with self._on_device(block) as module:
            for batch in range(len(self.hidden)):
                for path, hidden in self._mixer_inputs(module, mixers, batch):
                    observer(path, hidden, self.masks[batch].to(hidden.device))

    def _mixer_inputs(self, block: nn.Module, mixers: list[str], batch: int) -> list[tuple[str, torch.Tensor]]:
        seen: list[tuple[str, torch.Tensor]] = []

        def capture(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.append((path, args[0] if args else kwargs["hidden_states"]))
                if len(seen) == len(mixers):
                    raise _Captured

            return hook

        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(capture(path), with_kwargs=True) for path in mixers
        ]
        try:
            if mixers:
                self._run(block, batch)
                raise ModelError(f"{', '.join(mixers)}: not every mixer of the block ran; it cannot be scored")
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """Run `block` as it is now: its outputs become the inputs of the next block."""
        with self._on_device(block) as module:
            for batch in range(len(self.hidden)):
                self.hidden[batch] = self._run(module, batch).cpu()

    def _run(self, block: nn.Module, batch: int) -> torch.Tensor:
        kwargs = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in self.inputs[batch].items()}
        with _evaluating(block):
            out = block(self.hidden[batch].to(self.device), **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    @contextmanager
    def _on_device(self, block: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        home = next(module.parameters()).device
        module.to(self.device)
        try:
            yield module
        finally:
            module.to(home)


def find_blocks(model: nn.Module, graph: SSMGraph) -> list[str]:
    """Paths of the model's repeated blocks: the entries of the outermost ModuleList that holds the mixers."""
    first = graph.layers[0].path.split(".")
    for depth in range(1, len(first)):
        path = ".".join(first[:depth])
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            return [f"{path}.{i}" for i in range(len(module))]
    raise ModelError(f"{graph.model_class}: mixer {graph.layers[0].path} is not inside a ModuleList of blocks")


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
