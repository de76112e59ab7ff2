"""The parts of a model that GGUF describes, under one set of names for all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError

ARCHITECTURES = {  # type of the config -> general.architecture
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba2",
    "jamba": "jamba",
    "bamba": "granitehybrid",
    "granitemoehybrid": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "nemotron_h": "nemotron_h",
}


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
        """Return the norms after the scan, of Mamba2-type mixers."""
        return [mixer.norm for mixer in self.mixers if has_norm(mixer)]


def parts(model: Any) -> Parts:
    """Return the parts of a model. Raises ModelError for a family that llama.cpp does not have."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"gguf: llama.cpp has no models of type {config.model_type}; it has {', '.join(ARCHITECTURES)}"
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


def has_norm(mixer: Any) -> bool:
    """Return whether a mixer has a norm after its scan; in Falcon-H1 it is optional."""
    return isinstance(getattr(getattr(mixer, "norm", None), "weight", None), torch.Tensor)


def _block(kind: str, layer: Any) -> Block:
    if kind in ("mamba", "mamba2", "falcon_mamba"):
        return Block(layer, layer.norm, mixer=layer.mixer)
    if kind == "nemotron_h":
        place = {"linear_attention": "mixer", "full_attention": "attention", "mlp": "mlp", "moe": "experts"}
        module = layer.mixer
        shared = {"mlp": module.shared_experts} if layer.block_type == "moe" else {}
        return Block(layer, layer.norm, **{place[layer.block_type]: module}, **shared)
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


def _present(layer: Any, name: str) -> nn.Module | None:
    """Return a submodule; None if the layer lacks it, or if a cut has removed it."""
    module = getattr(layer, name, None)
    return module if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else None


def _rotary(body: Any, config: Any) -> Any:
    if config.model_type == "granitemoehybrid" and config.position_embedding_type != "rope":
        return None
    return getattr(body, "rotary_emb", None)
