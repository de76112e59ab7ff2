"""Gradients of the calibration loss through the whole model at once, for scorers with needs="gradients" or "fisher".

One graph of the whole model and one batch is held at a time. `sspruner.calibrate.local` needs one block's.
Several processes give their own batches each, and get the gradients of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.calibrate.token_steps import differentiable
from sspruner.compute.forward import forward
from sspruner.compute.precision import in_fp32
from sspruner.compute.processes import gathered, total
from sspruner.errors import InputError, ModelError

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # tokens int64 (b, T), mask bool (b, T)
Gradients = dict[str, torch.Tensor]  # parameter name -> fp32, in its shape, on the CPU

DIFFERENTIABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mean_gradients(model: nn.Module, batches: Batches, tokens: int) -> Gradients:
    """Gradient of the mean next-token loss over all calibration tokens.

    On the model's own text: logits at t predict t + 1, and only positions whose token and next token are not padding
    count. tokens: how many of those there are in all batches of all processes, so that any split gives the same sum. A
    shared parameter has one gradient under all its names. Raises ModelError for a gradient that is not finite.
    """
    check_some(tokens)
    with _differentiable(model):
        for ids, mask in batches:
            logits = forward(model, ids, mask, use_cache=False).logits
            torch.autograd.backward(next_token_loss(logits, ids, mask) / tokens)
        return _by_name(model, {p: p.grad for p in model.parameters() if p.grad is not None})


def mean_and_fisher(model: nn.Module, batches: Batches, tokens: int) -> tuple[Gradients, Gradients]:
    """`mean_gradients`, and the diagonal of the empirical Fisher information over calibration sequences:

        F = 1/S · sum_s (d L_s / d w)²,   L_s the mean next-token loss of sequence s alone

    Sequences in which nothing is predicted do not count. One backward pass for each sequence: the split into
    batches does not matter.
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
                logits = forward(model, ids, mask, use_cache=False).logits
                torch.autograd.backward(next_token_loss(logits, ids, mask) / predicted)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            sums.setdefault(p, torch.zeros_like(p)).add_(p.grad, alpha=predicted / tokens)
                            squares.setdefault(p, torch.zeros_like(p)).addcmul_(p.grad, p.grad)
                model.zero_grad(set_to_none=True)
        count = sum(gathered(sequences))  # by all processes, also one in whose sequences nothing is predicted
        fisher = {p: square / count for p, square in squares.items()}
        return _by_name(model, sums), _by_name(model, fisher)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the losses in nats, where neither a token nor the next one is padding. (b, T, V), (b, T), (b, T)."""
    device = logits.device
    counted = (mask[:, 1:] & mask[:, :-1]).to(device)  # (b, T-1)
    predicted, target = logits[:, :-1][counted], ids[:, 1:].to(device)[counted]  # (n, V), (n,)
    return F.cross_entropy(predicted.float(), target, reduction="sum")


def predicted_tokens(mask: torch.Tensor) -> int:
    """How many next tokens are predicted and count. mask: bool (S, T)."""
    return int((mask[:, 1:] & mask[:, :-1]).sum())


def check_some(tokens: int) -> None:
    """Raise InputError where nothing is predicted."""
    if not tokens:
        raise InputError("calibration: no two tokens follow each other, so that nothing is predicted; give longer text")


def check_differentiable(model: nn.Module) -> None:
    """Raise ModelError that names a parameter, or packed weights, through which no gradient flows."""
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
    """Raise ModelError unless all of it is finite. name: of the parameter or module."""
    bad = int((~gradient.isfinite()).sum())
    if bad:
        raise ModelError(
            f"{name}: {bad} of {gradient.numel()} {what} are NaN or infinite; use a shorter --seq-len, "
            "--dtype float32, or a scorer that needs only weights or activations"
        )


@contextmanager
def requires_grad(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether all parameters of a module want gradients, inside the block."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(wanted)
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """All parameters in fp32, wanting gradients, and without one so far; after the block as they were."""
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
    """Sums over processes, under all names of each parameter; zeros for what no forward calls. All are finite.

    The last parameter that is not is named: a backward pass meets it first.
    """
    found = {p: total(values.get(p, torch.zeros_like(p)).detach().cpu()).float() for p in model.parameters()}
    for name, p in reversed(list(model.named_parameters())):
        check_gradient(name, found[p])
    return {name: found[p] for name, p in model.named_parameters(remove_duplicate=False)}


def _no_gradient(name: str, why: str) -> ModelError:
    return ModelError(f"{name}: {why}; use a scorer that needs only weights or activations")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
