"""Train a small model of one family on a text file, as a Hugging Face folder with a measured perplexity.

The budget is minutes or tokens; the learning rate falls linearly to zero over it. The tokenizer is the reference
model's. This made the reference models beside `mamba2-books-4m` (their cards say with which budget).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Made, adamw, progress, replaced, train_step
from torch import nn

import sspruner
from studies.reference import first_windows, perplexity

LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 3e-3, 0.1, 0.02  # warm-up as a fraction of the budget
BATCH, SEQ_LEN = 8, 256

FAMILIES: dict[str, dict[str, Any]] = {  # model_type -> its config: 2 to 4 million parameters
    "mamba2": {"hidden_size": 256, "num_hidden_layers": 6, "num_heads": 8, "head_dim": 64, "n_groups": 1},
    "mamba": {"hidden_size": 192, "num_hidden_layers": 6, "state_size": 16},
    "zamba2": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "n_mamba_heads": 8,
        "mamba_d_state": 64,
        "mamba_ngroups": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 384,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": True,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
}


class SelectiveScan(torch.autograd.Function):
    """Mamba1's recurrence, one step at a time in a state that stays in the processor's cache.

        h_t = exp(dt_t A) h_{t-1} + u_t (x) B_t        y_t = h_t . C_t        (u = dt x)

    Autograd through a Python loop of T steps would keep T graphs of states. Here only every KEEP-th state is kept; the
    backward pass recomputes the others, and the gradient of h is the same recurrence run backwards.
    Shapes: dt, u (T, b, D), B, C (T, b, N), A (D, N), y (T, b, D); T a multiple of KEEP.
    """

    KEEP = 16

    @staticmethod
    def forward(ctx: Any, dt: torch.Tensor, u: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor) -> Any:
        T, b, D = u.shape
        h, y = u.new_zeros(b, D, A.shape[1]), torch.empty_like(u)
        entries = []
        with torch.autocast("cpu", enabled=False):
            for t in range(T):
                if t % SelectiveScan.KEEP == 0:
                    entries.append(h.clone())
                h.mul_(torch.exp(dt[t, ..., None] * A)).addcmul_(u[t, ..., None], B[t, :, None])
                torch.bmm(h, C[t, ..., None], out=y[t, ..., None])
        ctx.save_for_backward(dt, u, B, C, A, *entries)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        dt, u, B, C, A, *entries = ctx.saved_tensors
        (T, b, D), Q, gy = u.shape, SelectiveScan.KEEP, gy.contiguous()
        g_dt, g_u, g_B, g_C, g_A = map(torch.empty_like, (dt, u, B, C, A))
        g_A.zero_()
        g = u.new_zeros(b, D, A.shape[1])  # dL/dh_t
        with torch.autocast("cpu", enabled=False):
            for start in range(T - Q, -1, -Q):
                a = torch.exp(dt[start : start + Q, ..., None] * A)  # (Q, b, D, N)
                h = [entries[start // Q]]
                for q in range(Q):
                    h.append((a[q] * h[q]).addcmul_(u[start + q, ..., None], B[start + q, :, None]))
                for q in range(Q - 1, -1, -1):
                    t = start + q
                    g.addcmul_(gy[t, ..., None], C[t, :, None])
                    torch.bmm(gy[t, :, None], h[q + 1], out=g_C[t, :, None])
                    torch.bmm(g, B[t, ..., None], out=g_u[t, ..., None])
                    torch.bmm(u[t, :, None], g, out=g_B[t, :, None])
                    g.mul_(a[q])  # now dL/dh_{t-1}
                    exponent = g * h[q]  # dL/d(dt_t A)
                    torch.sum(exponent * A, -1, out=g_dt[t])
                    g_A.add_((exponent * dt[t, ..., None]).sum(0))
        return g_dt, g_u, g_B, g_C, g_A


def selective_scan(
    x: torch.Tensor,  # (b, D, T)
    dt: torch.Tensor,  # (b, D, T)
    A: torch.Tensor,  # (D, N)
    B: torch.Tensor,  # (b, N, T)
    C: torch.Tensor,  # (b, N, T)
    D: torch.Tensor,  # (D,)
    z: torch.Tensor,  # (b, D, T)
    delta_bias: torch.Tensor,  # (D,)
    **_: Any,
) -> torch.Tensor:
    """What transformers' Mamba computes step by step, for training: fp32, returns (b, D, T)."""
    dt = nn.functional.softplus(dt.float() + delta_bias[:, None]).permute(2, 0, 1).contiguous()  # (T, b, D)
    x, B, C = (v.float().permute(2, 0, 1).contiguous() for v in (x, B, C))
    y = SelectiveScan.apply(dt, dt * x, B, C, A) + D * x  # (T, b, D)
    return y.permute(1, 2, 0) * nn.functional.silu(z)


def new_model(family: str, vocabulary: int, seed: int) -> Any:
    """A freshly initialised model of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **FAMILIES[family],
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        **({} if family == "mamba" else {"chunk_size": 64}),  # transformers pads to it: 64 is quickest on a CPU
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def read_tokens(text: Path, tokenizer: Any) -> torch.Tensor:
    """The whole text as one row of tokens, read by the megabyte: int64 (tokens,)."""
    parts = []
    with text.open(encoding="utf-8") as file:
        while piece := file.read(1 << 20):
            parts += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return torch.tensor(parts)


def windows(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Batches of windows in a random order, all of them before any again: int64 (BATCH, SEQ_LEN)."""
    whole = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (b for b in whole[torch.randperm(len(whole), generator=generator)].split(BATCH) if len(b) == BATCH)


def train(model: Any, batches: Iterator[torch.Tensor], minutes: float | None, tokens: int | None) -> dict[str, Any]:
    """Train with AdamW until the budget is used up. Returns what the model card has to say."""
    optimizer = adamw(model, LEARNING_RATE, WEIGHT_DECAY)
    start, seen, step, smooth = time.monotonic(), 0, 0, math.nan
    model.train()
    while True:
        spent = (time.monotonic() - start) / 60
        done = spent / minutes if minutes else seen / tokens  # type: ignore[operator]
        if done >= 1:
            return {"tokens": seen, "steps": step, "minutes": round(spent, 1), "training_loss": round(smooth, 3)}
        rate = LEARNING_RATE * min(done / WARM_UP + 1e-3, 1 - done, 1)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        train_step(model, optimizer, loss, rate)
        seen, step = seen + batch.numel(), step + 1
        smooth = float(loss) if step == 1 else 0.98 * smooth + 0.02 * float(loss)
        if step % 20 == 0:
            progress(f"{done:6.1%}  {seen:>12,} tokens  {spent:6.1f} min  loss {smooth:.3f}  learning rate {rate:.1e}")


def tables(s: Any) -> Made:
    """Train and save a model; returns its facts. Settings: family, out, minutes or tokens, text, seed."""
    from transformers.models.mamba import modeling_mamba

    tokenizer, seed = sspruner.load()[1], getattr(s, "seed", 0)
    model = new_model(s.family, len(tokenizer), seed)
    tokens = read_tokens(s.data / getattr(s, "text", "books-train.txt"), tokenizer)
    progress(f"{s.family}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens")
    with replaced(modeling_mamba, "mamba_selective_scan", selective_scan):  # its own loop is too slow to train
        facts = train(model, windows(tokens, seed), getattr(s, "minutes", None), getattr(s, "tokens", None))
    sspruner.save(model.to(torch.bfloat16), s.out, tokenizer, overwrite=True)
    loaded, tokenizer = sspruner.load(s.out, dtype="float32")
    for file in ("books-val.txt", "books-test.txt"):
        facts[file] = round(perplexity(loaded, first_windows(s.data / file, tokenizer)), 2)
    return json.dumps(facts, indent=2), f"seed {seed}", None
