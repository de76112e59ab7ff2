"""Train small models of the tasks with questions: MQAR with filler, needle and passkey, copy; several sizes and seeds.

Each is a Mamba2 that begins as an associative memory: in every layer B sees the token before, C and x the token itself;
B and C are the same random projection, and out_proj undoes x's. So it can look up a few pairs at step 0, and training,
on a new batch of one of the lessons in every step, is for many pairs, for filler, and for the later layers. The loss is
on the answers alone. A model that is in WORK already is not trained again.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Made, hash_of, progress, table
from torch import Tensor, nn

import sspruner
from sspruner.compute.device import resolve_device
from sspruner.compute.quick_scan import ALL, quick_scans
from sspruner.evaluation.copying import copies
from sspruner.evaluation.mqar import mqar
from sspruner.evaluation.needle import needles
from sspruner.evaluation.questions import NONE, Questions, answered, logits_after
from sspruner.training.loop import adamw, take_step
from studies.train import Schedule, fresh_model

STEP, RATE, KEYS, GATE = 0.5, 0.01, 0.5, 2.0  # dt, -A, the scale of B and C, and the bias of the gate, before training
NOISE, LATER = 0.02, 0.05  # of the convolution; the first output of a later layer, in that of the first one


def mqar_of(pairs: int, length: int, **how: Any) -> Questions:
    """Return tasks of MQAR."""
    return mqar(length=length, pairs=pairs, **how)


def needle_of(length: int, phrase: int | None, **how: Any) -> Questions:
    """Return needles in random tokens, or in a phrase that repeats (passkey)."""
    return needles(length=length, phrase=phrase, **how)


def copy_of(string: int, **how: Any) -> Questions:
    """Return tasks of copying."""
    return copies(string=string, **how)


TASKS: dict[str, Callable[..., Questions]] = {"mqar": mqar_of, "needle": needle_of, "copy": copy_of}


def lesson(task: str, which: Any, tokens: int, vocabulary: int, generator: torch.Generator) -> Questions:
    """Return about as many tokens of a lesson, its task's arguments, in whole sequences."""
    make = partial(TASKS[task], *which, vocabulary=vocabulary, generator=generator)
    return make(count=max(1, tokens // make(count=1).tokens.shape[1]))


def memory(config: dict[str, Any], vocabulary: int, seed: int) -> Any:
    """Return a Mamba2 that begins as an associative memory."""
    model = fresh_model("mamba2", config | {"use_bias": True}, vocabulary, seed)
    generator = torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings().weight.data
    words.normal_(0, words.shape[1] ** -0.5, generator=generator)
    for number, block in enumerate(model.backbone.layers):
        first_memory(block.mixer, 1.0 if number == 0 else LATER, generator)
    return model


@torch.no_grad()
def first_memory(mixer: Any, loud: float, generator: torch.Generator) -> None:
    """Set a mixer's weights so that it stores each token under the one before it. loud: the scale of its output."""
    inner, states, heads = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size, mixer.num_heads
    gate, x, B, C, dt = mixer.in_proj.weight.split([inner, inner, states, states, heads])
    size = mixer.hidden_size**-0.5
    x.normal_(0, size, generator=generator)
    C.copy_(B.normal_(0, KEYS * size, generator=generator))
    for rows in (gate, dt):
        rows.normal_(0, 0.1 * size, generator=generator)
    mixer.in_proj.bias.zero_()[:inner] = GATE
    taps = mixer.conv1d.weight.normal_(0, NOISE, generator=generator)[:, 0]  # (inner + 2 states, K)
    taps[:, -1] += 1
    taps[inner : inner + states] = taps[inner : inner + states].roll(-1, 1)
    mixer.A_log.fill_(math.log(RATE))
    mixer.dt_bias.fill_(math.log(math.expm1(STEP)))
    mixer.D.zero_()
    mixer.out_proj.weight.copy_(0.5 * loud * x.mT)
    mixer.out_proj.bias.zero_()


def objective(model: Any, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the answers, and how many of them are right. packed: tokens and answers, int64 (b, 2, T)."""
    tokens, answers = packed.unbind(1)
    asked = answers != NONE  # (b, T)
    logits, target = logits_after(model, tokens, asked), answers[asked]  # (questions, V), (questions,)
    return nn.functional.cross_entropy(logits, target), {"right": (logits.argmax(-1) == target).float().mean()}


def learn(model: Any, s: Any, seed: int) -> None:
    """Train with AdamW on a new batch in every step, of a random lesson. Settings: those of `models`."""
    how: dict[str, Any] = {"batch": 1, "at_once": 2**30, "seq_len": 1, "max_tokens": s.steps}
    settings = Schedule(learning_rate=s.rate, weight_decay=0.1, **how)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    optimizer, device, right = adamw(list(model.parameters()), settings), next(model.parameters()).device, {}
    model.train()
    quick = quick_scans(model.backbone.layers[0].mixer, ALL) if device.type == "cpu" else nullcontext()
    with quick:
        for step in range(1, s.steps + 1):
            which = rng.choice(s.lessons)
            batch = lesson(s.task, which, s.tokens, model.config.vocab_size, generator)
            packed = torch.stack([batch.tokens, batch.answers], 1).to(device)  # (b, 2, T)
            right[str(which)] = take_step(model, packed, optimizer, settings, step, objective)["right"]
            if step % 50 == 0:
                progress(f"step {step}: right { ({name: round(value, 2) for name, value in right.items()}) }")
    model.eval()


def place(s: Any, states: int, seed: int) -> Path:
    """Return the folder of a model: one for each training."""
    how = hash_of(s.config, s.vocabulary, s.lessons, s.tokens, s.steps, s.rate)
    return Path(s.work) / f"{s.task}-{s.config['hidden_size']}-{states}-{seed}-{how}"


def models(s: Any) -> Made:
    """Train the models that are not there. Settings: task, lessons, config, vocabulary, states, seeds, tokens (a step),
    steps, rate, device.
    """  # fmt: skip
    rows = []
    for states in s.states:
        for seed in s.seeds:
            folder, begun = place(s, states, seed), time.process_time()
            if folder.exists():
                continue
            model = memory(s.config | {"state_size": states}, s.vocabulary, seed).to(resolve_device(s.device))
            learn(model, s, seed)
            sspruner.save(model.cpu(), folder, overwrite=True)
            last = lesson(
                s.task, s.lessons[-1], 8 * s.tokens, s.vocabulary, torch.Generator().manual_seed(10**6 + seed)
            )
            right = float(answered(model, last)[0].mean())
            rows.append([folder.name, f"{right:.3f}", f"{(time.process_time() - begun) / 60:.1f}"])
            progress(" | ".join(rows[-1]))
    head = ["model", f"right of {s.lessons[-1]}", "minutes of a processor"]
    return [table(f"Models of {s.task}", head, rows)], f"{s.steps} steps of {s.tokens} tokens"
