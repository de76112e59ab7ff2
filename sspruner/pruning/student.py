"""Student: one cut module whose trained elements are leaves of autograd, in fp32, while all else stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from sspruner.calibrate.gradients import requires_grad
from sspruner.calibrate.replay import evaluating
from sspruner.compute.constant import ConstantProducts, Once, Product
from sspruner.compute.device import moved
from sspruner.graph.layout import DECODE, ENCODE
from sspruner.plans.reduction import Basis, Projection
from sspruner.pruning.trained import Trained


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module, for one window, and the tokens that count: bool (1, T)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor


class Student:
    """A masked module that runs with other values of its trained elements.

    Rows of linear layers are leaves of their own, so that what stays of a wide layer costs no more than it is. Of other
    parameters the whole tensor is a leaf, and the gradient of what is not trained is zero.

    values: the leaves by name, fp32. A state's projection has two more, `state_encode` and `state_decode`.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Trained,
        held: Basis | None,
        dtype: torch.dtype,
        example: Call,
        once: Once,
    ) -> None:
        """Make a student of a module that is in fp32.

        held: basis that its state had before. dtype: of the model's weights. example: a call, to find out what is
        constant. once: store of it.
        """
        self.module, self.trained, self.held, self.dtype = module, trained, held, dtype
        self.device = next(module.parameters()).device
        parameters = dict(module.named_parameters(remove_duplicate=False))
        linear = {name: m for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
        self.rows = {
            name: rows.to(self.device)
            for name, mask in trained.elements.items()
            if name.removesuffix(".weight") in linear and (rows := _whole_rows(mask)) is not None
        }
        self.values = {
            name: parameters[name].detach()[self.rows[name]] if name in self.rows else parameters[name].detach().clone()
            for name in trained.elements
        }
        if trained.projection is not None:
            parts = {ENCODE: trained.projection.encode, DECODE: trained.projection.decode}
            self.values |= {name: part.float().to(self.device) for name, part in parts.items()}
        self.masks = {name: mask.to(self.device) for name, mask in trained.elements.items() if name not in self.rows}
        self._products = ConstantProducts(
            {
                f"{name}.weight": Product(m.weight, self.rows.get(f"{name}.weight"))
                for name, m in linear.items()
                if f"{name}.weight" not in self.masks
            },
            once,
        )
        leaves = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        with torch.enable_grad(), self._products.learning():
            self(None, example, leaves)

    def __call__(self, window: int | None, call: Call, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the module on one window, by its number, with these values of its trained elements: (1, T, width)."""
        substituted = {name: value for name, value in values.items() if name not in self.rows}
        if self.trained.projection is not None:
            substituted |= _basis(values, self.held)
        with self._products.at(window, {name: values[name] for name in self.rows}):
            return output(self.module, call, substituted)

    def rounded(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return values as they will be stored: in the dtype of the model's weights. A projection is fp32."""
        keep = (ENCODE, DECODE) if self.trained.projection is not None else ()
        return {n: value if n in keep else value.to(self.dtype).float() for n, value in values.items()}

    def updates(self, dense: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write values into the whole parameters of before the cut, by their names relative to the module."""
        new = {}
        for name in self.trained.elements:
            whole, value = dense[name].clone(), values[name].to("cpu", self.dtype)
            if name in self.rows:
                whole[self.rows[name].cpu()] = value
            else:
                whole = torch.where(self.trained.elements[name], value, whole)
            new[name] = whole
        return new

    def projection(self, values: Mapping[str, torch.Tensor]) -> Projection | None:
        """Return the trained projection, with encode @ decode = I; None for a selection."""
        if self.trained.projection is None:
            return None
        encode, decode = (values[name].detach().cpu().double() for name in (ENCODE, DECODE))
        return Projection(encode.float(), _inverse(encode, decode).float().contiguous())


def output(module: nn.Module, call: Call, substituted: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Run a module in fp32 on a call, with other values of some parameters: (1, T, width)."""
    device = next(module.parameters()).device
    args, kwargs = (moved(part, device, wide=True) for part in (call.args, call.kwargs))
    out = functional_call(module, dict(substituted or {}), args, kwargs)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context manager: no parameter of a module wants a gradient, and it is in eval mode."""
    with requires_grad(module, False), evaluating(module):
        yield


def _whole_rows(mask: torch.Tensor) -> torch.Tensor | None:
    """Return the rows that are trained, if they are trained whole: int64 (rows,); else None."""
    rows = mask.all(1)
    return rows.nonzero().flatten() if torch.equal(rows, mask.any(1)) else None


def _inverse(encode: torch.Tensor, decode: torch.Tensor) -> torch.Tensor:
    """Return decode (encode decode)^-1, so that decode @ encode is a projector."""
    inverse: torch.Tensor = torch.linalg.inv(encode @ decode)
    return decode @ inverse


def _basis(values: Mapping[str, torch.Tensor], held: Basis | None) -> dict[str, torch.Tensor]:
    """Return the parameters of the projected state, composed with the basis that the state had before."""
    encode, decode = values[ENCODE], _inverse(values[ENCODE], values[DECODE])
    if held is not None:
        encode, decode = encode @ held[0].to(encode), held[1].to(decode) @ decode
    return {ENCODE: encode, DECODE: decode}
