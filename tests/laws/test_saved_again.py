"""A cut model is the user's: what was trained and saved last, by whichever function, is what loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.plans.plan import Plan
from support.projected import PROJECTED, every_state
from support.round_trip import uniform
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo


def evenly(model: Any) -> Plan:
    return uniform(model, (0, 2, 3))


def heads(model: Any) -> Plan:
    return half(sspruner.trace(model), "head")


def in_one_layer(model: Any) -> Plan:
    plan = half(sspruner.trace(model), "state")
    name = next(iter(plan.groups))
    return Plan({name: plan.groups[name]})


def projected(model: Any) -> Plan:
    return every_state(sspruner.trace(model))


CUTS = [evenly, heads, in_one_layer, projected]


def trained(model: Any) -> Any:
    """Change every weight, as training does."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.03)
    return model


def cut_and_saved(cut: Callable[[Any], Plan], folder: Path) -> Any:
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, cut(model))
    sspruner.save(model, folder)
    return model


def check_loads(folder: Path, model: Any, tmp_path: Path) -> None:
    """Check that every reader gives the weights and the logits of `model`."""
    for found in (sspruner.load(folder)[0], sspruner.load(folder, offload=tmp_path / "working")[0]):
        expected = dict(model.named_parameters())
        assert {name for name, _ in found.named_parameters()} == set(expected)
        assert torch.allclose(logits(found, tokens()), logits(model, tokens()), rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "working", ignore_errors=True)


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
@pytest.mark.parametrize("same", [False, True], ids=["elsewhere", "in place"])
@pytest.mark.parametrize("cut", CUTS)
def test_what_save_pretrained_writes_is_what_loads(
    cut: Callable[[Any], Plan], same: bool, loaded: bool, tmp_path: Path
) -> None:
    model = cut_and_saved(cut, tmp_path / "cut")
    if loaded:
        model, _ = sspruner.load(tmp_path / "cut")
    folder = tmp_path / ("cut" if same else "other")
    trained(model).save_pretrained(folder)
    check_loads(folder, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_saved_by_turns(cut: Callable[[Any], Plan], tmp_path: Path) -> None:
    """By `save_pretrained` before any `sspruner.save`, over what that wrote, and the other way around."""
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, cut(model))
    for turn in range(2):
        trained(model).save_pretrained(tmp_path / "a")
        check_loads(tmp_path / "a", model, tmp_path)
        sspruner.save(trained(model), tmp_path / "a", overwrite=True)
        check_loads(tmp_path / "a", model, tmp_path)
        model, _ = sspruner.load(tmp_path / "a")
        assert turn in (0, 1)


@pytest.mark.parametrize("cut", CUTS)
def test_saving_changes_nothing_in_the_models_config(cut: Callable[[Any], Plan], tmp_path: Path) -> None:
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, cut(model))
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    sspruner.save(model, tmp_path / "a")
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before
    assert "weights" not in sspruner.load(tmp_path / "a")[0].config.sspruner


def test_a_folder_in_which_it_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """The config says the subfolder, as `sspruner.save` wrote it, and other weights lie beside it."""
    model = cut_and_saved(heads, tmp_path / "cut")
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "cut")
    for options in ({}, {"offload": tmp_path / "working"}):
        with pytest.raises(sspruner.ModelError, match=r"beside config\.json and in weights/, and it cannot be told"):
            sspruner.load(tmp_path / "cut", **options)


def test_folders_of_version_0_1_0(tmp_path: Path) -> None:
    """Its `save` left the subfolder's name in the live config, and `save_pretrained` wrote it where there is none."""
    model = cut_and_saved(heads, tmp_path / "cut")
    trained(model).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["sspruner"]["weights"] = "weights"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    check_loads(tmp_path / "other", model, tmp_path)


def test_other_files_beside_the_config_are_no_weights(tmp_path: Path) -> None:
    """Such as those of a Trainer: the weights are still those in the subfolder."""
    model = cut_and_saved(heads, tmp_path / "cut")
    torch.save({}, tmp_path / "cut" / "training_args.bin")
    check_loads(tmp_path / "cut", model, tmp_path)


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", PROJECTED)
def test_stock_classes_never_read_a_projected_model_as_the_dense_one(family: str, tmp_path: Path) -> None:
    """They refuse what `save_pretrained` writes: the config says how many coordinates there are, not how many rows."""
    model = zoo(family)
    sspruner.prune(model, "balanced", sparsity=0.5, calibration=tokens(8, 40))
    model.save_pretrained(tmp_path / "again")
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(tmp_path / "again")
    loaded, _ = sspruner.load(tmp_path / "again")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
