"""vLLM's Mamba2 with a projected state: the cache holds k coordinates of each head channel instead of N.

B and C are projected after the convolution, in vLLM's own mixer; its convolution, scan and decode kernels run as they
are, on k instead of N. Written for vLLM 0.32 and 0.33 (vllm/model_executor/layers/mamba/mamba_mixer2.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.model_executor.models.mamba2 import Mamba2ForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from sspruner.runtime.projected_state import coordinates

logger = init_logger(__name__)

# Sizes of a mixer: as an exported folder names them (sspruner/runtime/sizes.py), and as the config does.
FIELDS = {"ssm_state_size": "state_size", "num_heads": "num_heads", "head_dim": "head_dim", "n_groups": "n_groups"}
DERIVED = {"intermediate_size", "conv_dim", "group_size", "groups", "in_channels", "out_channels"}
DERIVED |= {"in_features", "out_features", "groups_time_state_size"}
EPSILON = "variance_epsilon"  # of one norm


@dataclass(frozen=True)
class Sizes:
    """Sizes of a projected model: N rows of B and C in a group, heads, ...; and each layer's k coordinates."""

    state_size: int
    num_heads: int
    head_dim: int
    n_groups: int
    coordinates: tuple[int, ...]

    @property
    def widest(self) -> int:
        """Number of coordinates of every layer's cache: vLLM has one size of page for all."""
        return max(self.coordinates)

    @property
    def inner(self) -> int:
        """Number of inner channels."""
        return self.num_heads * self.head_dim


def sizes_of(config: Any) -> Sizes:
    """Read the sizes of a folder that `export --to hf-remote` wrote. Raises ValueError for what vLLM cannot serve."""
    attributes = config.pruned["attributes"]
    mixers = [f"backbone.layers.{i}.mixer" for i in range(config.num_hidden_layers)]
    for path, found in attributes.items():
        if other := sorted(found.keys() - DERIVED - FIELDS.keys() - {EPSILON}):
            raise ValueError(f"{path}: sspruner's plugin of vLLM does not know the size {other[0]} of this cut")
    sizes = {}
    for name, field in FIELDS.items():
        found = {attributes.get(path, {}).get(name, getattr(config, field)) for path in mixers}
        if len(found) > 1:
            raise ValueError(f"{name} differs by layer; vLLM builds all layers in one size: cut without --ratio")
        sizes[field] = found.pop()
    encoders = [config.pruned["shapes"].get(f"{path}.state_encode") for path in mixers]
    if None in encoders:
        raise ValueError(f"{mixers[encoders.index(None)]}: has no projected state, where other layers have one")
    return Sizes(**sizes, coordinates=tuple(shape[1] for shape in encoders))


class ProjectedMixer(MambaMixer2):
    """vLLM's mixer, whose B and C are projected to k coordinates after the convolution."""

    split_hidden_states_B_C_fn: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

    def project(self, rows: int, k: int) -> None:
        """Turn a mixer that was built for N rows into one with k coordinates in its state."""
        groups = self.n_groups // self.tp_size
        split = self.split_hidden_states_B_C_fn
        self.rows, self.ssm_state_size = rows, k  # the latter is the size of the state from here on
        for name, shape in (("state_encode", (groups, k, rows)), ("state_decode", (groups, rows, k))):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False))
            set_weight_attrs(getattr(self, name), {"weight_loader": load_padded})

        def projected(x_B_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x, B, C = split(x_B_C)  # (tokens, channels), and (tokens, G N) each
            B = coordinates(B.contiguous()[None], self.state_encode)[0]  # (tokens, G, k)
            C = coordinates(C.contiguous()[None], self.state_decode.transpose(1, 2))[0]
            return x, B.flatten(1), C.flatten(1)

        self.split_hidden_states_B_C_fn = projected

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the caches: that of the convolution has N rows, that of the state k coordinates."""
        whole = super().get_state_shape()
        k, self.ssm_state_size = self.ssm_state_size, self.rows
        try:
            convolution = super().get_state_shape()[0]
        finally:
            self.ssm_state_size = k
        return (convolution, *whole[1:])


def load_padded(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    """Copy a layer's basis into the first coordinates of the widest layer's; the others stay 0, and their state, too.

    With several processes, each has its groups, or all of them the only one.
    """
    groups = parameter.shape[0]
    if loaded.shape[0] > groups:
        loaded = loaded.narrow(0, get_tensor_model_parallel_rank() * groups, groups)
    parameter.data[:, : loaded.shape[1], : loaded.shape[2]] = loaded


class ProjectedMamba2ForCausalLM(Mamba2ForCausalLM):
    """vLLM's Mamba2 model with a projected state in every layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        sizes = sizes_of(config)
        for field in FIELDS.values():
            setattr(config, field, getattr(sizes, field))
        config.intermediate_size = sizes.inner
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, MambaMixer2):
                module.__class__ = ProjectedMixer
                module.project(sizes.state_size, sizes.widest)
        for path, found in config.pruned["attributes"].items():
            if EPSILON in found:
                self.get_submodule(path).variance_epsilon = found[EPSILON]
        if len(set(sizes.coordinates)) > 1:
            least, most = min(sizes.coordinates), sizes.widest
            logger.info("sspruner: states of %d to %d coordinates are padded to %d, exactly", least, most, most)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Return the shapes of one layer's caches: convolution with N rows, state with k coordinates."""
        sizes = sizes_of(vllm_config.model_config.hf_config)
        convolution, state = (
            MambaStateShapeCalculator.mamba2_state_shape(
                intermediate_size=sizes.inner,
                tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
                n_groups=sizes.n_groups,
                num_heads=sizes.num_heads,
                head_dim=sizes.head_dim,
                state_size=size,
                conv_kernel=vllm_config.model_config.hf_config.conv_kernel,
                num_spec=vllm_config.num_speculative_tokens,
            )[part]
            for part, size in enumerate((sizes.state_size, sizes.widest))
        )
        return convolution, state
