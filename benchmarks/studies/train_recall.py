"""Train a small Mamba2 on multi-query associative recall (MQAR), a task that fills its state.

    python benchmarks/train_recall.py --threads 1 --out /var/tmp/recall-64
    python benchmarks/train_recall.py --threads 1 --state 128 --pairs 48 --vocabulary 256 --out /var/tmp/recall-128

A sequence holds PAIRS different keys, each followed by its value, and then the keys again in a random order, each
followed by its value once more. The loss is on these values alone. The number of pairs grows from 4, by 4 whenever nine
in ten of the values are right; the learning rate is constant, and falls linearly to zero over the last DECAY steps.
Task: Arora et al., "Zoology", arXiv 2312.04927, without filler. `benchmarks/recall.py` cuts the state of the result.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import progress, provenance
from torch import nn

import sspruner
from sspruner.evaluation.recall import answers, recall, sequences

LEARNING_RATE, WEIGHT_DECAY, WARM_UP, DECAY, CLIP = 1e-2, 0.1, 50, 0.5, 1.0  # warm-up in steps; decay: a fraction
BATCH, FIRST_PAIRS, MORE_PAIRS, LEARNED = 64, 4, 4, 0.9
STEP, RATE = 0.5, 0.05  # dt and -A before training: learns sooner than with those of a language model
TEST_SEQUENCES, TEST_SEED = 512, 1_000_000


def new_model(state: int, layers: int, hidden: int, head_dim: int, vocabulary: int, seed: int) -> Any:
    """A freshly initialised Mamba2, that writes much into its state and forgets little of it."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        state_size=state,
        expand=2,
        head_dim=head_dim,
        num_heads=2 * hidden // head_dim,
        n_groups=1,
        chunk_size=32,  # quickest on a CPU
        time_step_min=STEP,
        time_step_max=STEP,
        tie_word_embeddings=False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    torch.manual_seed(seed)
    model = Mamba2ForCausalLM(config)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data.fill_(math.log(RATE))
    return model


def train(model: Any, pairs: int, steps: int, seed: int) -> None:
    """AdamW on new sequences in every step, with more and more pairs."""
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    now, right, start = min(FIRST_PAIRS, pairs), 0.0, time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(step / WARM_UP, 1, (1 - step / steps) / DECAY)
        tokens = sequences(BATCH, now, model.config.vocab_size, generator)
        logits, target = answers(model(input_ids=tokens, use_cache=False).logits, tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        right = 0.9 * right + 0.1 * float((logits.argmax(-1) == target).float().mean())
        if step % 50 == 0:
            spent = (time.monotonic() - start) / 60
            progress(f"step {step}, {spent:.1f} min: {now} pairs, loss {loss.item():.3f}, accuracy {right:.3f}")
        if right > LEARNED and now < pairs:
            now, right = min(now + MORE_PAIRS, pairs), 0.0
    if now < pairs:
        raise SystemExit(f"{steps} steps were enough for {now} pairs, not for {pairs}; give more --steps")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--state", type=int, default=64, help="states per head")
    parser.add_argument("--pairs", type=int, default=24, help="key-value pairs to remember")
    parser.add_argument("--vocabulary", type=int, default=128, help="tokens; half of them keys, half values")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=800, help="of 64 sequences each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.pairs > given.vocabulary // 2:
        raise SystemExit(f"{given.pairs} pairs need {given.pairs} different keys; there are {given.vocabulary // 2}")

    model = new_model(given.state, given.layers, given.hidden, given.head_dim, given.vocabulary, given.seed)
    model.config.recall_pairs = given.pairs
    progress(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    start = time.monotonic()
    train(model, given.pairs, given.steps, given.seed)
    minutes = (time.monotonic() - start) / 60
    sspruner.save(model, given.out, overwrite=True)
    generator = torch.Generator().manual_seed(TEST_SEED)
    right, _ = recall(model, sequences(TEST_SEQUENCES, given.pairs, given.vocabulary, generator))
    error = float(right.std()) / math.sqrt(len(right))
    print(f"{given.out}: accuracy {float(right.mean()):.4f} ± {error:.4f}, trained in {minutes:.1f} minutes")
    print(provenance(f"seed {given.seed}, {TEST_SEED} (test sequences); {given.steps} steps of {BATCH} sequences"))


if __name__ == "__main__":
    main()
