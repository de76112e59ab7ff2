"""Gradients of the calibration loss through the whole model at once, for scorers with needs="gradients" or "fisher".

The autograd graph of the whole model and one batch is in memory; `sspruner.calibrate.local` needs that of one block.
With several processes, each passes its own batches, and all get the gradients over all batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.calibrate.token_steps import differentiable
from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import forward
from sspruner.compute.precision import in_fp32
from sspruner.compute.processes import gathered, total
from sspruner.errors import InputError, ModelError

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # tokens int64 (b, T), mask bool (b, T)
Gradients = dict[str, torch.Tensor]  # parameter name -> fp32, in its shape, on the CPU

DIFFERENTIABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mean_gradients(model: nn.Module, batches: Batches, tokens: int) -> Gradients:
    """Compute the gradient of the mean next-token loss over all calibration tokens.

    Logits at t predict token t + 1; positions count if neither token is padding. A shared parameter has one gradient
    under all its names. Raises ModelError for a gradient that is not finite.

    tokens: number of predicted tokens in all batches of all processes, so that the split into batches does not matter.
    """
    check_some(tokens)
    with _differentiable(model):
        for ids, mask in batches:
            torch.autograd.backward(_loss(model, ids, mask) / tokens)
        return _by_name(model, {p: p.grad for p in model.parameters() if p.grad is not None})


def mean_and_fisher(model: nn.Module, batches: Batches, tokens: int) -> tuple[Gradients, Gradients]:
    """Compute `mean_gradients` and the diagonal of the empirical Fisher information over calibration sequences:

        F = 1/S · sum_s (d L_s / d w)²,   L_s the mean next-token loss of sequence s alone

    Sequences without predicted tokens do not count. One backward pass per sequence, so that the split into batches does
    not matter.
    """
    check_some(tokens)
    sums: dict[nn.Parameter, torch.Tensor] = {}
    squares: dict[nn.Parameter, torch.Tensor] = {}
    sequences = 0
    with _differentiable(model):
        for batch, masks in batches:
            for ids, mask in zip(batch[:, None], masks[:, None], strict=True):  # (1, T)
                predicted = predicted_tokens(mask)
                if not predicted:
                    continue
                sequences += 1
                torch.autograd.backward(_loss(model, ids, mask) / predicted)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            sums.setdefault(p, torch.zeros_like(p)).add_(p.grad, alpha=predicted / tokens)
                            squares.setdefault(p, torch.zeros_like(p)).addcmul_(p.grad, p.grad)
                model.zero_grad(set_to_none=True)
        count = sum(gathered(sequences))  # collective call, also for a process without predicted tokens
        fisher = {p: square / count for p, square in squares.items()}
        return _by_name(model, sums), _by_name(model, fisher)


def _loss(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the summed loss. Raises ModelError that names the first module whose output is not finite."""
    loss = next_token_loss(forward(model, ids, mask, use_cache=False).logits, ids, mask)
    if not loss.isfinite():
        refuse_not_finite(model, lambda: forward(model, ids, mask, use_cache=False))
    return loss


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum the next-token losses, in nats, where neither token is padding. logits (b, T, V), ids (b, T), mask (b, T)."""
    device = logits.device
    counted = (mask[:, 1:] & mask[:, :-1]).to(device)  # (b, T-1)
    predicted, target = logits[:, :-1][counted], ids[:, 1:].to(device)[counted]  # (n, V), (n,)
    return F.cross_entropy(predicted.float(), target, reduction="sum")


def predicted_tokens(mask: torch.Tensor) -> int:
    """Return the number of predicted next tokens, neither of the pair being padding. mask: bool (S, T)."""
    return int((mask[:, 1:] & mask[:, :-1]).sum())


def check_some(tokens: int) -> None:
    """Raise InputError if no token is predicted."""
    if not tokens:
        raise InputError("calibration: no two tokens follow each other, so that nothing is predicted; give longer text")


def check_differentiable(model: nn.Module) -> None:
    """Raise ModelError that names the first parameter, or packed weight, without a gradient."""
    for name, p in model.named_parameters():
        if p.dtype not in DIFFERENTIABLE:
            raise _no_gradient(name, f"weights of type {_name(p.dtype)} have no gradient")
        if p.is_inference():
            raise _no_gradient(name, "made under torch.inference_mode(), so that it has no gradient")
    for name, buffer in model.named_buffers():
        if "weight" in name.rpartition(".")[2] and buffer.dtype not in DIFFERENTIABLE:
            raise _no_gradient(name, f"packed weights ({_name(buffer.dtype)}) have no gradient")
    if torch.is_inference_mode_enabled():
        raise InputError("gradients cannot be taken under torch.inference_mode(); leave it first")


def check_gradient(name: str, gradient: torch.Tensor, what: str = "gradients") -> None:
    """Raise ModelError unless the gradient is finite. name: name of the parameter or module."""
    bad = int((~gradient.isfinite()).sum())
    if bad:
        raise ModelError(
            f"{name}: {bad} of {gradient.numel()} {what} are NaN or infinite; use a shorter --seq-len, "
            "--dtype float32, or a scorer that needs only weights or activations"
        )


@contextmanager
def requires_grad(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Context manager that sets requires_grad of all parameters of a module."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(wanted)
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Context manager: all parameters in fp32, requiring gradients, without a gradient so far; restored afterwards."""
    check_differentiable(model)
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        with requires_grad(model, True), in_fp32(model), differentiable():
            yield
    finally:
        for p, grad in before:
            p.grad = grad


def _by_name(model: nn.Module, values: Mapping[nn.Parameter, torch.Tensor]) -> Gradients:
    """Sum gradients over processes and return them under all names of each parameter; zeros for unused parameters.

    Raises ModelError if one is not finite. The last such parameter is named: a backward pass meets it first.
    """
    totals = {p: total(values.get(p, torch.zeros_like(p)).detach().cpu()).float() for p in model.parameters()}
    for name, p in reversed(list(model.named_parameters())):
        check_gradient(name, totals[p])
    return {name: totals[p] for name, p in model.named_parameters(remove_duplicate=False)}


def _no_gradient(name: str, why: str) -> ModelError:
    return ModelError(f"{name}: {why}; use a scorer that needs only weights or activations")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
