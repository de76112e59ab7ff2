"""sspruner doctor: all is well here; hazards, and code that computes something else, are FAILs that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import sspruner
from sspruner import doctor
from sspruner.doctor import Check, diagnose
from sspruner.errors import PluginError
from sspruner.graph import causality
from sspruner.graph.family import DeltaProjected, Projected
from sspruner.graph.known import installed_families
from sspruner.plugins import manager
from support.command import done, run
from support.oracle import delta_output, output, selective_output
from support.paths import ROOT
from support.zoo import FAMILIES, SHAPES, zoo

TESTED = [f"{family} {test}" for family in sorted(FAMILIES) for test in ("class", "causality", "recurrence")]
NATIVE = ["mamba_ssm.Mamba", "mamba_ssm.Mamba2", "mamba_ssm.Mamba3"]
LACKING = [family for family in SHAPES if family not in FAMILIES]  # those of a newer transformers


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say what machine they are on."""
    monkeypatch.setattr(doctor, "_nvidia", lambda: False)
    monkeypatch.setattr(doctor, "_gpu", lambda: "")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let only these families be installed: the others take time."""
    installed = installed_families()

    def choose(*names: str) -> None:
        monkeypatch.setattr(doctor, "installed_families", lambda: {name: installed[name] for name in names})

    return choose


def checks() -> dict[str, Check]:
    found = list(diagnose())
    assert all(check.says and "\n" not in check.says for check in found)
    return {check.name: check for check in found}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if not check.ok]


@pytest.mark.slow
def test_all_is_well_here() -> None:
    lines = done("doctor").stdout.splitlines()
    assert {line[:6] for line in lines} == {"PASS  ", "SKIP  "}
    names = [line[6:].partition(": ")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert set(TESTED + NATIVE + LACKING) == set(names) - {
        "python", "sspruner", "torch", "transformers", "mamba_ssm", "causal_conv1d", "triton", "kernels", "plugins",
    }  # fmt: skip
    says = dict(line[6:].split(": ", 1) for line in lines)
    assert says["sspruner"] == sspruner.__version__
    assert says["torch"].startswith(torch.__version__)
    assert says["transformers"] == metadata.version("transformers")
    assert {says[name] for name in NATIVE} == {
        "no self-test is known; sspruner.testing.check_family tests it on your models"
    }


def test_json_is_json(only: Callable[..., None], tmp_path: Path) -> None:
    only("mamba2")
    found = json.loads(done("doctor", "--json", "-").stdout)
    assert found["ok"] is True
    assert [set(check) for check in found["checks"]] == [{"name", "ok", "says", "skipped"}] * len(found["checks"])
    assert done("doctor", "--json", tmp_path / "found.json").stdout.count("PASS") == len(found["checks"])
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == found
    result = run("doctor", "--json", tmp_path / "nowhere" / "found.json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_failure_is_in_the_json_and_in_the_exit_code(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("mamba2")
    monkeypatch.setattr(doctor, "_torch", lambda: Check("torch", False, "wrong"))
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "\nFAIL  torch: wrong\nPASS  transformers: " in result.stdout  # and it goes on
    result = run("doctor", "--json", "-")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)


def importable(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find_spec = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: True if name in names else find_spec(name))


@pytest.mark.cover(most=1)
@pytest.mark.parametrize("name", ["mamba_ssm", "causal_conv1d"])
def test_kernels_without_a_gpu(name: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2")
    importable(monkeypatch, name)
    found = checks()
    assert failed(found) == [name]
    assert f"pip uninstall {name.replace('_', '-')}" in found[name].says
    assert found[name].says.startswith("version unknown, and torch")
    monkeypatch.setattr(metadata, "version", lambda name: "5.23.0")
    assert checks()[name].says.startswith("5.23.0, and torch sees no GPU")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_kernels_of_a_gpu_are_called_on_the_cpu(tmp_path: Path) -> None:
    """Why they are a hazard: transformers binds what can be imported. The day it looks at the device, this fails."""
    (tmp_path / "causal_conv1d.py").write_text(
        "def causal_conv1d_fn(*args, **kwargs):\n    raise RuntimeError('Expected x.is_cuda() to be true.')\n"
    )
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from sspruner.cli.main import main; main()"
    command, blind = [sys.executable, "-c", code, "doctor"], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, env=blind, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (1, "")
    wrong = [line for line in ran.stdout.splitlines() if line.startswith("FAIL")]
    assert wrong[0].startswith("FAIL  causal_conv1d: version unknown, and torch sees no GPU")
    for family in "mamba2", "mamba":
        fails = (
            f"FAIL  {family} causality: the installed code fails: RuntimeError: Expected x.is_cuda() to be true. Do not"
        )
        assert any(line.startswith(fails) for line in wrong), family


def test_kernels_with_a_gpu_are_well_but_the_tiny_models_cannot_run_on_them(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("mamba2")
    importable(monkeypatch, "mamba_ssm")
    monkeypatch.setattr(doctor, "_gpu", lambda: "NVIDIA H100")
    found = checks()
    assert not failed(found)
    assert "NVIDIA H100" in found["torch"].says
    assert "not tested: its code calls the kernels of mamba_ssm" in found["mamba2"].says
    assert "mamba2 causality" not in found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.22.2", "4.57.1", "5.2"])
def test_a_transformers_that_looks_ahead(
    version: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("mamba2")
    monkeypatch.setattr(metadata, "version", lambda name: version)
    found = checks()
    assert failed(found) == ["transformers"]
    assert version in found["transformers"].says
    assert "pip install 'transformers>=5.23'" in found["transformers"].says


@pytest.mark.cover(most=2)
@pytest.mark.parametrize("version", ["5.23.0", "5.23.0.dev0", "5.100", "6.0.0rc1"])
def test_a_transformers_that_does_not(version: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2")
    monkeypatch.setattr(metadata, "version", lambda name: version)
    found = checks()
    assert not failed(found)
    assert ("outside of what was tested: " in found["transformers"].says) == (version != "5.23.0")


def test_the_least_transformers_is_that_of_the_package_and_of_the_self_test() -> None:
    least = ".".join(map(str, doctor.LEAST_TRANSFORMERS))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert any(line.startswith(f"transformers>={least},") for line in pyproject["project"]["dependencies"])
    assert f"transformers >= {least}" in Path(causality.__file__).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_torch_for_the_cpu_beside_a_gpu(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2")
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    for name in "cuda", "hip":
        monkeypatch.setattr(torch.version, name, None)
    found = checks()
    assert failed(found) == ["torch"]
    assert "Install torch for CUDA" in found["torch"].says
    for name, built_for in ("cuda", "CUDA"), ("hip", "ROCm"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, name, "12.6")
            assert f"built for {built_for}" in checks()["torch"].says
            assert not failed(checks())


def test_where_an_nvidia_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not doctor._nvidia()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "nvidia-smi" else None)
        assert doctor._nvidia()
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia")
    assert doctor._nvidia()


def test_a_class_that_has_changed_is_named(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads is in tests/unit/graph/test_class_reads.py: here, that the doctor asks."""
    only("mamba2", "mamba")
    right = Mamba2Mixer.forward

    def forward(self: Any, hidden_states: torch.Tensor, new: Any = None, **kwargs: Any) -> Any:
        return right(self, hidden_states * getattr(self, "strange", 1.0), **kwargs)

    monkeypatch.setattr(Mamba2Mixer, "forward", forward)
    found = checks()
    assert failed(found) == ["mamba2 class"]
    assert "Mamba2Mixer takes the argument new and reads the attribute strange" in found["mamba2 class"].says


@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixer_that_looks_ahead(family: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tenth of the next token, and only over the end of a chunk."""
    only(family)
    mixer = next(m for m in zoo(family).modules() if installed_families()[family].recognises(m))
    right = type(mixer).forward

    @wraps(right)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] > 8:
            hidden_states = hidden_states.clone()
            hidden_states[:, 7] += 0.1 * hidden_states[:, 8]
        return right(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(mixer), "forward", forward)
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    assert f"\nFAIL  {family} causality: token 8 changes logits before it, by " in result.stdout
    assert "install another version of transformers" in result.stdout


@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_step_in_decoding(family: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only(family)
    mixer = next(m for m in zoo(family).modules() if installed_families()[family].recognises(m))
    right = type(mixer).forward

    @wraps(right)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return right(self, hidden_states * (1 if hidden_states.shape[1] > 1 else 1.05), *args, **kwargs)

    monkeypatch.setattr(type(mixer), "forward", forward)
    found = checks()
    assert failed(found) == [f"{family} recurrence"]
    assert "decoding token by token after 1 gives other logits" in found[f"{family} recurrence"].says


def test_a_wrong_step_after_a_longer_prefill(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Right as long as only one token came before."""
    only("mamba2")
    right = Mamba2Mixer.forward

    @wraps(right)
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if (cache := kwargs.get("cache", kwargs.get("cache_params"))) is not None:
            cache.longer = getattr(cache, "longer", False) or hidden_states.shape[1] > 1
            hidden_states = hidden_states * (1.05 if cache.longer and hidden_states.shape[1] == 1 else 1)
        return right(self, hidden_states, **kwargs)

    monkeypatch.setattr(Mamba2Mixer, "forward", forward)
    found = checks()
    assert failed(found) == ["mamba2 recurrence"]
    assert "decoding token by token after 9 gives other logits" in found["mamba2 recurrence"].says


@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_that_is_another_recurrence(
    family: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in prefill and in decoding, and causal: only the recurrence tells."""
    only(family)
    described = installed_families()[family]
    right = type(described).project

    def project(self: Any, *args: Any) -> Any:
        p = right(self, *args)
        name = "beta" if isinstance(p, DeltaProjected) else "dt"
        return type(p)(**{**vars(p), name: p.dt * 1.05})

    monkeypatch.setattr(type(described), "project", project)
    found = checks()
    assert failed(found) == [f"{family} recurrence"]
    assert "computes something else than its recurrence" in found[f"{family} recurrence"].says


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_is_the_oracles(family: str) -> None:
    model, described = zoo(family), installed_families()[family]
    mixer = next(m for m in model.modules() if described.recognises(m))
    with torch.no_grad():
        hidden, _ = doctor._seen(model, mixer, getattr(mixer, described.out), doctor._ids())
        p = described.project(mixer, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        oracle = {Projected: output, DeltaProjected: delta_output}.get(type(p), selective_output)
        expected = oracle(p)
        torch.testing.assert_close(doctor._loop(p), expected, rtol=1e-9, atol=1e-9)


def test_code_that_raises_is_a_line(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("jamba", "mamba2")

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Expected a CUDA tensor\n  at kernel.cu:17.")

    monkeypatch.setattr(JambaMambaMixer, "forward", broken)
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    says = "the installed code fails: RuntimeError: Expected a CUDA tensor at kernel.cu:17. Do not prune models"
    for test in "causality", "recurrence":
        assert f"\nFAIL  jamba {test}: {says}" in result.stdout
        assert f"\nPASS  mamba2 {test}: " in result.stdout


def test_numbers_that_are_none(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2")
    right = Mamba2Mixer.forward
    monkeypatch.setattr(
        Mamba2Mixer, "forward", wraps(right)(lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)
    )
    assert failed(checks()) == ["mamba2 causality", "mamba2 recurrence"]


def test_a_mixer_under_another_name(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2")
    monkeypatch.setattr(type(installed_families()["mamba2"]), "mixer_class", "Mamba2Layer")
    found = checks()
    assert failed(found) == ["mamba2 recurrence"]
    assert "Mamba2ForCausalLM has no Mamba2Layer" in found["mamba2 recurrence"].says


def test_a_family_that_transformers_lacks(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("mamba2", "jamba")
    monkeypatch.setattr(doctor, "CONFIG_MAPPING", {"mamba2": None})
    found = checks()
    assert found["jamba"] == Check("jamba", True, "not in this transformers", skipped=True)
    assert {"mamba2 causality", "mamba2 recurrence"} <= set(found)
    assert not failed(found)


@pytest.mark.slow
def test_a_family_of_a_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import sspruner\n"
        "from sspruner.graph.known import installed_families\n"
        "class Mine(type(installed_families()['mamba2'])):\n"
        "    name, mixer_class = 'mine', 'MyMixer'\n"
        "@sspruner.hookimpl\n"
        "def sspruner_families():\n"
        "    return [Mine()]\n"
    )
    try:
        assert "\nSKIP  mine: no self-test is known; " in done("doctor", "--plugin", plugin).stdout
    finally:
        manager.plugin_manager().unregister(name=str(plugin.resolve()))


def test_plugins_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    def clash() -> Any:
        raise PluginError("family 'mamba2': described by plugin 'a' and by 'b'; remove one")

    monkeypatch.setattr(doctor, "installed_families", clash)
    found = checks()
    assert failed(found) == ["plugins"]
    assert "described by plugin 'a' and by 'b'" in found["plugins"].says


@pytest.mark.slow
def test_without_the_dependencies_of_tests() -> None:
    code = (
        "import sys; sys.modules.update(hypothesis=None, pytest=None);"
        "from sspruner import doctor; one = dict([*doctor.installed_families().items()][:1]);"
        "doctor.installed_families = lambda: one; print([c.name for c in doctor.diagnose() if not c.ok])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "tested"), [("2.6.0", True), ("2.13.1+cu130", True), ("2.5.1", False), ("2.14.0", False)]
)
def test_a_torch_outside_of_what_was_tested(
    version: str, tested: bool, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("mamba2")
    monkeypatch.setattr(torch, "__version__", version)
    found = checks()
    assert not failed(found)
    assert ("outside of what was tested: " in found["torch"].says) != tested
