"""Diagnose the installation: versions, known hazards, and every family's installed code on a tiny random model."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import CONFIG_MAPPING

import sspruner
from sspruner.compute.forward import cache_in, forward
from sspruner.compute.kernels import KERNELS
from sspruner.errors import PluginError
from sspruner.graph.class_reads import changes
from sspruner.graph.family import DeltaProjected, Family, Projected, Scan
from sspruner.graph.known import installed_families
from sspruner.scoring.known import installed_scorers
from sspruner.testing.models import SHAPES, VOCABULARY, zoo

LEAST_TRANSFORMERS = (5, 23)  # in 5.22 some mixers with several groups compute wrongly without kernels
TOKENS = 19  # more than two chunks of the tiny models (8), and not a multiple of the chunk length
PREFILLS = (1, 9)  # lengths of the prefill before token-by-token decoding
TOLERANCE = 1e-4  # relative to the largest value; roundings are below 1e-5

PASSED = {
    "class": "its forward takes, reads and calls what is known of it",
    "causality": "no token changes what comes before it",
    "recurrence": "token by token = all at once = the recurrence in fp64",
}
ADVICE = (
    "Do not prune models of this family here: repair what fails above, or install another version of transformers, and "
    "run sspruner doctor again"
)


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. says: the finding; if not ok, also what to do. skipped: nothing was tested."""

    name: str
    ok: bool
    says: str
    skipped: bool = False


def diagnose() -> Iterator[Check]:
    """Run every check and yield the results one by one. The self-tests run on the CPU, in fp32, with fixed seeds."""
    yield Check("python", True, platform.python_version())
    yield Check("sspruner", True, sspruner.__version__)
    yield _torch()
    yield _transformers()
    for name in KERNELS:
        yield _kernels(name)
    for name in ("triton", "kernels"):
        yield Check(name, True, _version(name) or "not installed (not needed)")
    try:
        families, scorers = installed_families(), installed_scorers()
    except PluginError as error:
        yield Check("plugins", False, f"{_line(error)}. Repair or uninstall it: no command works with it")
        return
    yield Check("plugins", True, f"{len(families)} families, {len(scorers)} scorers")
    for _, family in sorted(families.items()):
        yield from _self_tests(family)


def _torch() -> Check:
    version, built_for = torch.__version__, "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else "the CPU"
    if built_for == "the CPU" and _nvidia():
        return Check("torch", False, f"{version} is built for the CPU alone, and an NVIDIA GPU is here. Install torch "
                     "for CUDA: https://pytorch.org/get-started/locally")  # fmt: skip
    return Check("torch", True, f"{version}{_outside('torch', version)}, built for {built_for}; {_gpu() or 'no GPU'}")


def _transformers() -> Check:
    version = metadata.version("transformers")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        return Check("transformers", False, f"{version} computes some mixers wrongly without their kernels. "
                     f"pip install 'transformers>={least}'")  # fmt: skip
    return Check("transformers", True, f"{version}{_outside('transformers', version)}")


def _outside(package: str, version: str) -> str:
    """Return a remark on a version that sspruner's metadata do not permit: it was not tested with that."""
    required = (Requirement(line) for line in metadata.requires("sspruner") or [])
    tested = next((each.specifier for each in required if each.name == package), SpecifierSet())
    return "" if tested.contains(version, prereleases=True) else f", outside of what was tested: {tested}"


def _kernels(name: str) -> Check:
    version = _version(name)
    if version and not _gpu():
        return Check(name, False, f"{version}, and torch sees no GPU: transformers calls its kernels on the CPU too, "
                     f"where they fail. pip uninstall {name.replace('_', '-')}")  # fmt: skip
    return Check(name, True, version or "not installed (not needed)")


def _version(name: str) -> str:
    """Return the version of a package that can be imported, "" if it cannot."""
    if find_spec(name) is None:
        return ""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _nvidia() -> bool:
    """Return whether an NVIDIA driver is installed, whether or not torch sees a GPU."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def _gpu() -> str:
    """Return the name of the GPU that torch sees, "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _self_tests(family: Family) -> Iterator[Check]:
    if family.name not in SHAPES:
        says = "no self-test is known; sspruner.testing.check_family tests it on your models"
        yield Check(family.name, True, says, skipped=True)
        return
    if family.name not in CONFIG_MAPPING:
        yield Check(family.name, True, "not in this transformers", skipped=True)
        return
    bound = [name for name in KERNELS if find_spec(name)]
    if bound and _gpu():
        yield Check(family.name, True, f"not tested: its code calls the kernels of {', '.join(bound)}, on a GPU alone; "
                    "a model's causality is tested when it is pruned", skipped=True)  # fmt: skip
        return
    tests: dict[str, Callable[[Family, Any], str]] = {
        "class": _class, "causality": _causality, "recurrence": _recurrence,
    }  # fmt: skip
    for name, test in tests.items():
        try:
            with torch.no_grad():
                fault = test(family, zoo(family.name))
        except Exception as error:  # whatever the installed code raises is a finding
            fault = f"the installed code fails: {_line(error)}"
        yield Check(f"{family.name} {name}", not fault, f"{fault.rstrip('.')}. {ADVICE}" if fault else PASSED[name])


def _class(family: Family, model: Any) -> str:
    """Compare what the mixer's class reads with what is recorded of it. Returns what differs, "" if nothing does."""
    return next((changes(family, module) for module in model.modules() if family.recognises(module)), "")


def _causality(family: Family, model: Any) -> str:
    """Check that row t of a batch, with another token t, has row 0's logits before t. Returns the fault, "" if none."""
    ids = _ids().repeat(TOKENS, 1)
    ids.diagonal().add_(1).remainder_(VOCABULARY)
    ids[0] = _ids()
    logits = _logits(model, ids)
    for t in range(1, TOKENS):
        apart = _relative(logits[t, :t], logits[0, :t])
        if not apart <= TOLERANCE:
            return f"token {t} changes logits before it, by {apart:.1g} of the largest"
    return ""


def _recurrence(family: Family, model: Any) -> str:
    """Check decoding with a cache against one forward, and every scan against a loop over tokens.

    Returns the fault, "" if none.
    """
    ids = _ids()
    expected = _logits(model, ids)
    for prefill in PREFILLS:
        apart = _relative(_decoded(model, ids, prefill), expected)
        if not apart <= TOLERANCE:
            return (
                f"decoding token by token after {prefill} gives other logits than one forward over all, by "
                f"{apart:.1g} of the largest"
            )
    mixers = [(path, module) for path, module in model.named_modules() if family.recognises(module)]
    if not mixers:
        return f"{type(model).__name__} has no {family.mixer_class}"
    for path, mixer in mixers:
        hidden, read = _seen(model, mixer, getattr(mixer, family.out), ids)
        p = family.project(mixer, hidden, torch.ones(ids.shape, dtype=torch.bool))
        y = _loop(p).float()
        readout = family.readout(mixer, y, p.z)
        apart = _relative(read, y.flatten(2) * family.gate(mixer, p.z) if readout is None else readout)
        if not apart <= TOLERANCE:
            return f"{path} computes something else than its recurrence, by {apart:.1g} of the largest"
    return ""


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = forward(model, ids, use_cache=False).logits
    return logits


def _decoded(model: Any, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Return the logits of `ids`, run through the model's cache: `prefill` tokens, then one at a time."""
    cache: dict[str, Any] = {}
    logits = []
    for positions in torch.split(torch.arange(TOKENS), [prefill] + [1] * (TOKENS - prefill)):
        out = forward(model, ids[:, positions], use_cache=True, position_ids=positions[None], **cache)
        cache = cache_in(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def _seen(model: Any, mixer: Any, out: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of a mixer and of its output projection in a forward over `ids`."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = args[0] if args else kwargs["hidden_states"]

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in (mixer, out)]
    try:
        _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[mixer], seen[out]


def _loop(p: Scan) -> torch.Tensor:
    """Compute h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t, y_t = C_t . h_t + D x_t, step by step.

    Returns fp64 (b, T, H, P).
    """
    if isinstance(p, DeltaProjected):
        return _delta_loop(p)
    x, dt, A, B, C, D = (tensor.double() for tensor in (p.x, p.dt, p.A, p.B, p.C, p.D))
    if isinstance(p, Projected):  # one dt and one A per head, B and C per group of heads
        heads = x.shape[2]
        dt, A, D = dt[..., None], A[:, None, None], D.view(heads, -1)
        B, C = (tensor.repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    h, steps = torch.zeros(1, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, ..., None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None]  # (b, H, P, N)
        steps.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
    return torch.stack(steps, 1)


def _delta_loop(p: DeltaProjected) -> torch.Tensor:
    """Compute S_t = a_t S_{t-1} + k_t beta_t (v_t - (a_t S_{t-1})^T k_t)^T, y_t = S_t^T q_t, step by step."""
    q, k, v, beta, decay = (tensor.double() for tensor in (p.q, p.k, p.v, p.beta, p.decay))
    q, k = (tensor.repeat_interleave(v.shape[2] // tensor.shape[2], 2) for tensor in (q, k))  # (b, T, H, K)
    a = decay.exp() if decay.ndim == 4 else decay.exp()[..., None]  # (b, T, H, K or 1)
    S, steps = v.new_zeros(*v[:, 0].shape[:2], k.shape[-1], v.shape[-1]), []  # (b, H, K, V)
    for t in range(v.shape[1]):
        S = a[:, t, ..., None] * S
        wrong = v[:, t] - (S * k[:, t, ..., None]).sum(-2)  # (b, H, V)
        S = S + k[:, t, ..., None] * (beta[:, t, :, None] * wrong)[..., None, :]
        steps.append((S * q[:, t, ..., None]).sum(-2))
    return torch.stack(steps, 1)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _line(error: Exception) -> str:
    """Return the type of an error and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
