"""Checkpoints of a training run: one is whole or is none, whatever stopped the run that wrote it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from sspruner.compute.processes import barrier, rank, world
from sspruner.errors import InputError

KEPT = 2  # the last ones
WHOLE = ".metadata"  # torch.distributed.checkpoint writes it last
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is not trained is where it came from


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> None:
    """`write` a model, its moments, and `extra`: tensors and what JSON holds."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    write(folder, step, {"model": weights, "optimizer": moments, "extra": extra})


def write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `folder`/step-N, of all processes, and remove all but the last two.

    state: as torch.distributed.checkpoint takes it. Raises InputError where it cannot be written; those before stay.
    """
    target = folder / f"step-{step:08d}"
    try:
        with _alone():
            state_dict_saver.save(state, checkpoint_id=target, no_dist=world() == 1)
    except Exception as error:  # of the storage, wrapped by torch in one of its own
        raise InputError(
            f"checkpoint {target}: cannot be written ({_brief(error)}); {_last(folder)}make room, and run this again"
        ) from error
    if rank() == 0:
        for old in _whole(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def load(folder: Path, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> dict[str, Any] | None:
    """Put the last whole checkpoint into the model and the optimizer; returns its `extra`, None if there is none.

    extra: of the same form as what was saved. Raises InputError for one that is of another model, or is damaged.
    """
    if not _whole(folder):
        return None
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "extra": extra}
    read(folder, state)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    found: dict[str, Any] = state["extra"]
    return found


def read(folder: Path, state: dict[str, Any]) -> bool:
    """Fill `state`, in place, from the last whole checkpoint. Returns False if there is none.

    Raises InputError for one that is of another model, or is damaged.
    """
    whole = _whole(folder)
    if not whole:
        return False
    try:
        with _alone():
            state_dict_loader.load(state, checkpoint_id=whole[-1], no_dist=world() == 1)
    except Exception as error:
        raise InputError(
            f"checkpoint {whole[-1]}: cannot be read ({_brief(error)}); remove it, and run this again"
        ) from error
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning of torch that a single process writes alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / WHOLE).is_file())


def _last(folder: Path) -> str:
    whole = _whole(folder)
    return f"{whole[-1].name} is whole; " if whole else ""


def _brief(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split())[:200] or type(error).__name__
