"""Check that the installed model code is causal: a token must not change the outputs of earlier tokens.

Without their kernels, some mixers of transformers before 5.14 read later tokens across chunk boundaries. Scores
measured on such a forward pass would describe a different model. A model that is meant to look ahead is said to be so:
by its family (`causal = False`), or by the user.
"""

from __future__ import annotations

from typing import Any

import torch

from sspruner.errors import ModelError

SAID = "_sspruner_not_causal"  # attribute of a model that the user said is not causal

CHUNK, TOKENS = 8, 19  # more than two chunks, and not a multiple of the chunk length

_passed: set[type] = set()  # mixer classes that passed the check in this process


def not_causal(model: Any) -> Any:
    """Say that a model is meant to look ahead (bidirectional): its mixers are not checked. Returns the model."""
    setattr(model, SAID, True)
    return model


@torch.no_grad()
def check_causal(mixer: Any, path: str, width: int | None = None) -> None:
    """Raise ModelError if the last token changes the mixer's output for earlier tokens. width: of its input, if known.

    Runs once per mixer class and process; skipped for mixers on the meta device.
    """
    # What the mixer's input is multiplied by has its dtype; A_log, which may be the first parameter, is often fp32.
    matrices = [p for p in mixer.parameters() if p.ndim == 2 and p.is_floating_point()]
    weight = getattr(getattr(mixer, "in_proj", None), "weight", matrices[0] if matrices else None)
    if weight is None or type(mixer) in _passed or any(p.is_meta for p in mixer.parameters()):
        return
    if type(mixer).__module__.startswith("mamba_ssm.") and weight.device.type == "cpu":
        return  # its kernels run on a GPU alone; a model on the CPU can still be traced
    width = width or weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, width, generator=generator).to(weight)
    changed = hidden.clone()
    changed[:, -1] += 1
    chunk, training = getattr(mixer, "chunk_size", None), mixer.training
    mixer.eval()
    if chunk is not None:
        mixer.chunk_size = CHUNK
    try:
        before, after = (_first(mixer(h))[:, :-1].float() for h in (hidden, changed))
    finally:
        mixer.train(training)
        if chunk is not None:
            mixer.chunk_size = chunk
    if not before.isfinite().all():  # damaged weights are reported where they are loaded
        return
    # A causal mixer computes the same sums in the same order, so outputs agree up to the rounding of a kernel.
    limit = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not (after - before).abs().max() <= limit * before.abs().max():
        raise ModelError(
            f"{path}: the installed code of {type(mixer).__name__} lets a later token change earlier outputs; what it "
            "computes is not this model. Install transformers >= 5.23, or the kernels that the model asks for; of a "
            "model that is meant to look ahead, say so: --not-causal (sspruner.not_causal(model))"
        )
    _passed.add(type(mixer))


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
