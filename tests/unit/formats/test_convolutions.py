"""The convolutions of q, k and v in a saved folder, each in its own tensor and size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sspruner
from sspruner.formats.convolutions import split_convolutions
from support.zoo import zoo

PARTS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")


def convolutions(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith(PARTS)}


@pytest.mark.parametrize("keep", [None, 3])
def test_each_part_has_the_rows_of_its_projection(tmp_path: Path, keep: int | None) -> None:
    """OLMo-hybrid's projections lie apart on disk: as many channels as rows, and the same after a cut."""
    model = zoo("olmo_hybrid")
    if keep:
        sspruner.prune(model, "magnitude", axis="state", keep=keep)
    sspruner.save(model, tmp_path / "olmo")
    found = convolutions(tmp_path / "olmo")
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "linear_attn")]
    assert len(found) == 3 * len(layers)
    for i in layers:
        mixer, first = model.model.layers[i].linear_attn, 0
        for letter in "qkv":
            rows = len(getattr(mixer, f"{letter}_proj").weight)
            part = found[f"model.layers.{i}.linear_attn.{letter}_conv1d.weight"]
            assert torch.equal(part, mixer.conv1d.weight[first : first + rows])
            first += rows
    again, _ = sspruner.load(tmp_path / "olmo")
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_equal_parts_are_left_alone(tmp_path: Path) -> None:
    """Where q, k and v have one size, the file that transformers wrote is not written again."""
    model = zoo("olmo_hybrid", heads=1, channels=6)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = file.stat().st_mtime_ns
    split_convolutions(model, tmp_path)
    assert file.stat().st_mtime_ns == before
