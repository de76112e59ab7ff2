"""The export gguf without an engine: names, shapes and values against the model, element types, refusals."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.formats.gguf import check_gguf, element_type
from sspruner.formats.gguf_attention import _neighbours
from sspruner.formats.gguf_blocks import parts
from sspruner.formats.gguf_epsilon import BOUND, Epsilons, check_difference, epsilon_of, epsilons
from sspruner.formats.gguf_options import GGUF, TYPES
from sspruner.formats.writers import gguf_options, writer_of
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.command import run
from support.examples import examples
from support.gguf_cases import VARIANTS, axes_of, cut, variant
from support.projected import every_state
from support.tiny import half, tiny_model
from support.zoo import zoo

ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def read(folder: Path) -> Any:
    return gguf.GGUFReader(folder / "model.gguf")


def written(model: Any, folder: Path, **options: Any) -> Any:
    """Export a model, warnings of limits of dt left out, and read the file back."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="llama.cpp has one epsilon")
        return read(sspruner.export(model, folder, to=GGUF(**options)))


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def values(reader: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in fp32 and in torch's order of dimensions."""
    return {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type).astype(np.float32)).view([*map(int, t.shape)][::-1])
        for t in reader.tensors
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_names_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    """Every tensor is one of the package's list for the architecture, and has the size that the fields say."""
    reader = written(variant(name), tmp_path / "out")
    found, tensors = fields(reader), values(reader)
    arch = found["general.architecture"]
    if arch in ARCHITECTURES:  # the package is older than bailingmoe3
        kinds = gguf.MODEL_TENSORS[ARCHITECTURES[arch]]
        known = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in kinds for i in range(found[f"{arch}.block_count"])}
        assert {n.removesuffix(".weight").removesuffix(".bias") for n in tensors} <= known
    if f"{arch}.kda.head_dim" in found:
        return  # test_gguf_delta.py
    hidden, inner = found[f"{arch}.embedding_length"], found[f"{arch}.ssm.inner_size"]
    assert tensors["token_embd.weight"].shape == (found[f"{arch}.vocab_size"], hidden)
    mixers = [n.split(".")[1] for n in tensors if n.endswith("ssm_out.weight")]
    for i in mixers:
        assert tensors[f"blk.{i}.ssm_out.weight"].shape == (hidden, inner)
        assert bool((tensors[f"blk.{i}.ssm_a"] < 0).all())


def test_values_of_mamba2(tmp_path: Path) -> None:
    """Without cuts of norms nothing is scaled: the tensors are the model's, bit for bit, in llama.cpp's shapes."""
    model = tiny_model(groups=2)
    tensors, mixer = values(written(model, tmp_path / "out")), model.backbone.layers[1].mixer
    assert torch.equal(tensors["token_embd.weight"], model.backbone.embeddings.weight)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    assert torch.equal(tensors["blk.1.ssm_in.weight"], mixer.in_proj.weight)
    assert torch.equal(tensors["blk.1.ssm_conv1d.weight"], mixer.conv1d.weight[:, 0])
    assert torch.equal(tensors["blk.1.ssm_conv1d.bias"], mixer.conv1d.bias)
    assert torch.equal(tensors["blk.1.ssm_a"], -mixer.A_log.exp()[:, None])
    assert torch.equal(tensors["blk.1.ssm_d"], mixer.D[:, None])
    assert torch.equal(tensors["blk.1.ssm_dt.bias"], mixer.dt_bias)
    assert torch.equal(tensors["blk.1.ssm_norm.weight"], mixer.norm.weight.view(2, -1))
    assert torch.equal(tensors["blk.1.ssm_out.weight"], mixer.out_proj.weight)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**16))
@examples(6)
def test_neighbours_rotate_as_halves(heads: int, pairs: int, beside: int, seed: int) -> None:
    """Rotating neighbours of the reordered rows is rotating halves of the first rows, reordered; the others stay."""
    rotated, dim = 2 * pairs, 2 * pairs + beside
    x = torch.randn(heads * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle = torch.arange(1, pairs + 1, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    h = x.view(heads, dim).clone()
    first, second = h[:, :pairs].clone(), h[:, pairs:rotated].clone()
    h[:, :pairs], h[:, pairs:rotated] = first * cos - second * sin, second * cos + first * sin
    ours = _neighbours(x, dim, rotated).view(heads, dim).clone()
    even, odd = ours[:, 0:rotated:2].clone(), ours[:, 1:rotated:2].clone()
    ours[:, 0:rotated:2], ours[:, 1:rotated:2] = even * cos - odd * sin, odd * cos + even * sin
    assert torch.allclose(ours, _neighbours(h.flatten(), dim, rotated).view(heads, dim))


@pytest.mark.parametrize("axes", [("head",), ("hidden",), ("head_dim", "hidden")])
def test_one_epsilon_is_exact_for_uniform_cuts(axes: tuple[str, ...], tmp_path: Path) -> None:
    """The norms read a residual stream that is scaled, so that each keeps its own ratio of epsilon to mean square."""
    model = cut(variant("mamba2, tied"), *axes)
    described = parts(model)
    chosen = epsilons(described)
    assert chosen.one == epsilon_of(described.mixer_norms[0])
    assert math.isclose(chosen.one / chosen.stream**2, epsilon_of(described.norm))
    assert check_difference(model, described, chosen) == ""
    tensors = values(written(model, tmp_path / "out"))
    ratio = tensors["token_embd.weight"] / model.backbone.embeddings.weight
    assert torch.allclose(ratio, torch.tensor(chosen.stream))
    assert torch.allclose(tensors["output_norm.weight"] * chosen.stream, model.backbone.norm_f.weight)


def test_other_epsilons_are_measured_and_refused_above_a_bound() -> None:
    model = tiny_model(layers=3)
    norms = [layer.mixer.norm for layer in model.backbone.layers]
    norms[0].variance_epsilon *= 1.5
    described = parts(model)
    chosen = epsilons(described)
    assert (
        "1 of 3 norms after the scan have other epsilons; written all the same: the logits differ by"
        in check_difference(model, described, chosen)
    )
    assert norms[0].variance_epsilon == 1.5 * norms[1].variance_epsilon, "the model is as it was"
    norms[0].variance_epsilon = 1e3
    with pytest.raises(sspruner.ModelError, match=f"above {BOUND:g}"):
        check_difference(model, described, epsilons(described))


def test_limits_of_dt_are_measured() -> None:
    model = zoo("mamba2", bias=False, time_step_limit=(0.0, 1e9))
    described = parts(model)
    assert "dt is limited to [0.0, 1000000000.0]; written all the same: the logits differ by 0.0" in check_difference(
        model, described, epsilons(described)
    )
    for mixer in described.mixers:
        mixer.time_step_limit = (0.5, 0.6)
    with pytest.raises(sspruner.ModelError, match=r"dt is limited to \[0.5, 0.6\]; the logits would differ"):
        check_difference(model, described, epsilons(described))


@given(st.floats(1e-8, 1e-2), st.floats(1e-8, 1e-2))
@examples(6)
def test_scaled_rows_give_a_norm_any_epsilon(one: float, other: float) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    s = Epsilons(one).rows(other)
    norm = lambda y, e: y / (y.square().mean(-1, keepdim=True) + e).sqrt()  # noqa: E731
    assert torch.allclose(norm(s * x, one), norm(x, other))


@pytest.mark.parametrize("kind", TYPES)
def test_element_types(kind: str, tmp_path: Path) -> None:
    """Matrices are stored in the type, within its step; vectors, convolutions, A and D in f32, unchanged."""
    model = tiny_model(heads_per_group=4, head_dim=32)  # hidden size 64: rows are multiples of 32
    reader, exact = written(model, tmp_path / "out", type=kind), values(written(model, tmp_path / "f32", type="f32"))
    stored = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    assert stored["blk.0.ssm_in.weight"] == kind
    assert stored["token_embd.weight"] == ("q8_0" if kind.startswith("q") else kind)
    bits = {"f32": 24, "f16": 10, "bf16": 7, "q8_0": 6, "q5_1": 4, "q5_0": 3, "q4_1": 3, "q4_0": 2}[kind]
    for name, tensor in values(reader).items():
        off = float((tensor - exact[name]).abs().max() / exact[name].abs().max())
        assert off <= (0.0 if stored[name] == "f32" else 2.0**-bits), name
    assert all(stored[n] == "f32" for n in stored if n.endswith(("conv1d.weight", "ssm_a", "ssm_d", "norm.weight")))
    assert (
        fields(reader)["general.file_type"]
        == gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    )


def test_rows_that_cannot_be_quantised(tmp_path: Path) -> None:
    assert element_type("blk.0.ssm_in.weight", torch.Size((8, 33)), "q4_0") == "f16"
    assert element_type("blk.0.ssm_norm.weight", torch.Size((2, 64)), "q4_0") == "f32"
    with pytest.warns(UserWarning, match="matrices are f16, not q8_0: their rows are no multiple of 32"):
        sspruner.export(tiny_model(), tmp_path / "out", to=GGUF("q8_0"))
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(sspruner.ModelError, match=r"output.weight has values beyond the range of f16"):
        sspruner.export(model, tmp_path / "f16", to=GGUF("f16"))
    assert not (tmp_path / "f16").exists()


def test_the_type_is_the_model_s(tmp_path: Path) -> None:
    reader = written(tiny_model(dtype=torch.bfloat16), tmp_path / "out")
    assert {t.tensor_type.name for t in reader.tensors if t.name.endswith("ssm_in.weight")} == {"BF16"}


def test_what_was_cut_is_in_the_file(tmp_path: Path) -> None:
    model = sspruner.apply(tiny_model(), half(sspruner.trace(tiny_model())))
    found = fields(written(model, tmp_path / "out"))
    assert json.loads(found["sspruner.cuts"]) == [
        [{"unit": f"backbone.layers.{i}.mixer:state", "before": 6, "after": 3} for i in range(2)]
    ]
    assert found["mamba2.ssm.state_size"] == 3
    assert found["sspruner.version"]
    assert found["tokenizer.ggml.model"] == "no_vocab"
    assert "sspruner.cuts" not in fields(written(tiny_model(), tmp_path / "dense"))


REFUSED: dict[str, tuple[Any, str]] = {
    "zamba": (lambda: zoo("zamba"), "llama.cpp has no models of type zamba;"),
    "zamba2": (lambda: zoo("zamba2"), "llama.cpp has no models of type zamba2;"),
    "projected": (
        lambda: sspruner.apply(tiny_model(), every_state(sspruner.trace(tiny_model()))),
        "no projected states",
    ),
    "bias of in_proj": (lambda: zoo("mamba2"), "no place for backbone.layers.0.mixer.in_proj.bias and 5 more"),
    "bias of o_proj": (
        lambda: zoo("falcon_h1", bias=False, mamba_rms_norm=False, attention_bias=True),
        "no place for model.layers.0.self_attn.o_proj.bias",
    ),
    "norm before the gate": (lambda: zoo("falcon_h1", bias=False), "mamba_norm_before_gate"),
    "channels": (
        lambda: cut(zoo("mamba", bias=False), "channel"),
        "twice the hidden size as channels alone, here 16; they are 8",
    ),
    "attention of jamba": (
        lambda: zoo("jamba", bias=False),
        "jamba's attention as wide as the hidden size, 8, alone; it is 16",
    ),
    "experts in some": (lambda: zoo("nemotron_h", bias=False), "experts in all of Nemotron-H's MLP layers, or in none"),
    "activation": (lambda: zoo("mamba", bias=False, hidden_act="gelu"), "with silu alone; hidden_act is gelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    with pytest.raises(sspruner.ModelError, match=f"^gguf: .*{why}"):
        sspruner.export(make(), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_dropped_mixers_and_uneven_layers(tmp_path: Path) -> None:
    model = zoo("falcon_h1", bias=False, mamba_rms_norm=False, attention_bias=False)
    dropped = sspruner.apply(model, Plan({"model.layers:mixer": Selection(3, ((0, 2),))}))
    with pytest.raises(sspruner.ModelError, match="layer 1 has no mixer"):
        sspruner.export(dropped, tmp_path / "out", to="gguf")
    uneven = sspruner.apply(tiny_model(), Plan({"backbone.layers.0.mixer:state": Selection(6, ((0, 1),))}))
    with pytest.raises(sspruner.ModelError, match=r"one state size for all layers; here are 2, 6. --to gguf-padded"):
        sspruner.export(uneven, tmp_path / "out", to="gguf")
    assert fields(written(uneven, tmp_path / "padded", padded=True))["mamba2.ssm.state_size"] == 6


def test_zero_biases_have_a_place(tmp_path: Path) -> None:
    model = zoo("mamba2")
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.bias.zero_()
            layer.mixer.out_proj.bias.zero_()
    assert check_gguf(model)
    assert written(model, tmp_path / "out")


def test_options(tmp_path: Path) -> None:
    with pytest.raises(sspruner.InputError, match="--gguf-type q3: unknown type; known: f32, f16"):
        GGUF("q3")
    with pytest.raises(sspruner.InputError, match="--pre is an option of --to gguf, not of --to hf"):
        gguf_options("hf", GGUF(pre="gpt-2"))
    with pytest.raises(sspruner.InputError, match="--pre gpt-2: names a pre-tokenizer, and the model has no tokenizer"):
        sspruner.export(tiny_model(), tmp_path / "out", to=GGUF(pre="gpt-2"))
    assert writer_of(None, "llama.cpp") == "gguf"
    assert writer_of("gguf-padded", "llama.cpp") == "gguf-padded"
    with pytest.raises(sspruner.InputError, match=r"llama.cpp does not read that; it reads --to gguf or gguf-padded"):
        writer_of("hf", "llama.cpp")


def test_the_package_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        sspruner.InputError, match=r"needs the package gguf: in a clone of sspruner, pip install '\.\[gguf\]'"
    ):
        sspruner.export(tiny_model(), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_another_model_may_be_replaced(tmp_path: Path) -> None:
    sspruner.export(tiny_model(), tmp_path / "out", to="gguf")
    with pytest.raises(sspruner.InputError, match="exists and is not empty"):
        sspruner.export(tiny_model(), tmp_path / "out", to="gguf")
    sspruner.export(tiny_model(layers=1), tmp_path / "out", to="gguf", overwrite=True)
    assert fields(read(tmp_path / "out"))["mamba2.block_count"] == 1


KILLED = """
import os, signal, sys
import sspruner, gguf
from support.tiny import tiny_model
write, count = gguf.GGUFWriter.write_tensor_data, []
def some(self, tensor):
    count.append(1)
    if len(count) == 5:
        self.fout[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, tensor)
gguf.GGUFWriter.write_tensor_data = some
sspruner.export(tiny_model(), sys.argv[1], to="gguf")
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], env=_environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


def _environment() -> dict[str, str]:
    import os

    from support.paths import ROOT, TESTS

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = run("export", "--to", "gguf", "--gguf-type", "q8_0", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    assert "llama-server --model" in done.stdout
    found = fields(read(tmp_path / "out"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    done = run("export", "zamba2-books", "--to", "gguf", "--out", str(tmp_path / "zamba2"))
    assert done.exit_code == 2
    assert "llama.cpp has no models of type zamba2" in done.stderr


def test_axes_that_can_be_cut_alone() -> None:
    """What the engine's tests cut: a change here is a change of what they cover."""
    assert axes_of("mamba2") == ["state", "head", "head_dim", "group", "hidden", "block"]
    assert axes_of("mamba") == ["state", "dt_rank", "block"]
