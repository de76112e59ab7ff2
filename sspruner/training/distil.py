"""Distillation: a pruned model learns from the text and from the dense model. What is zero stays zero.

Loss: (1 - alpha) CE + alpha T^2 KL(teacher || student), both per token, of logits divided by T in the second (Hinton et
al., arXiv 1503.02531; for pruned SSMs: Ghattas et al., arXiv 2502.18886).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.compute.device import check_whole
from sspruner.compute.forward import embedding
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError, ModelError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.trace import trace
from sspruner.recipes.train import DistilRecipe
from sspruner.training.asked import asked_recipe
from sspruner.training.loop import Objective, Trained, train
from sspruner.training.run import run_folder
from sspruner.training.text import Text

LORA_SCALE = 2  # alpha / r: how far the product of the two narrow matrices counts


def distil(
    student: nn.Module,
    teacher: nn.Module,
    text: Text,
    out: str | Path,
    recipe: DistilRecipe | None = None,
    *,
    progress: Callable[[dict[str, float], int, int], None] | None = None,
    **short: Any,
) -> tuple[nn.Module, Trained]:
    """Train a pruned model on text and on what the dense model predicts for it; returns it, changed in place.

    Weights are trained, and returned, in the dtype that each had, with fp32 between. What is exactly zero in matrices
    stays zero.

    Args:
        text: the text to train on, which stands for the recipe's.
        out: folder for recipe.yaml, run.json, metrics.jsonl and checkpoints, from which an interrupted run goes on.
        recipe: a `DistilRecipe`; or its fields as `short` arguments: `distil(..., alpha=0.9, max_tokens=10**6)`, or
            `settings`, a `Settings`. `lora` needs sspruner[train].
        progress: called with the metrics of a step, its number, and how many there are.

    Raises:
        InputError: for bad arguments.
        ModelError: if the models do not share a vocabulary.
    """
    check_whole(student, "training")
    check_whole(teacher, "a teacher")
    recipe = asked_recipe(DistilRecipe, recipe, text, short)
    settings, method = recipe.settings, recipe.method
    alpha, temperature, hidden, lora = method.alpha, method.temperature, method.hidden, method.lora
    sizes = [embedding(model).num_embeddings for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"teacher: has {sizes[1]:,} tokens in its vocabulary and the student {sizes[0]:,}")
    if hidden:
        _check_hidden(student, teacher)
    asked: dict[str, Any] = {"method": "distil", "student": fingerprint(student), "teacher": fingerprint(teacher)}
    asked |= {"alpha": alpha, "temperature": temperature, "hidden": hidden, "lora": lora}
    text.held_out_blocks()  # a text that cannot be read ends here, before anything is written
    folder = run_folder(out, asked | settings.asked() | text.asked(), recipe)
    dtypes = {name: p.dtype for name, p in student.named_parameters()}
    device = next(student.parameters()).device
    trained = with_lora(student.float(), lora) if lora else student.float()
    hook = None if lora else zeros_stay(student)
    with quick_on_cpu(teacher, device):
        objective = distillation(teacher.to(device).eval(), alpha, temperature, hidden)
        found = train(trained, text, settings, objective, folder, after_step=hook, progress=progress)
    student = trained.merge_and_unload() if lora else student  # type: ignore[operator]
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return student.requires_grad_(False).eval(), found


def _check_hidden(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError for models whose hidden states cannot be compared block by block."""
    found = [(len(blocks_of(model)), embedding(model).embedding_dim) for model in (student, teacher)]
    if found[0] != found[1]:
        raise ModelError(
            "hidden: the student has {} blocks of size {}, the teacher {} of {}; leave it out".format(
                *found[0], *found[1]
            )
        )


def blocks_of(model: nn.Module) -> Any:
    """The list of blocks of a model."""
    return model.get_submodule(trace(model).blocks)


def with_lora(model: nn.Module, rank: int) -> Any:
    """The model with narrow matrices beside its linear layers, but the head and a mixer's out_proj, whose weight the
    kernels read without calling it. Raises InputError where that cannot be."""
    try:
        import peft
    except ImportError as error:
        raise InputError("lora needs the package peft: pip install 'sspruner[train]'") from error
    masked = [name for name, p in model.named_parameters() if p.ndim > 1 and bool((p == 0).any())]
    if masked:
        raise InputError(f"lora: {masked[0]} holds zeros, which narrow matrices would fill; train all weights")
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets = sorted(name for name in linear if name.rpartition(".")[2] != "out_proj")
    config = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        return peft.get_peft_model(model, config)


def distillation(teacher: nn.Module, alpha: float = 0.5, temperature: float = 1.0, hidden: float = 0.0) -> Objective:
    """The loss of a student; teacher: in eval mode, on the student's device.

    hidden: weight of the squared error of the hidden states after each block, relative to the teacher's mean square.
    """
    options = {"use_cache": False} | ({"output_hidden_states": True} if hidden else {})

    def loss(student: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = student(input_ids=tokens, **options)
        with torch.no_grad():
            theirs = teacher(input_ids=tokens, **options)
        logits = own.logits[:, :-1].float()  # (b, T-1, V)
        parts = {"cross_entropy": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())}
        parts["kl"] = divergence(theirs.logits[:, :-1].float() / temperature, logits / temperature)
        found = (1 - alpha) * parts["cross_entropy"] + alpha * temperature**2 * parts["kl"]
        if hidden:
            parts["hidden"] = hidden_error(own.hidden_states, theirs.hidden_states)
            found = found + hidden * parts["hidden"]
        return found, parts

    return loss


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, the mean over tokens. Logits (b, T, V), fp32."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def hidden_error(own: Any, theirs: Any) -> torch.Tensor:
    """Mean over blocks of |own - theirs|^2 / |theirs|^2, both summed over tokens. Each a tuple of (b, T, hidden)."""
    errors = [
        (a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in zip(own, theirs, strict=True)
    ]
    return torch.stack(errors[1:]).mean()  # the first is the embedding's


def zeros_stay(model: nn.Module) -> Callable[[int], None]:
    """A hook that makes zero again what was exactly zero in matrices when it was made: masks, 2:4 patterns.

    Vectors are left alone: a bias that begins at zero is no mask.
    """
    kept = [(p, p.detach() != 0) for p in model.parameters() if p.ndim > 1 and bool((p.detach() == 0).any())]

    @torch.no_grad()
    def again(step: int) -> None:
        for parameter, keep in kept:
            parameter.mul_(keep)

    return again
