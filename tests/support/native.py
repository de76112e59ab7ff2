"""Stand-ins for the modules of mamba_ssm: the package needs a GPU, its interface does not.

Classes, attributes, parameters and contracts have the names of mamba_ssm 2.2; the code is our own. One loop over the
tokens, in fp32, serves training and decoding. Left out: attention, MLPs between the mixers, fused norms, variable
lengths, sharding, generate().
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from support.native_mamba3 import Mamba3, RMSNorm
from support.zoo import VOCABULARY, randomise

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
Cache = tuple[torch.Tensor, torch.Tensor]  # (conv state (b, channels, d_conv), state)


@dataclass
class MambaConfig:
    d_model: int = 8
    d_intermediate: int = 0
    n_layer: int = 2
    vocab_size: int = VOCABULARY
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = False
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


@dataclass
class InferenceParams:
    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Cache] = field(default_factory=dict)


class Recurrent(nn.Module):
    """Base of both mixers: convolution window and state, kept between calls if there is a cache."""

    def caches(self, batch: int, inference_params: InferenceParams | None) -> Cache:
        if inference_params is None:
            return self.allocate_inference_cache(batch, 0, dtype=torch.float32)
        stored = inference_params.key_value_memory_dict
        if self.layer_idx not in stored:
            stored[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return stored[self.layer_idx]

    def convolve(self, row: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """Convolve one token's channels (b, C), apply SiLU, and shift the window in place."""
        window.copy_(torch.cat([window[..., 1:], row[..., None].to(window)], -1))
        out = (window.float() * self.conv1d.weight[:, 0].float()).sum(-1)
        return self.act(out if self.conv1d.bias is None else out + self.conv1d.bias.float())


class Mamba2(Recurrent):
    def __init__(
        self,
        d_model: int,
        d_state: int = 6,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 4,
        d_ssm: int | None = None,
        ngroups: int = 1,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups, self.nheads = ngroups, self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate, self.dt_limit = (
            D_has_hdim, rmsnorm, norm_before_gate, dt_limit
        )  # fmt: skip
        self.activation, self.chunk_size, self.layer_idx = "silu", chunk_size, layer_idx
        channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias)
        self.act = nn.SiLU()
        self.dt_bias, self.A_log = (nn.Parameter(torch.zeros(self.nheads)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
        """Return the mixer's output for u (b, T, d_model), in the same shape."""
        assert seqlen is None is seq_idx is cu_seqlens, "not in the stand-in"
        H, P, G, N = self.nheads, self.headdim, self.ngroups, self.d_state
        b, T, _ = u.shape
        rows = self.in_proj(u)
        d_mlp = (rows.shape[-1] - 2 * self.d_ssm - 2 * G * N - H) // 2
        z0, x0, z, xBC, dt = rows.split([d_mlp, d_mlp, self.d_ssm, self.d_ssm + 2 * G * N, H], -1)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)  # (b, T, H)
        A, D = -torch.exp(self.A_log.float()), self.D.float().view(H, -1)
        window, stored = self.caches(b, inference_params)
        state, outputs = stored.float(), []
        for t in range(T):
            x, B, C = self.convolve(xBC[:, t], window).split([H * P, G * N, G * N], -1)
            x = x.view(b, H, P)
            B, C = (v.view(b, G, N).repeat_interleave(H // G, 1) for v in (B, C))  # (b, H, N)
            written = dt[:, t, :, None, None] * x[..., None] * B[:, :, None]  # (b, H, P, N)
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
            outputs.append((state * C[:, :, None]).sum(-1) + D * x)
        stored.copy_(state)
        y = torch.stack(outputs, 1).flatten(-2).to(u.dtype)
        y = self.norm(y, z) if self.rmsnorm else y * F.silu(z)
        return self.out_proj(torch.cat([F.silu(z0) * x0, y], -1) if d_mlp > 0 else y)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> Cache:
        like = {"device": self.in_proj.weight.device, "dtype": dtype or self.in_proj.weight.dtype}
        conv = torch.zeros(batch_size, self.conv1d.weight.shape[0], self.d_conv, **like)
        return conv, torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, **like)


class Mamba(Recurrent):
    def __init__(
        self,
        d_model: int,
        d_state: int = 6,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, dt_rank
        self.d_inner = D = int(expand * d_model)
        self.use_fast_path, self.layer_idx, self.activation, self.act = use_fast_path, layer_idx, "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * D, bias=bias)
        self.conv1d = nn.Conv1d(D, D, d_conv, groups=D, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(D, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, D)
        self.A_log, self.D = nn.Parameter(torch.zeros(D, d_state)), nn.Parameter(torch.ones(D))
        self.out_proj = nn.Linear(D, d_model, bias=bias)

    def forward(self, hidden_states, inference_params=None):
        """Return the mixer's output for hidden_states (b, T, d_model), in the same shape."""
        x, z = self.in_proj(hidden_states).chunk(2, -1)  # (b, T, D)
        A = -torch.exp(self.A_log.float())
        window, stored = self.caches(len(x), inference_params)
        state, outputs = stored.float(), []
        for t in range(x.shape[1]):
            u = self.convolve(x[:, t], window).to(x.dtype)  # (b, D)
            dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
            dt = F.softplus((dt @ self.dt_proj.weight.T).float() + self.dt_proj.bias.float())  # (b, D)
            written = dt[..., None] * u.float()[..., None] * B[:, None].float()  # (b, D, N)
            state = torch.exp(dt[..., None] * A) * state + written
            outputs.append((state * C[:, None].float()).sum(-1) + self.D.float() * u.float())
        stored.copy_(state)
        return self.out_proj(torch.stack(outputs, 1).to(z.dtype) * self.act(z))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> Cache:
        """Allocate the cache with d_model * expand channels, as the original does, which ignores d_inner."""
        like = {"device": self.out_proj.weight.device, "dtype": dtype or self.dt_proj.weight.dtype}
        channels = self.d_model * self.expand
        return torch.zeros(batch_size, channels, self.d_conv, **like), torch.zeros(
            batch_size, channels, self.d_state, **like
        )


class Block(nn.Module):
    """Block of add, norm, mixer; the mixer's output is added by the next block."""

    def __init__(self, dim, mixer_cls, norm_cls=RMSNorm, residual_in_fp32=False) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, False
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = self.norm(residual.to(self.norm.weight.dtype))
        residual = residual.float() if self.residual_in_fp32 else residual
        return self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs), residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> Cache:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class MixerModel(nn.Module):
    def __init__(self, config: MambaConfig, vocab_size: int) -> None:
        super().__init__()
        options = dict(config.ssm_cfg)
        mixer = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}[options.pop("layer", "Mamba1")]
        norm = RMSNorm if config.rms_norm else nn.LayerNorm
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            Block(config.d_model, lambda d, i=i: mixer(d, layer_idx=i, **options), norm, config.residual_in_fp32)
            for i in range(config.n_layer)
        )
        for i, layer in enumerate(self.layers):
            layer.layer_idx = i
        self.norm_f = norm(config.d_model)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> dict[int, Cache]:
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        return self.norm_f((hidden_states + residual).to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        assert not any((config.d_intermediate, config.attn_layer_idx, config.fused_add_norm)), "not in the stand-in"
        self.config = config
        vocab_size = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(config, vocab_size)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> dict[int, Cache]:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs):
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(hidden_states[:, -num_last_tokens:]))


def native_model(
    layer: str = "Mamba2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    layers: int = 2,
    d_model: int = 8,
    rms_norm: bool = True,
    **ssm_cfg: Any,
) -> MambaLMHeadModel:
    """Return a random model in eval mode, every parameter random. ssm_cfg: arguments of the mixer."""
    config = MambaConfig(
        d_model=d_model, n_layer=layers, rms_norm=rms_norm, tie_embeddings=tied, ssm_cfg={"layer": layer, **ssm_cfg}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MambaLMHeadModel(config)
        randomise(model)
    return model.to(dtype).eval()
