"""Layer-local gradients for sequential pruning, with the autograd graph of one block at a time.

At block l the loss of the whole model is linearised around the dense model, in the block's output:

    L_l = sum_t <g_lt, block_l(h'_l)_t>,   g_l = d(mean next-token loss) / d(output of block l), dense

h'_l is the block's input in the replay, computed by the cut blocks before it. On the dense model the gradient of L_l
in the block's parameters equals that of the whole model, by the chain rule.

Memory: g_l of every block, (L, tokens, D) on the CPU, and the graph of one block and batch. Time: three forward and
two backward passes of the blocks in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from sspruner.calibrate.gradients import (
    Gradients,
    check_differentiable,
    check_gradient,
    check_some,
    next_token_loss,
    predicted_tokens,
    requires_grad,
)
from sspruner.calibrate.replay import Flow, Replay
from sspruner.calibrate.token_steps import differentiable
from sspruner.compute.precision import in_fp32
from sspruner.compute.processes import gathered, total
from sspruner.graph.site import within


class LocalGradients:
    """Gradients of the layer-local loss over the blocks of a replay, which must be at its first block.

    The model must be dense when this object is created. Call `add` on each block before the replay advances over it.

    gradients   parameter name -> fp32, in its shape, on the CPU, for the blocks added so far. A parameter that several
                blocks share has one gradient under all its names: the sum over the calls so far
    fisher      mean over sequences of the squared gradient of the sequence's own mean loss; only with fisher=True,
                which runs sequence by sequence. For shared parameters: the sum of each call's squares, without the
                products between calls, which would need the gradients of every sequence; `mean_and_fisher` has them

    With several processes, each has a replay of its own sequences, and all get the gradients over all sequences.

    bf16 and fp16 weights are fp32 while their block runs. Inputs that the replay passes to a block (after the first
    block, rotations, scaled embeddings) keep their rounding.
    """

    def __init__(self, replay: Replay, *, fisher: bool = False) -> None:
        check_differentiable(replay.model)
        self.gradients: Gradients = {}
        self.fisher: Gradients = {}
        self._replay, self._sequences, self._want_fisher = replay, replay.one_by_one(), fisher
        self._sequences.hidden.clear()  # the replay has the hidden states
        self._predicted = [
            predicted_tokens(mask) for mask in self._sequences.masks
        ]  # number of predicted tokens, by sequence
        self._total = sum(gathered(sum(self._predicted)))  # of all processes
        check_some(self._total)
        self._runs = self._sequences if fisher else replay  # batches that run through a block
        self._upstream = self._dense()  # g, by block

    def add(self, block: str) -> None:
        """Add the gradients of a block's parameters, in its current form, on the replay's inputs. Once per block."""
        upstream = self._upstream.pop(block)
        with self._at_work(block, differentiable=True) as module:
            sums = {p: torch.zeros_like(p, requires_grad=False) for p in module.parameters()}
            squares = {p: torch.zeros_like(p, requires_grad=False) for p in sums if self._want_fisher}
            for run, (flow, g) in enumerate(zip(self._inputs(), upstream, strict=True)):
                if self._want_fisher and not self._predicted[run]:
                    continue
                with differentiable():
                    out = self._runs.run(block, run, flow, wide=True)
                for p, gradient in zip(sums, _pull_back(out, g, sums), strict=True):
                    sums[p] += gradient
                    if self._want_fisher:  # g is the gradient of the mean over the tokens of all sequences
                        squares[p] += (gradient * (self._total / self._predicted[run])).square()
        sequences = sum(gathered(sum(map(bool, self._predicted))))
        self._accumulate(self.gradients, sums)
        self._accumulate(self.fisher, {p: square / sequences for p, square in squares.items()})

    def _accumulate(self, into: Gradients, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        names: dict[nn.Parameter, list[str]] = {}
        for name, p in self._replay.model.named_parameters(remove_duplicate=False):
            names.setdefault(p, []).append(name)
        for p, value in values.items():
            value = total(value.cpu()).float()
            check_gradient(names[p][0], value)
            into.update(dict.fromkeys(names[p], value + into[names[p][0]] if names[p][0] in into else value))

    def _inputs(self) -> list[Flow]:
        """Return the inputs of the replay's next block, run by run."""
        hidden = self._replay.hidden
        return [row for flow in hidden for row in _rows(flow)] if self._want_fisher else hidden

    @torch.no_grad()
    def _dense(self) -> dict[str, list[Flow]]:
        """Compute g of every block, run by run: forward block by block, keeping the inputs of each, then backward."""
        blocks = self._replay.blocks
        entering: list[list[Flow]] = []
        flows = self._inputs()
        for block in blocks:
            entering.append(flows)
            with self._at_work(block, differentiable=False):
                flows = [_cpu(self._runs.run(block, i, flow, wide=True)) for i, flow in enumerate(flows)]
            for mask, flow in zip(self._runs.masks, flows, strict=True):
                for h in flow:
                    check_gradient(block, h[mask], "values of its output")
        upstream = self._head(flows)
        for g in (g for flow in upstream for g in flow):
            check_gradient(blocks[-1], g, "gradients of its output")
        del flows
        gradients_of: dict[str, list[Flow]] = {}
        for block in reversed(blocks):
            gradients_of[block] = upstream
            before = entering.pop()
            if entering:  # the gradient of the first block's input is not needed
                with self._at_work(block, differentiable=False):
                    upstream = [
                        self._through(block, i, *pair) for i, pair in enumerate(zip(before, upstream, strict=True))
                    ]
        return gradients_of

    def _through(self, block: str, run: int, entering: Flow, g: Flow) -> Flow:
        """Compute g of the previous block from this block's inputs and its g."""
        leaves = _leaves(entering)
        with differentiable():
            out = self._runs.run(block, run, leaves, wide=True)
        before = _cpu(_pull_back(out, g, leaves))
        for gradient in before:
            check_gradient(block, gradient, "gradients of its input")
        return before

    def _head(self, flows: list[Flow]) -> list[Flow]:
        """Compute g of the last block from its output, sequence by sequence, because logits are large."""
        gradients, sequence = [], 0
        with self._rest_at_work():
            for flow in flows:
                rows = []
                for row in _rows(flow):
                    tokens, mask = self._sequences.tokens[sequence], self._sequences.masks[sequence]
                    leaves = _leaves(tuple(h.to(self._replay.device) for h in row))
                    with differentiable():
                        logits = self._sequences.head(sequence, leaves).logits
                        loss = next_token_loss(logits, tokens, mask) / self._total
                    rows.append(_cpu(_pull_back((loss,), (torch.ones_like(loss),), leaves)))
                    sequence += 1
                gradients.append(tuple(torch.cat(parts) for parts in zip(*rows, strict=True)))
        return gradients

    @contextmanager
    def _at_work(self, block: str, *, differentiable: bool) -> Iterator[nn.Module]:
        """Context manager: one block on the device, in fp32, with or without gradients for its parameters."""
        with self._replay.on_device(block) as module, in_fp32(module), requires_grad(module, differentiable):
            yield module

    @contextmanager
    def _rest_at_work(self) -> Iterator[None]:
        """Context manager: all modules outside the blocks (embeddings, final norm, head) on the device, in fp32."""
        model, blocks = self._replay.model, self._replay.blocks
        holders = {".".join(path.split(".")[:i]) for path in blocks for i in range(len(path.split(".")))}
        rest = nn.ModuleList(
            module
            for path, module in model.named_modules()
            if path not in holders and not any(within(path, block) for block in blocks)
        )
        home = next(model.parameters()).device
        with in_fp32(rest), requires_grad(rest, False):
            rest.to(self._replay.device)
            try:
                yield
            finally:
                rest.to(home)


def _rows(flow: Flow) -> list[Flow]:
    """Split a batch into its sequences, each a batch of one. None stays None."""
    return [tuple(None if h is None else h[i : i + 1] for h in flow) for i in range(len(flow[0]))]


def _leaves(flow: Flow) -> Flow:
    """Return detached tensors that require gradients."""
    return tuple(h.detach().requires_grad_() for h in flow)


def _cpu(flow: Flow) -> Flow:
    return tuple(h.cpu() for h in flow)


def _pull_back(out: Flow, g: Flow, inputs: Iterable[torch.Tensor]) -> Flow:
    """Compute d sum <g, out> / d inputs; zeros where out does not depend on them."""
    inputs = list(inputs)
    used = [(o, go.to(o)) for o, go in zip(out, g, strict=True) if o.requires_grad]
    if not used:
        return tuple(torch.zeros_like(i) for i in inputs)
    outputs, gradients = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, gradients, allow_unused=True, materialize_grads=True)
