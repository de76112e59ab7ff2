"""Simulated devices on the CPU: each computes as usual, and refuses tensors of another device.

So code for several GPUs runs without one, and a tensor that it does not move is an error as on real devices. A process
that calls `devices` has them until it ends, so tests run it in a process of its own. They are called other:0 and
other:1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME, COUNT = "other", 2
BETWEEN = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_")  # take tensors from other devices, too


class Elsewhere(torch.Tensor):
    """A tensor on one of the devices; `value` is its content on the CPU."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor, device: torch.device) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=device,
        )  # fmt: skip
        made.value = value
        return made

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, new: Elsewhere) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.value = new.value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    """Torch mode that intercepts the functions that create tensors on the devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Backend(registration._DummyBackendModule):
    """The functions that torch requires of a device's module."""

    def device_count(self) -> int:
        return COUNT

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


@contextmanager
def devices() -> Iterator[None]:
    """Context manager that registers the devices."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(.., device=)` makes it on the CPU, and moves it
    with Dispatch():
        yield


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, with its result on the inputs' device. Raises RuntimeError for several devices."""
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    places = {t.device for t in tensors if t.dim() or isinstance(t, Elsewhere)}  # a number on the CPU goes anywhere
    if name not in BETWEEN and len(places) > 1:
        raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(map(str, places)))}")
    where = torch.device(kwargs.get("device") or (tensors[0].device if name in BETWEEN else next(iter(places), "cpu")))
    here = kwargs | ({"device": torch.device("cpu")} if kwargs.get("device") is not None else {})
    args_here, here = tree_map_only(Elsewhere, lambda t: t.value, (args, here))
    if name == "aten::histc" and not args_here[0].is_floating_point():  # of whole numbers: not on the CPU
        args_here = (args_here[0].float(), *args_here[1:])
    out = func(*args_here, **here)
    if name.endswith("_"):
        return args[0]  # in place
    return out if where.type == "cpu" else tree_map_only(torch.Tensor, lambda t: Elsewhere(t, where), out)
