"""Real readers of what is exported, in an environment of their own: `make oracle-env` builds .venv-oracle.

mamba_ssm's own class loads exports strictly and computes the same logits, and what it saves is read here; gguf has a
name for every tensor. Their code runs in .venv-oracle alone: an importable mamba_ssm changes transformers' models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sspruner
from sspruner.formats.native import EMBEDDING, native_fields
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.engines import needs
from support.engines import run as run_in
from support.tiny import logits, tiny_model, tokens
from support.zoo import zoo

pytestmark = needs("oracle")

IDS = tokens(2, 7)  # fit the vocabulary of every model below
TOLERANCE = 1e-4  # of the largest logit: two implementations of one model in fp32


run = partial(run_in, "oracle")


def keep(model: torch.nn.Module, **units: int) -> torch.nn.Module:
    """Cut: so many units of each axis stay in every layer, the last ones."""
    graph = sspruner.trace(model)
    groups = {name: group for axis in units for name, group in graph.on_axis(axis).items()}
    return sspruner.apply(
        model,
        Plan(
            {
                name: Selection(g.units, (tuple(range(g.units - units[g.axis], g.units)),) * g.groups)
                for name, g in groups.items()
            }
        ),
    )


def reference(name: str, dtype: str = "float32") -> torch.nn.Module:
    return sspruner.load(name, dtype=dtype)[0]


@dataclass
class Read:
    """A model that was exported, and what mamba_ssm's class made of the folder."""

    model: torch.nn.Module
    folder: Path
    theirs: dict[str, torch.Tensor]


MODELS = {
    "mamba2-books-4m": lambda: keep(reference("mamba2-books-4m"), state=24, block=2),
    "mamba2-books-4m in bfloat16": lambda: keep(reference("mamba2-books-4m", "bfloat16"), state=32),
    "mamba1-books": lambda: keep(reference("mamba1-books"), state=6, dt_rank=5, channel=192, block=2),
    "mamba1-books in bfloat16": lambda: keep(reference("mamba1-books", "bfloat16"), state=4),
    "two groups, biases, untied": lambda: keep(tiny_model(groups=2, bias=True, state=6), state=5),
    "one group, tied": lambda: keep(tiny_model(layers=3, tied=True, conv_bias=False), state=3, block=2),
    "mamba": lambda: keep(zoo("mamba"), state=2, channel=8),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Read]:
    """All in one process of theirs."""
    home = tmp_path_factory.mktemp("oracle")
    made = {name: make() for name, make in MODELS.items()}
    folders = {
        name: sspruner.export(model, home / str(i), to="mamba-ssm") for i, (name, model) in enumerate(made.items())
    }
    run("mamba_files.py", "read", json.dumps(IDS.tolist()), str(home), *map(str, folders.values()))
    found = [load_file(home / f"{i}.safetensors") for i in range(len(made))]
    return {name: Read(made[name], folders[name], theirs) for name, theirs in zip(made, found, strict=True)}


def their_tensors(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under transformers' names."""
    tensors = {name.removeprefix("model."): t for name, t in found.items() if name.startswith("model.")}
    return {EMBEDDING.get(name, name): tensor for name, tensor in tensors.items()}


def assert_same_tensors(found: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """To the bit; of a model in bfloat16 mamba_ssm holds what its scan reads in fp32, which changes no value."""
    ours = model.state_dict()
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        wide = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert found[name].dtype in ({tensor.dtype, torch.float32} if wide else {tensor.dtype}), name
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("name", MODELS)
def test_mamba_ssm_loads_every_tensor_strictly(name: str, exports: dict[str, Read]) -> None:
    """from_pretrained has the keys of its own class and no others; each tensor is that of the cut model, to the bit."""
    read = exports[name]
    assert_same_tensors(their_tensors(read.theirs), read.model)
    assert_same_tensors(their_tensors(read.theirs), sspruner.load(read.folder)[0])


@pytest.mark.parametrize("way", ["logits", "decoded"])
@pytest.mark.parametrize("name", [name for name in MODELS if "bfloat16" not in name])
def test_mamba_ssm_computes_the_same_logits(name: str, way: str, exports: dict[str, Read]) -> None:
    """By its own modules and kernels, all tokens at once, and token by token from its own caches."""
    read = exports[name]
    expected = logits(read.model, IDS)
    assert read.theirs[way].shape == expected.shape
    assert (read.theirs[way] - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("layer", "mixer", "tied"),
    [
        ("Mamba2", {"d_state": 5, "headdim": 4, "ngroups": 2, "bias": True, "chunk_size": 16}, True),
        ("Mamba2", {"d_state": 6, "headdim": 8, "conv_bias": False, "chunk_size": 16}, False),
        ("Mamba2", {"d_state": 4, "headdim": 4, "dt_limit": [0.2, 0.5], "chunk_size": 16}, True),
        ("Mamba1", {"d_state": 3}, True),
        ("Mamba1", {"d_state": 4, "dt_rank": 3, "bias": True, "d_conv": 3}, False),
    ],
)
def test_what_mamba_ssm_saves_is_read(layer: str, mixer: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    config = {
        "d_model": 8, "n_layer": 2, "vocab_size": 31, "tie_embeddings": tied, "ssm_cfg": {"layer": layer, **mixer}
    }  # fmt: skip
    run("mamba_files.py", "write", json.dumps(IDS.tolist()), str(tmp_path), json.dumps(config))
    found = load_file(tmp_path / "0.safetensors")
    model, _ = sspruner.load(tmp_path / "model")
    assert_same_tensors(their_tensors(found), model)
    expected = logits(model, IDS)
    for way in ("logits", "decoded")[: 1 if "dt_limit" in mixer else 2]:  # its decoding knows no limits
        assert (found[way] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert native_fields(model)["ssm_cfg"].items() >= mixer.items()


GGUF = {
    "mamba2-books-4m": lambda: keep(reference("mamba2-books-4m"), state=24, block=3),
    "mamba1-books": lambda: keep(reference("mamba1-books"), state=6, dt_rank=5),
    "two groups": lambda: keep(tiny_model(groups=2, state=6), state=5),
}


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    home = tmp_path_factory.mktemp("gguf")
    made = {name: make() for name, make in GGUF.items()}
    folders = [sspruner.export(model, home / str(i), to="hf") for i, model in enumerate(made.values())]
    found = json.loads(run("gguf_file.py", *map(str, folders)).splitlines()[-1])
    return {name: (model, read) for (name, model), read in zip(made.items(), found, strict=True)}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_has_a_name_for_every_tensor(name: str, gguf_files: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """And the file, read back, has the shapes that its own fields say: those that llama.cpp asks for."""
    model, found = gguf_files[name]
    f, shapes = found["fields"], found["shapes"]
    mamba1 = model.config.model_type == "mamba"
    assert found["architecture"] == model.config.model_type
    hidden, inner, state = f["embedding_length"], f["ssm.inner_size"], f["ssm.state_size"]
    rank, taps = f["ssm.time_step_rank"], f["ssm.conv_kernel"]
    assert (hidden, state, f["block_count"]) == (
        model.config.hidden_size, model.config.state_size, model.config.num_hidden_layers
    )  # fmt: skip
    expected = {"token_embd.weight": [hidden, model.config.vocab_size], "output_norm.weight": [hidden]}
    if not model.config.tie_word_embeddings:
        expected["output.weight"] = [hidden, model.config.vocab_size]
    channels = inner if mamba1 else inner + 2 * f["ssm.group_count"] * state
    block = {
        "attn_norm.weight": [hidden],
        "ssm_in.weight": [hidden, 2 * inner if mamba1 else inner + channels + rank],
        "ssm_conv1d.weight": [taps, channels],
        "ssm_conv1d.bias": [channels],
        "ssm_out.weight": [inner, hidden],
        "ssm_dt.bias": [inner if mamba1 else rank],
        "ssm_a": [state, inner] if mamba1 else [1, rank],
        "ssm_d": [inner] if mamba1 else [1, rank],
    }
    if mamba1:
        block |= {"ssm_x.weight": [inner, rank + 2 * state], "ssm_dt.weight": [rank, inner]}
    else:
        block |= {"ssm_norm.weight": [inner // f["ssm.group_count"], f["ssm.group_count"]]}
    expected |= {f"blk.{i}.{part}": shape for i in range(f["block_count"]) for part, shape in block.items()}
    assert shapes == expected
    log = model.backbone.layers[1].mixer.A_log.detach().double()
    assert found["sums"]["blk.1.ssm_a"] == pytest.approx(float(-torch.exp(log).sum()), rel=1e-5)
    embeddings = model.backbone.embeddings.weight.detach().double()
    assert found["sums"]["token_embd.weight"] == pytest.approx(float(embeddings.sum()), rel=1e-5, abs=1e-2)
