"""Published model shapes with random weights: latency does not depend on the weights, and needs no download."""

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
    """Return the config of a published shape, with a state of `keep` instead of 128 and, optionally, fewer layers.

    Raises InputError for an unknown shape, and for a larger state.
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
    """Build a published shape with random weights on the device, in eval mode.

    balanced: project the state to `keep` directions, as the balanced basis does, instead of removing rows of B and C.
    The global random state is unchanged.
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
    """Build every shape dense, with each smaller state, and with each projected state: label -> model."""
    for shape in shapes:
        for size in (*keep, *balanced):
            shape_config(shape, size)  # check before anything large is created
        shape_config(shape)
    same: dict[str, Any] = {"layers": layers, "dtype": dtype, "device": device, "seed": seed}
    models = {}
    for shape in shapes:
        models[shape] = shape_model(shape, **same)
        models |= {f"{shape}, state {k}": shape_model(shape, k, **same) for k in keep}
        models |= {f"{shape}, balanced {k}": shape_model(shape, k, balanced=True, **same) for k in balanced}
    return models
