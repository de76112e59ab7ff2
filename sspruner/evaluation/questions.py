"""Sequences of tokens with questions: the record that the synthetic tasks make, and how often a model is right.

A question is a place after which one token, its answer, must follow. All else in a sequence cannot be known, and does
not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sspruner.calibrate.sources import micro_batch_size
from sspruner.compute.forward import forward

NONE = -1  # where nothing is asked


@dataclass(frozen=True)
class Questions:
    """Sequences, and what must follow each of their tokens.

    tokens: int64 (n, T). answers: int64 (n, T); NONE where nothing is asked.
    """

    tokens: torch.Tensor
    answers: torch.Tensor

    def __getitem__(self, rows: slice) -> Questions:
        """Return some of the sequences."""
        return Questions(self.tokens[rows], self.answers[rows])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)


@torch.no_grad()
def answered(model: Any, questions: Questions, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of right answers and their mean nll, in nats, of each sequence: both fp64 (n,).

    An answer is right if it is the argmax. batch_size: sequences in one forward; default: as many as evaluate takes.
    """
    rows = []
    size = batch_size or micro_batch_size(questions.tokens.shape[1], logits=True)
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        asked = part.answers != NONE  # (b, T)
        logits = logits_after(model, part.tokens, asked)  # (questions, V)
        answers = part.answers[asked].to(logits.device)  # (questions,)
        nll = -logits.log_softmax(-1).gather(-1, answers[:, None])[:, 0]
        values = torch.stack([(logits.argmax(-1) == answers).double(), nll.double()])  # (2, questions)
        counts = asked.sum(1)  # (b,)
        rows.append(torch.stack([own.mean(1) for own in torch.split(values, counts.tolist(), 1)], 1).cpu())
    accuracy, nll = torch.cat(rows, 1)
    return accuracy, nll


def logits_after(model: Any, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return the logits after the places that are asked, bool (b, T): fp32 (questions, V).

    A head that is a module runs on these places alone: logits of all places would take most of the time and memory.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        logits = forward(model, tokens, use_cache=False).logits  # (b, T, V)
        return logits[asked.to(logits.device)].float()  # type: ignore[no-any-return]
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][asked.to(inputs[0].device)][None],))
    try:
        return forward(model, tokens, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
    finally:
        hook.remove()
