"""Checkpoints of mamba_ssm: read as transformers' models, and written so that their own loader takes them.

The stand-ins of tests/support/native.py read and write as mamba_ssm 2.2 does: MambaConfig(**config.json), a strict load
of pytorch_model.bin.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.formats.native import MAMBA1, MAMBA2
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.examples import examples
from support.native import MambaConfig, MambaLMHeadModel, native_model
from support.native_files import FILES, MIXERS, write
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo


def read(folder: Path) -> MambaLMHeadModel:
    """As mamba_ssm's from_pretrained."""
    model = MambaLMHeadModel(
        MambaConfig(**json.loads((folder / "config.json").read_text()) | {"fused_add_norm": False})
    )
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return model.eval()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    """Two implementations of one model: equal but for rounding."""
    with torch.no_grad():
        first, second = (model(tokens()).logits for model in (one, other))
    assert (first - second).abs().max() <= 1e-4 * first.abs().max()


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: f"{m['layer']}-{m['d_state']}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_native_checkpoint_becomes_the_same_model(
    mixer: dict[str, Any], tied: bool, file: str, tmp_path: Path
) -> None:
    theirs = native_model(**mixer, tied=tied)
    ours, tokenizer = sspruner.load(write(theirs, tmp_path / "native", file))
    assert tokenizer is None
    assert type(ours).__name__ == {"Mamba1": "MambaForCausalLM", "Mamba2": "Mamba2ForCausalLM"}[mixer["layer"]]
    assert_close(theirs, ours)
    assert (ours.lm_head.weight is ours.backbone.embeddings.weight) == tied
    assert str(sspruner.trace(skeleton(tmp_path / "native"))) == str(sspruner.trace(ours))


def test_the_padded_vocabulary_is_kept(tmp_path: Path) -> None:
    """31 words in an embedding of 32 rows: the model has 32."""
    ours, _ = sspruner.load(write(native_model(**MIXERS[0]), tmp_path / "native"))
    assert ours.config.vocab_size == len(ours.backbone.embeddings.weight) == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write(native_model(**MIXERS[0], dtype=dtype), tmp_path / "native")
    assert {p.dtype for p in sspruner.load(folder)[0].parameters()} == {dtype}
    assert {p.dtype for p in sspruner.load(folder, dtype="float32")[0].parameters()} == {torch.float32}


def test_fields_that_are_left_out_have_mamba_ssms_defaults(tmp_path: Path) -> None:
    theirs = native_model("Mamba2", d_model=64, d_state=MAMBA2["d_state"], headdim=MAMBA2["headdim"], layers=1)
    folder = write(theirs, tmp_path / "native")
    (folder / "config.json").write_text(
        json.dumps({"d_model": 64, "n_layer": 1, "vocab_size": 31, "ssm_cfg": {"layer": "Mamba2"}})
    )
    assert_close(theirs, sspruner.load(folder)[0])
    theirs = native_model("Mamba1", d_model=40, d_state=MAMBA1["d_state"], dt_rank=3, layers=1)
    folder = write(theirs, tmp_path / "one")
    (folder / "config.json").write_text(json.dumps({"d_model": 40, "n_layer": 1, "vocab_size": 31}))
    assert_close(theirs, sspruner.load(folder)[0])  # ceil(40 / 16) = 3


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"attn_layer_idx": [1]}, "it has attention layers"),
        ({"d_intermediate": 8}, "it has MLPs between the mixers"),
        ({"rms_norm": False}, "it has LayerNorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "it has a scan on 8 of 16 channels"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "it has a D for every channel"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "it has mixers without a norm"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "it has norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "twist": 1}}, "ssm_cfg.twist is not a field"),
        ({"ssm_cfg": [1]}, "ssm_cfg is not a table"),
        ({"taste": 1}, "taste is not a field"),
        ({"d_model": "wide"}, "config.json: "),
        ({"n_layer": -1}, "-1 where a whole number above 0 is expected"),
        ({"n_layer": 3}, "its weights lack"),
        ({"n_layer": 1}, "config.json knows nothing of"),
        ({"vocab_size": 99}, "its embedding has 32 rows; a vocabulary of 99 is padded to 104"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    theirs = native_model(**MIXERS[0])
    folder = write(theirs, tmp_path / "native")
    (folder / "config.json").write_text(json.dumps(theirs.config.__dict__ | config))
    with pytest.raises(sspruner.ModelError, match=says):
        sspruner.load(folder)


class Payload:
    """What a malicious pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/sspruner-ran-a-pickle"),)


def test_a_pickle_of_anything_but_tensors_is_not_run(tmp_path: Path) -> None:
    folder = write(native_model(**MIXERS[0]), tmp_path / "native")
    torch.save({"backbone.embedding.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(sspruner.ModelError, match=r"pytorch_model\.bin cannot be read \(UnpicklingError"):
        sspruner.load(folder)
    assert not Path("/tmp/sspruner-ran-a-pickle").exists()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(sspruner.ModelError, match="is not a table of tensors"):
        sspruner.load(folder)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../native/model.safetensors"}}, "not a file of this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a file of this folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, "which is missing"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
@pytest.mark.parametrize("native", [True, False], ids=["native", "hf"])
def test_an_index_names_files_of_its_folder_alone(index: Any, says: str, native: bool, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    if native:
        write(native_model(**MIXERS[0]), folder)
    else:
        sspruner.save(tiny_model(), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(sspruner.ModelError, match=says):
        sspruner.load(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = write(native_model(**MIXERS[0]), tmp_path / "native")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(sspruner.ModelError, match="no weights in this folder"):
        sspruner.load(folder)


def test_the_tokenizer_of_another_folder(tmp_path: Path) -> None:
    folder = write(native_model(**MIXERS[0]), tmp_path / "native")
    _, own = sspruner.load()
    _, found = sspruner.load(folder, tokenizer="mamba2-books-4m")
    assert found("Once upon")["input_ids"] == own("Once upon")["input_ids"]
    with pytest.raises(sspruner.InputError, match=r"tokenizer .*native: there is none"):
        sspruner.load(folder, tokenizer=folder)


# Written for mamba_ssm


@examples(15)
@given(data=st.data())
def test_what_is_written_their_loader_reads(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any native model, cut to one size in all layers on the axes that they can say, and both ways."""
    mixer = data.draw(st.sampled_from(MIXERS))
    folder = tmp_path_factory.mktemp("native")
    theirs = native_model(**mixer, tied=data.draw(st.booleans()), layers=3)
    ours, _ = sspruner.load(write(theirs, folder / "in"))
    graph = sspruner.trace(ours)
    axes = ["state", "block"] if mixer["layer"] == "Mamba2" else ["state", "block", "dt_rank"]
    chosen: dict[str, Any] = {}
    for axis in data.draw(st.lists(st.sampled_from(axes), unique=True)):
        units = next(iter(graph.on_axis(axis).values())).units
        if units > 1:
            after = data.draw(st.integers(1, units - 1))
            for name, group in graph.on_axis(axis).items():
                chosen[name] = Selection(units, (tuple(range(units - after, units)),) * group.groups)
    if chosen:
        sspruner.apply(ours, Plan(chosen))
    out = sspruner.export(ours, folder / "out", to="mamba-ssm")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "pytorch_model.bin"
    }  # fmt: skip
    assert_close(read(out), ours)
    again, _ = sspruner.load(out)
    assert torch.equal(logits(copy.deepcopy(again), tokens()), logits(copy.deepcopy(ours), tokens()))


@pytest.mark.parametrize(
    ("family", "axis", "says"),
    [
        ("zamba2", "state", "mamba-ssm has no model of type 'zamba2'"),
        ("mamba2", "head", "mamba-ssm cannot express this cut: .*head uncut, at 2"),
        ("mamba", "hidden", "fixes its norms' epsilon at 1e-05"),
    ],
)
def test_what_mamba_ssm_cannot_read_is_refused(family: str, axis: str, says: str, tmp_path: Path) -> None:
    model = zoo(family)
    sspruner.apply(model, half(sspruner.trace(model), axis))
    with pytest.raises(sspruner.ModelError, match=says):
        sspruner.export(model, tmp_path / "out", to="mamba-ssm")
    assert not (tmp_path / "out").exists()


def test_channels_that_are_no_multiple_of_the_hidden_size_are_refused(tmp_path: Path) -> None:
    """mamba_ssm makes its caches with d_model * expand channels."""
    model = zoo("mamba")
    sspruner.apply(
        model, Plan({n: Selection(16, (tuple(range(12)),)) for n in sspruner.trace(model).on_axis("channel")})
    )
    with pytest.raises(sspruner.ModelError, match="wants a multiple of the hidden size 8 as channels; here are 12"):
        sspruner.export(model, tmp_path / "out", to="mamba-ssm")
