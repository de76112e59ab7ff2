"""Folders with adapters of peft: refused by name, or merged on request; and weights that nothing takes are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sspruner
from sspruner.errors import InputError, ModelError
from support.command import refused, run, saved_zoo
from support.tiny import tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft.*", "ignore::FutureWarning:transformers.*")
DATA = tokens(2, 9)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_zoo(tmp_path / "base", "mamba2")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter of random values, and the logits of the model with it."""
    model, _ = sspruner.load(base)
    model.config._name_or_path = model.name_or_path = str(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", tuned(input_ids=DATA).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=DATA).logits


def test_it_is_merged_on_request_and_refused_otherwise(adapter: tuple[Path, torch.Tensor], base: Path) -> None:
    folder, expected = adapter
    with pytest.raises(InputError, match=r"holds an adapter \(peft\), .* \(merge_adapters=True\) merges it"):
        sspruner.load(folder)
    model, tokenizer = sspruner.load(folder, merge_adapters=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert tokenizer is not None
    assert type(model) is type(sspruner.load(base)[0])
    assert sspruner.prune(model, "ghost", sparsity=0.5, calibration=tokens(6, 20)).report.proof


def test_beside_a_model_it_is_refused_too(adapter: tuple[Path, torch.Tensor], base: Path) -> None:
    """Stock transformers would read the adapter's base model, whatever lies beside it."""
    for file in adapter[0].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="holds an adapter"):
        sspruner.load(base)
    with pytest.raises(InputError, match="holds an adapter"):
        sspruner.load(base, offload=base.parent / "work")
    refused(base.parent, ("holds an adapter",), "inspect", base)


def test_what_cannot_be_merged(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = adapter
    with pytest.raises(InputError, match="an adapter is merged in memory"):
        sspruner.load(folder, merge_adapters=True, offload=tmp_path / "work")
    config = json.loads((folder / "adapter_config.json").read_text())
    for wrong, message in (({"base_model_name_or_path": None}, "names no base model"), (None, "cannot be read")):
        (folder / "adapter_config.json").write_text("{" if wrong is None else json.dumps(config | wrong))
        with pytest.raises(ModelError, match=message):
            sspruner.load(folder, merge_adapters=True)


@pytest.mark.slow
def test_on_the_command_line(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 300)
    args = ("--sparsity", 0.5, "--calibration", tmp_path / "text.txt", "--samples", 4, "--seq-len", 32)
    result = run("prune", adapter[0], *args, "--merge-adapters", "--out", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    assert sspruner.load(tmp_path / "cut")[0].config.sspruner


def renamed(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapper(prefix: str, base: Path) -> None:
    renamed(base, lambda weights: {prefix + name: value for name, value in weights.items()})
    with pytest.raises(ModelError, match=rf"lack \d+ parameters.*; its names begin with '{prefix}'"):
        sspruner.load(base)


def test_weights_that_nothing_takes_are_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    renamed(base, lambda weights: weights | {"extra.weight": torch.ones(3)})
    sspruner.load(base)
    assert "no parameter takes 1 of its weights, e.g. extra.weight" in caplog.text
