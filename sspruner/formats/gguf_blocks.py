"""The parts of a model that GGUF describes, under one set of names for all families."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError
from sspruner.graph.text_model import text_config, text_path

ARCHITECTURES = {  # type of the config -> general.architecture
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba2",
    "jamba": "jamba",
    "bamba": "granitehybrid",
    "granitemoehybrid": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "nemotron_h": "nemotron_h",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "kimi_linear": "kimi-linear",
    "bailing_hybrid": "bailingmoe3",
}
GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
KDA = ("kimi_linear", "bailing_hybrid")
DELTA = (*GATED_DELTA, *KDA)


@dataclass(frozen=True)
class Block:
    """One block. None: it has no such module.

    layer    the module that holds the others, and Falcon-H1's multipliers
    experts  router and routed experts, beside which `mlp` is the shared expert
    """

    layer: Any
    norm: Any
    mixer: Any = None
    attention: Any = None
    ffn_norm: Any = None
    mlp: Any = None
    experts: Any = None


@dataclass(frozen=True)
class Parts:
    """A model in parts.

    rotary        the rotary embedding, None if attention has none
    input_scale   factor of the embeddings, Falcon-H1's
    output_scale  factor of the logits, Falcon-H1's
    """

    kind: str
    config: Any
    embedding: Any
    blocks: Sequence[Block]
    norm: Any
    head: Any
    rotary: Any = None
    input_scale: float = 1.0
    output_scale: float = 1.0

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture."""
        name = ARCHITECTURES[self.kind]
        return f"{name}_moe" if name == "nemotron_h" and self.experts else name

    @property
    def tied(self) -> bool:
        """Return whether the output head is the embedding."""
        return self.head.weight is self.embedding.weight

    @property
    def mixers(self) -> list[Any]:
        """Return the state-space mixers."""
        return [block.mixer for block in self.blocks if block.mixer is not None]

    @property
    def attentions(self) -> list[Any]:
        """Return the attention modules."""
        return [block.attention for block in self.blocks if block.attention is not None]

    @property
    def experts(self) -> list[Any]:
        """Return the modules with experts."""
        return [block.experts for block in self.blocks if block.experts is not None]

    @property
    def residual_norms(self) -> list[Any]:
        """Return the norms that read the residual stream."""
        norms = [norm for block in self.blocks for norm in (block.norm, block.ffn_norm) if norm is not None]
        return [*norms, self.norm]

    @property
    def mixer_norms(self) -> list[Any]:
        """Return the norms after the scan, of Mamba2-type mixers and delta rules."""
        return [norm for mixer in self.mixers if (norm := norm_of(mixer)) is not None]


def parts(model: Any) -> Parts:
    """Return the parts of a model. Raises ModelError for a family that llama.cpp does not have."""
    config = text_config(model.config)
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"gguf: llama.cpp has no models of type {config.model_type}; it has {', '.join(ARCHITECTURES)}"
        )
    if text_path(model):
        raise ModelError(
            f"gguf: the file holds a language model alone; {type(model).__name__} has other parts. Load it as one: "
            "sspruner.load, or AutoModelForCausalLM"
        )
    body = model.base_model
    falcon_h1 = config.model_type == "falcon_h1"
    norm = next(getattr(body, name) for name in ("norm_f", "final_layernorm", "norm") if hasattr(body, name))
    return Parts(
        kind=config.model_type,
        config=config,
        embedding=model.get_input_embeddings(),
        blocks=[_block(config.model_type, layer) for layer in body.layers],
        norm=norm,
        head=model.get_output_embeddings(),
        rotary=_rotary(body, config),
        **({"input_scale": body.embedding_multiplier, "output_scale": body.lm_head_multiplier} if falcon_h1 else {}),
    )


def norm_of(mixer: Any) -> Any:
    """Return the norm after a mixer's scan, None if it has none; in Falcon-H1 it is optional."""
    norm = getattr(mixer, "norm", None) or getattr(mixer, "o_norm", None)
    return norm if isinstance(getattr(norm, "weight", None), torch.Tensor) else None


def one(what: str, values: Iterable[int]) -> int:
    """Return the value that all layers share. Raises ModelError if they differ."""
    found = sorted({int(value) for value in values})
    if len(found) != 1:
        raise ModelError(
            f"gguf: llama.cpp reads one {what} for all layers; here are {', '.join(map(str, found))}. "
            "--to gguf-padded pads layers with zeros to one size"
        )
    return found[0]


def _block(kind: str, layer: Any) -> Block:
    if kind in ("mamba", "mamba2", "falcon_mamba"):
        return Block(layer, layer.norm, mixer=layer.mixer)
    if kind == "nemotron_h":
        place = {"linear_attention": "mixer", "full_attention": "attention", "mlp": "mlp", "moe": "experts"}
        module = layer.mixer
        shared = {"mlp": module.shared_experts} if layer.block_type == "moe" else {}
        return Block(layer, layer.norm, **{place[layer.block_type]: module}, **shared)
    if kind in DELTA:
        return _delta_block(layer)
    mlp = layer.shared_mlp if kind == "granitemoehybrid" else layer.feed_forward
    experts = layer.block_sparse_moe if kind == "granitemoehybrid" else None
    if hasattr(mlp, "experts"):  # of Jamba, which has no shared expert
        mlp, experts = None, mlp
    return Block(
        layer,
        layer.input_layernorm,
        mixer=_present(layer, "mamba"),
        attention=_present(layer, "self_attn"),
        ffn_norm=_present(layer, "post_attention_layernorm") or layer.pre_ff_layernorm,
        mlp=mlp,
        experts=experts,
    )


def _delta_block(layer: Any) -> Block:
    """Return a block of a delta rule. KDA and latent attention share a name; a norm after the scan tells them apart."""
    own = _present(layer, "self_attn")
    mixer = _present(layer, "linear_attn") or (own if norm_of(own) is not None else None)
    experts = layer.mlp if hasattr(layer.mlp, "experts") else None
    shared = "shared_expert" if hasattr(layer.mlp, "shared_expert") else "shared_experts"
    return Block(
        layer,
        layer.input_layernorm,
        mixer=mixer,
        attention=None if own is mixer else own,
        ffn_norm=layer.post_attention_layernorm,
        mlp=layer.mlp if experts is None else getattr(experts, shared),
        experts=experts,
    )


def _present(layer: Any, name: str) -> nn.Module | None:
    """Return a submodule; None if the layer lacks it, or if a cut has removed it."""
    module = getattr(layer, name, None)
    return module if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else None


def _rotary(body: Any, config: Any) -> Any:
    if config.model_type == "granitemoehybrid" and config.position_embedding_type != "rope":
        return None
    return getattr(body, "rotary_emb", None)
