"""Distillation: train a pruned model on text and on the dense model's predictions. Zeros stay zero.

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
from sspruner.errors import InputError, ModelError, install
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.trace import trace
from sspruner.recipes.train import DistilRecipe
from sspruner.training.arguments import recipe_of
from sspruner.training.loop import Objective, Trained, gradients_on, train
from sspruner.training.run import run_folder
from sspruner.training.text import Text

LORA_SCALE = 2  # alpha / r, the scale of the product of the low-rank matrices


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
    """Train a pruned model in place, on text and on the dense model's predictions for it, and return it.

    Weights are trained in fp32, and returned in their own dtypes. Entries of matrices that are exactly zero stay zero.

    Args:
        text: the training text, instead of the recipe's.
        out: folder for recipe.yaml, run.json, metrics.jsonl and checkpoints; an interrupted run continues from these.
        recipe: a `DistilRecipe`; or its fields as `short` arguments: `distil(..., alpha=0.9, max_tokens=10**6)`, or
            `settings`, a `Settings`. `lora` needs sspruner[train].
        progress: called with the metrics of a step, its number, and the number of steps.

    Raises:
        InputError: for invalid arguments.
        ModelError: if the models do not share a vocabulary.
    """
    check_whole(student, "training")
    check_whole(teacher, "a teacher")
    recipe = recipe_of(DistilRecipe, recipe, text, short)
    settings, method = recipe.settings, recipe.method
    alpha, temperature, hidden, lora = method.alpha, method.temperature, method.hidden, method.lora
    check_teacher(student, teacher)
    gradients_on(student)
    if hidden:
        _check_hidden(student, teacher)
    run_settings: dict[str, Any] = {
        "method": "distil",
        "student": fingerprint(student),
        "teacher": fingerprint(teacher),
    }
    run_settings |= {"alpha": alpha, "temperature": temperature, "hidden": hidden, "lora": lora}
    text.held_out_blocks()  # raises for an unreadable text before anything is written
    folder = run_folder(out, run_settings | settings.identity() | text.identity(), recipe)
    dtypes = {name: p.dtype for name, p in student.named_parameters()}
    device = next(student.parameters()).device
    trained = with_lora(student.float(), lora) if lora else student.float()
    hook = None if lora else keep_zeros(student)
    with quick_on_cpu(teacher, device):
        objective = distillation(teacher.to(device), alpha, temperature, hidden)
        record = train(trained, text, settings, objective, folder, after_step=hook, progress=progress)
    student = trained.merge_and_unload() if lora else student  # type: ignore[operator]
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return student.requires_grad_(False).eval(), record


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError for a teacher with another vocabulary."""
    sizes = [embedding(model).num_embeddings for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"teacher: has {sizes[1]:,} tokens in its vocabulary and the student {sizes[0]:,}")


def _check_hidden(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError if the models' hidden states cannot be compared block by block."""
    shapes = [(len(blocks_of(model)), embedding(model).embedding_dim) for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            "hidden: the student has {} blocks of size {}, the teacher {} of {}; leave it out".format(
                *shapes[0], *shapes[1]
            )
        )


def blocks_of(model: nn.Module) -> Any:
    """Return the list of blocks of a model."""
    return model.get_submodule(trace(model).blocks)


def with_lora(model: nn.Module, rank: int) -> Any:
    """Add low-rank matrices to the linear layers, except the head and out_proj, whose weights kernels read directly.

    Raises InputError without peft, and for a model with zeros, which low-rank matrices would fill.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"lora needs the package peft: {install('train')}") from error
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets = sorted(name for name in linear if name.rpartition(".")[2] != "out_proj")
    masked = [name for name in targets if bool((model.get_parameter(f"{name}.weight") == 0).any())]
    if masked:
        raise InputError(f"lora: {masked[0]}.weight holds zeros, which narrow matrices would fill; train all weights")
    config = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by a deprecated name
        return peft.get_peft_model(model, config)


def distillation(teacher: nn.Module, alpha: float = 0.5, temperature: float = 1.0, hidden: float = 0.0) -> Objective:
    """Return the loss function of a student. teacher: on the student's device; it is set to eval mode.

    hidden: weight of the squared error of the hidden states after each block, relative to the teacher's mean square.
    """
    options = {"use_cache": False} | ({"output_hidden_states": True} if hidden else {})
    teacher.eval()

    def loss(student: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = student(input_ids=tokens, **options)
        with torch.no_grad():
            teacher_outputs = teacher(input_ids=tokens, **options)
        logits = outputs.logits[:, :-1].float()  # (b, T-1, V)
        parts = {"cross_entropy": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())}
        parts["kl"] = divergence(teacher_outputs.logits[:, :-1].float() / temperature, logits / temperature)
        total = (1 - alpha) * parts["cross_entropy"] + alpha * temperature**2 * parts["kl"]
        if hidden:
            parts["hidden"] = hidden_error(outputs.hidden_states, teacher_outputs.hidden_states)
            total = total + hidden * parts["hidden"]
        return total, parts

    return loss


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats, the mean over tokens. Logits (b, T, V), fp32."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def hidden_error(student: Any, teacher: Any) -> torch.Tensor:
    """Return the mean over blocks of |student - teacher|^2 / |teacher|^2, each summed over tokens.

    student, teacher: tuples of (b, T, hidden), the first of the embedding.
    """
    errors = [
        (a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors[1:]).mean()  # the first is of the embedding


def keep_zeros(model: nn.Module) -> Callable[[int], None]:
    """Return a hook that sets to zero again the entries of matrices that are exactly zero now: masks, 2:4 patterns.

    Vectors are not changed: a bias that begins at zero is not a mask.
    """
    kept = [(p, p.detach() != 0) for p in model.parameters() if p.ndim > 1 and bool((p.detach() == 0).any())]

    @torch.no_grad()
    def restore(step: int) -> None:
        for parameter, keep in kept:
            parameter.mul_(keep)

    return restore
