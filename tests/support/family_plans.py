"""Random plans for models of every family."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import sspruner
from sspruner.graph.group import DependencyGroup
from sspruner.plans.plan import Plan, check_plan
from sspruner.plans.reduction import Selection
from support.examples import scaled
from support.zoo import FAMILIES

_MAMBA2, _MAMBA1, _HYBRID, _EXPERTS = (
    ("state", "head", "head_dim", "group"),
    ("state", "channel", "dt_rank"),
    ("attn_head", "mlp"),
    ("expert", "expert_mlp"),
)

DELTA = tuple(
    family
    for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid", "lara_mini")
    if family in FAMILIES
)

KDA = ("kimi_linear", "bailing_hybrid", "glm5_next_text")

AXES = {
    "mamba2": (*_MAMBA2, "hidden", "block"),
    "mamba": (*_MAMBA1, "hidden", "block"),
    "falcon_mamba": (*_MAMBA1, "hidden", "block"),
    "zamba2": (*_MAMBA2, *_HYBRID, "hidden", "block"),
    "bamba": (*_MAMBA2, *_HYBRID, "hidden", "block", "mixer"),
    "granitemoehybrid": (*_MAMBA2, *_HYBRID, *_EXPERTS, "hidden", "block", "mixer"),
    "falcon_h1": (*_MAMBA2, *_HYBRID, "hidden", "block", "mixer"),
    "nemotron_h": (*_MAMBA2, *_HYBRID, *_EXPERTS, "latent", "hidden", "block"),
    "jamba": (*_MAMBA1, *_HYBRID, *_EXPERTS, "hidden", "block", "mixer"),
    "zamba": ("state", "head", "head_dim", "dt_rank", *_HYBRID, "hidden", "block"),
    **dict.fromkeys(DELTA, (*_MAMBA2, *_HYBRID, "hidden", "block", "mixer")),
    "qwen3_5_moe_text": (*_MAMBA2, *_HYBRID, *_EXPERTS, "hidden", "block", "mixer"),
    "qwen4_exp_text": (*_MAMBA2, *_HYBRID, *_EXPERTS),
    **({"lara_mini": (*_MAMBA2, *_HYBRID, *_EXPERTS, "hidden", "block", "mixer")} if "lara_mini" in DELTA else {}),
    **dict.fromkeys(KDA[:2], ("state", "head", "head_dim", *_HYBRID, *_EXPERTS, "hidden", "block", "mixer")),
    "glm5_next_text": ("state", "head", "head_dim", *_HYBRID, *_EXPERTS),
}
WITH_EXPERTS = tuple(family for family, axes in AXES.items() if "expert" in axes)


MAMBA2 = tuple(family for family, axes in AXES.items() if "group" in axes and family not in DELTA)
MAMBA1 = tuple(family for family in FAMILIES if family not in (*MAMBA2, *DELTA, *KDA))


each_family = pytest.mark.parametrize("family", FAMILIES)


def few(examples: int) -> settings:
    """Settings for a few examples per case, since there are many cases.

    Failures are not shrunk, which would take minutes; the models are small.
    """
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=scaled(examples), suppress_health_check=checks, phases=phases)


def draw_plan(data: st.DataObject, graph: sspruner.SSMGraph, axes: tuple[str, ...]) -> Plan:
    """Draw a plan for groups of these axes, each with its own size; the units kept differ by group and head."""
    pick = random.Random(data.draw(st.integers(0, 2**16), "units"))
    sizes = {name: [*g.counts()] for name, g in graph.groups.items() if g.axis in axes}
    able = [name for name, choice in sizes.items() if choice]
    assume(able)
    # One mixer and one attention layer have to stay, whatever blocks go.
    kinds = [[s for s in graph.sites if s.family], [s for s in graph.sites if s.kind == "attention"]]
    anchors = [pick.choice([path for s in sites for path in (s.path, *s.aliases)]) for sites in kinds if sites]
    chosen = {}
    for name in data.draw(st.lists(st.sampled_from(able), min_size=1, unique=True), "groups"):
        group = graph.groups[name]
        stay = {i for i, b in enumerate(group.blocks) if any(f"{a}.".startswith(f"{b.path}.") for a in anchors)}
        after = max(data.draw(st.sampled_from(sizes[name]), "after"), len(stay))
        if after < group.units:
            chosen[name] = Selection(group.units, tuple(_keep(pick, group, after, stay) for _ in range(group.groups)))
    assume(chosen)
    plan = Plan(chosen)
    check_plan(plan, graph)
    return plan


def _keep(pick: random.Random, group: DependencyGroup, after: int, stay: set[int]) -> tuple[int, ...]:
    rest = [unit for unit in range(group.units) if unit not in stay]
    return tuple(sorted([*stay, *pick.sample(rest, after - len(stay))]))


def is_mixer(module: torch.nn.Module) -> bool:
    """Return whether a module of transformers is a state-space mixer; in KDA a gate inside it holds A_log."""
    return hasattr(module, "forget_gate") or (hasattr(module, "A_log") and not hasattr(module, "qkv_dim"))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return fp32 logits, without a cache."""
    return model(input_ids=ids, use_cache=False).logits.float()
