"""A Mamba2-type mixer whose state has k coordinates of its own, instead of the N that its B and C rows make.

B and C are projected after convolution and SiLU, and everything behind them has a state of size k:

    B' = B encode^T        C' = C decode        encode (G, k, N), decode (G, N, k)

The scan and the decode step are the ones that the model's own module would call, CUDA kernels included. This file is
complete in itself: an exported model has a copy beside its weights, and needs no sspruner to run.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks


def project_state(mixer: Any, encode: torch.Tensor, decode: torch.Tensor) -> None:
    """Give a mixer a state in other coordinates. encode: (G, k, N), decode: (G, N, k), fp32 or wider: kept as they are.

    mixer: of mamba2, zamba2, bamba, granitemoehybrid, falcon_h1 or nemotron_h in transformers. They become parameters,
    `state_encode` and `state_decode`.
    """
    wanted = mixer.in_proj.weight.requires_grad
    mixer.state_encode = nn.Parameter(encode, requires_grad=wanted)
    mixer.state_decode = nn.Parameter(decode, requires_grad=wanted)
    mixer.forward = MethodType(_forward, mixer)


def unproject_state(mixer: Any) -> None:
    """Undo `project_state`: the mixer has the forward of its class again."""
    del mixer.forward, mixer.state_encode, mixer.state_decode


def coordinates(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Vectors of all groups in other coordinates: rows (b, T, G * N), basis (G, k, N) -> (b, T, G, k), in their dtype.

    The product is taken in fp32 or wider: terms may nearly cancel.
    """
    wide = torch.promote_types(torch.promote_types(rows.dtype, basis.dtype), torch.float32)
    parts = rows.view(*rows.shape[:-1], basis.shape[0], basis.shape[2])  # (b, T, G, N)
    return torch.einsum("btgn,gkn->btgk", parts.to(wide), basis.to(wide)).to(rows.dtype)


@force_accelerate_hooks("conv1d")  # type: ignore[untyped-decorator]
def _forward(
    self: Any, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """The forward of the six mixers, with the state in its own coordinates. hidden_states: (b, T, hidden size)."""
    stock = sys.modules[type(self).__module__]
    b, T, _ = hidden_states.shape
    H, P, G, k = self.num_heads, self.head_dim, self.n_groups, self.state_encode.shape[1]
    dtype, rms_norm = hidden_states.dtype, getattr(self, "mamba_rms_norm", True)
    conv_state = recurrent_state = None
    if cache_params is not None:
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        recurrent_state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    hidden_states = stock.apply_mask_to_padding_states(hidden_states, attention_mask)
    if hasattr(self, "mup_vector"):  # Falcon-H1
        rows = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
    else:
        rows = self.in_proj(hidden_states)  # (b, T, rows)
    gate, xBC, dt = rows.split([H * P, self.conv_dim, H], dim=-1)

    xBC, weight, bias = xBC.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias  # (b, channels, T)
    if conv_state is not None and T == 1 and not cache_params.is_recording_past(self.layer_idx):
        xBC = stock.causal_conv1d_update(xBC, conv_state, weight, bias, activation=self.activation)
    else:
        if cache_params is not None:
            xBC = cache_params.update_conv_state(xBC, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        xBC = stock.causal_conv1d_fn(xBC, weight, bias, activation=self.activation, **kwargs)[..., -T:]
    xBC = stock.apply_mask_to_padding_states(xBC.transpose(1, 2), attention_mask)
    x, B, C = xBC.split([H * P, (self.conv_dim - H * P) // 2, (self.conv_dim - H * P) // 2], dim=-1)
    B, C = coordinates(B, self.state_encode), coordinates(C, self.state_decode.transpose(1, 2))  # (b, T, G, k)

    A = -torch.exp(self.A_log.float())
    if recurrent_state is not None and T == 1:
        y = stock.mamba2_selective_state_update(
            recurrent_state,
            x.view(b, H, P),
            dt.transpose(1, 2).expand(-1, -1, P),
            A[:, None, None].expand(-1, P, k),
            B.view(b, G, k),
            C.view(b, G, k),
            self.D[:, None].expand(-1, P),
            z=None if rms_norm else gate.view(b, H, P),
            dt_bias=self.dt_bias[:, None].expand(-1, P),
            dt_softplus=True,
            **kwargs,
        ).view(b, 1, H * P)
        gated = not rms_norm
    else:
        scanned = stock.mamba2_chunk_scan(
            x.view(b, T, H, P),
            dt,
            A,
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            return_final_states=cache_params is not None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=recurrent_state,
            dt_limit=self.time_step_limit,
            **kwargs,
        )
        if cache_params is not None:
            scanned, final_state = scanned
            cache_params.update_recurrent_state(final_state, layer_idx=self.layer_idx)
        y, gated = scanned.reshape(b, T, -1), False
    if rms_norm:
        y = self.norm(y, gate)
    elif not gated:
        y = y * nn.functional.silu(gate)
    return self.out_proj(y.to(dtype))  # type: ignore[no-any-return]


"""The sizes of a cut model, as data: what has to change in one that is built from a stock config."""


from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str)


def sizes_of(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """What differs in `model` from `stock`, built from a config alone: JSON that `resize` takes.

    shapes: parameter -> its shape; attributes: module -> numbers and words that its forward reads.
    """
    built = {name: p.shape for name, p in stock.named_parameters(remove_duplicate=False)}
    held = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    modules = dict(stock.named_modules())
    attributes = {}
    for path, module in model.named_modules():
        before, own = vars(modules[path]), {k: v for k, v in vars(module).items() if type(v) in PLAIN}
        other = {k: v for k, v in own.items() if before.get(k) != v and k != "training" and not k.startswith("_")}
        if other:
            attributes[path] = other
    return {
        "shapes": {name: list(shape) for name, shape in held.items() if built.get(name) != shape},
        "attributes": attributes,
    }


def resize(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Give a model that was built from its config the sizes that its weights have. Values come later, by name."""
    for name, shape in sizes["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters.get(leaf)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape) if held is None else held.new_empty(shape)))
    for path, attributes in sizes["attributes"].items():
        vars(model.get_submodule(path)).update(attributes)


from transformers import Mamba2Config, Mamba2ForCausalLM


class PrunedMamba2Config(Mamba2Config):
    """The stock config of the model that was cut; `pruned` has the sizes that it got."""

    model_type = "pruned_mamba2"


class PrunedMamba2ForCausalLM(Mamba2ForCausalLM):
    """The stock model in the sizes of the config's `pruned`."""

    config_class = PrunedMamba2Config
    _keep_in_fp32_modules_strict = {*(Mamba2ForCausalLM._keep_in_fp32_modules_strict or ()), "state_encode", "state_decode"}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Its initialisation is stock's: what the weights do not hold (buffers) is filled as in the stock model."""
        return False

    def __init__(self, config: PrunedMamba2Config) -> None:
        super().__init__(config)
        resize(self, config.pruned)
        for module in self.modules():
            if "state_encode" in module._parameters:
                project_state(module, module.state_encode.data, module.state_decode.data)
