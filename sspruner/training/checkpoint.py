"""Checkpoints of a training run: complete or ignored, however the run that wrote them was stopped."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from sspruner.compute.processes import barrier, rank, world
from sspruner.errors import InputError

KEPT = 2  # number of checkpoints to keep
COMPLETE = ".metadata"  # torch.distributed.checkpoint writes it last
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen parameters are not saved


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> None:
    """Write a checkpoint of a model, its optimizer, and `extra`: tensors and JSON values."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    write(folder, step, {"model": weights, "optimizer": moments, "extra": extra})


def write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `folder`/step-N, from all processes, and remove all but the last KEPT checkpoints.

    state: as for torch.distributed.checkpoint. Raises InputError if it cannot be written; earlier ones stay.
    """
    target = folder / f"step-{step:08d}"
    try:
        with _quiet():
            state_dict_saver.save(state, checkpoint_id=target, **_alone(state_dict_saver.save))
    except Exception as error:  # of the storage, wrapped by torch in one of its own
        raise InputError(
            f"checkpoint {target}: cannot be written ({_brief(error)}); {_last(folder)}make room, and run this again"
        ) from error
    if rank() == 0:
        for old in _complete(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def load(folder: Path, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> dict[str, Any] | None:
    """Load the last complete checkpoint into the model and the optimizer; return its `extra`, None if there is none.

    extra: with the same structure as was saved. Raises InputError for a damaged one, or one of another model.
    """
    if not _complete(folder):
        return None
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": extra}
    read(folder, state)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    loaded: dict[str, Any] = state["extra"]
    return loaded


def read(folder: Path, state: dict[str, Any]) -> bool:
    """Fill `state`, in place, from the last complete checkpoint. Return False if there is none.

    Raises InputError for a damaged one, or one of another model.
    """
    complete = _complete(folder)
    if not complete:
        return False
    try:
        with _quiet():
            state_dict_loader.load(state, checkpoint_id=complete[-1], **_alone(state_dict_loader.load))
    except Exception as error:
        raise InputError(
            f"checkpoint {complete[-1]}: cannot be read ({_brief(error)}); remove it, and run this again"
        ) from error
    return True


def _alone(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the argument that says that there are no other processes. torch up to 2.7 has none, and sees it itself."""
    return {"no_dist": True} if world() == 1 and "no_dist" in signature(function).parameters else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings that a single process writes without torch.distributed, and about its own storages."""
    with warnings.catch_warnings():
        for words in ("torch.distributed is (disabled|unavailable)", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", words, UserWarning)
        yield


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / COMPLETE).is_file())


def _last(folder: Path) -> str:
    complete = _complete(folder)
    return f"{complete[-1].name} is whole; " if complete else ""


def _brief(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split())[:200] or type(error).__name__
