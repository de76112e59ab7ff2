"""Published shapes with random weights: latency needs no trained ones, and a shape needs no hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sspruner.errors import InputError

#: Hidden size and layers of state-spaces/mamba2-*; everything else is mamba_ssm's default.
SHAPES = {
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}
STATE = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape_config(shape: str, keep: int = STATE, layers: int | None = None) -> Any:
    """The config of a published shape, with a state of `keep` instead of 128, and fewer layers if asked.

    Raises InputError for a shape that is not known, and for a state that is not smaller or equal.
    """
    from transformers import Mamba2Config

    if shape not in SHAPES:
        raise InputError(f"shape {shape!r}: not known; there are {', '.join(SHAPES)}")
    if not 1 <= keep <= STATE:
        raise InputError(f"shape {shape}: cannot keep {keep} of {STATE} states; from 1 to {STATE}")
    width, published = SHAPES[shape]
    return Mamba2Config(
        hidden_size=width,
        num_hidden_layers=layers or published,
        num_heads=2 * width // 64,
        head_dim=64,
        expand=2,
        state_size=keep,
        n_groups=1,
        conv_kernel=4,
        chunk_size=256,
        vocab_size=50288,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def shape_model(
    shape: str,
    keep: int = STATE,
    *,
    balanced: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Any:
    """A published shape with random weights, made on the device, in eval mode.

    balanced: the state has `keep` directions of its own, as the balanced basis makes them, instead of fewer rows of B
    and C. The random state outside is as before.
    """
    from transformers import AutoModelForCausalLM

    from sspruner.runtime.projected_state import project_state

    config = shape_config(shape, keep, layers)
    if balanced:
        config = shape_config(shape, STATE, layers)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if balanced:
            for layer in model.backbone.layers:
                rows = torch.linalg.qr(torch.randn(STATE, STATE)).Q[None, :keep].contiguous()  # (1, k, N)
                project_state(layer.mixer, rows, rows.transpose(1, 2).contiguous())
    return model.eval()


def shape_models(
    shapes: Sequence[str],
    keep: Sequence[int] = (),
    balanced: Sequence[int] = (),
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Every shape dense, with each smaller state, and with each number of directions of its own: label -> model."""
    for shape in shapes:
        for size in (*keep, *balanced):
            shape_config(shape, size)  # before anything large is made
        shape_config(shape)
    same: dict[str, Any] = {"layers": layers, "dtype": dtype, "device": device, "seed": seed}
    found = {}
    for shape in shapes:
        found[shape] = shape_model(shape, **same)
        found |= {f"{shape}, state {k}": shape_model(shape, k, **same) for k in keep}
        found |= {f"{shape}, balanced {k}": shape_model(shape, k, balanced=True, **same) for k in balanced}
    return found
